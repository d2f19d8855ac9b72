"""Every tolerance of the tests, with its cause."""

FLOAT64 = 1e-9  # relative; the recursion against the batch solution, conditioning included
# relative, float64; a downdate with negative weight costs digits, the condition of A grows by up to d
RETRACTION = 1e-8
FLOAT32 = 1e-4  # relative; the same in float32, for priors of condition number up to about 1e3
LONG_STREAM_FLOAT32 = 1e-3  # relative; 10,000 batches in float32
PADDING = 1e-5  # absolute, on states of order 1: other padding means another order of summation
VALUES = 2e-3  # relative; 20 Adam steps turn rounding of 1e-7 into this, Adam divides by small gradients
BFLOAT16 = 0.05  # nats and relative; losses of a model in bfloat16, whose numbers have 8 bits
# relative; values found on two devices part as in VALUES, and the next batch starts from what the first left
TWO_DEVICES = 0.04
