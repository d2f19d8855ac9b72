"""What editing has done to a model: batched metrics."""

from easyedit_rls.evaluation.abilities import abilities
from easyedit_rls.evaluation.easyedit import add_locality, edit_quality
from easyedit_rls.evaluation.generation import Answer, answers, consistency, fluency, generate
from easyedit_rls.evaluation.metrics import Evaluation, evaluate
from easyedit_rls.evaluation.perplexity import perplexity
from easyedit_rls.evaluation.relations import first_tokens, other_questions, unchanged

__all__ = [
    "Answer",
    "Evaluation",
    "abilities",
    "add_locality",
    "answers",
    "consistency",
    "edit_quality",
    "evaluate",
    "first_tokens",
    "fluency",
    "generate",
    "other_questions",
    "perplexity",
    "unchanged",
]
