"""Every tolerance of the tests, with its cause."""

FLOAT64 = 1e-9  # relative; the recursion against the batch solution, conditioning included
# relative, float64; a downdate with negative weight costs digits, the condition of A grows by up to d
RETRACTION = 1e-8
RETRACTIONS = 1e-7  # the same for several, one after another
FLOAT32 = 1e-4  # relative; the same in float32, for priors of condition number up to about 1e3
FLOAT32_SUM = 1e-6  # relative; one sum of numbers in float32
FLOAT64_SUM = 1e-12  # the same in float64
LONG_STREAM_FLOAT32 = 1e-3  # relative; 10,000 batches in float32
SOLVED = 1e-3  # relative to the edit; a prior that is told from the inverse of C in float32
DRIFT = 1e-4  # relative, of C Y to Z; a few batches in float32
FEW_EDITS_DRIFT = 1e-5  # the same for twenty edits of small keys
TAKEN_OUT = 1e-4  # relative to what a retraction takes out
OTHERS = 1e-5  # relative to all other edits; float32, beside the above
TERMS = 1e-3  # relative; terms of the objective, from weights in float32
PADDING = 1e-5  # absolute, on states of order 1: other padding means another order of summation
BATCHES = {"rtol": 1e-5, "atol": 1e-6}  # float32; other batches mean another order of summation
SUMS = {"rtol": 1e-4, "atol": 1e-4}  # float32; sums over rows of order 1 and above
WEIGHTS = {"rtol": 1e-4, "atol": 1e-5}  # float32; a weight found along another way
REBUILT = {"rtol": 1e-3, "atol": 1e-4}  # float32; a solution made anew, or merged from a product of low rank
REPLAYED = {"rtol": 1e-6, "atol": 1e-8}  # float32; the same steps from the same numbers
LOGITS = 1e-4  # absolute; a row alone, and in a batch
OTHER_THREADS = {"rtol": 1e-4, "atol": 1e-5}  # float32 logits; other threads sum in another order
SCORES = 1e-4  # relative; an answer's NLL in a batch, and by a pass of its own
NEARLY_ZERO = 1e-4  # nats; losses that go to zero
PROBABILITY = 1e-6  # absolute; a probability in a batch, and by a pass of its own
ADAPTER = 1e-2  # relative to the edit; what its adapter's rank and rounding leave of the logits
LINEAR = 0.05  # relative; a small step through a norm, of which the first order is right
TWO_DIGITS = 0.1  # relative; settings made from a model are rounded to two digits, and seen on a few tokens
VALUES = 2e-3  # relative; 20 Adam steps turn rounding of 1e-7 into this, Adam divides by small gradients
BFLOAT16 = 0.05  # nats and relative; losses of a model in bfloat16, whose numbers have 8 bits
BFLOAT16_SUM = 0.02  # relative; a scale that is told from such numbers
# relative; values found on two devices part as in VALUES, and the next batch starts from what the first left
TWO_DEVICES = 0.04
TWO_DEVICES_BFLOAT16 = {"rel": 0.2, "abs": 0.3}  # nats; the same for values found in 8 bits
RULES_FLOAT64 = 1e-9  # of the change, a rule against its formula by a general solve
RULES_FLOAT32 = 1e-4  # the same where weight, keys and targets are float32

LEVERAGE_FLOAT32 = {"rtol": 0.0, "atol": 2e-5}  # a gate's g, from factors that were rounded once
LEVERAGE_FLOAT64 = {"rtol": 0.0, "atol": 1e-9}  # the same in float64, after 1,000 updates

# A full shard summed anew in float64, its weight kept in float32
GATE_SUMMED_ANEW = {"atol": 1e-6, "rtol": 1e-5}
