"""What editing has done to a model: batched metrics."""

from easyedit_rls.evaluation.abilities import abilities
from easyedit_rls.evaluation.easyedit import add_locality, edit_quality
from easyedit_rls.evaluation.generation import Answer, answers, consistency, fluency, generate
from easyedit_rls.evaluation.metrics import Evaluation, evaluate
from easyedit_rls.evaluation.perplexity import perplexity

__all__ = [
    "Answer",
    "Evaluation",
    "abilities",
    "add_locality",
    "answers",
    "consistency",
    "edit_quality",
    "evaluate",
    "fluency",
    "generate",
    "perplexity",
]
