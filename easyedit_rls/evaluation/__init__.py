"""What editing has done to a model: batched metrics."""

from easyedit_rls.evaluation.metrics import Evaluation, evaluate
from easyedit_rls.evaluation.perplexity import perplexity

__all__ = ["Evaluation", "evaluate", "perplexity"]
