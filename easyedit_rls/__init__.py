"""easyedit-rls: lifelong editing of language models by recursive least squares (RLSEdit, arXiv 2601.15686)."""

from easyedit_rls.anchors import AnchorPairs, anchor_pairs
from easyedit_rls.editor import EditReport, RLSEditor
from easyedit_rls.errors import (
    AnchorError,
    HostError,
    HyperParamsError,
    LayoutError,
    NumericalError,
    RequestError,
    RLSEditError,
    RLSEditWarning,
    StateMismatchError,
)
from easyedit_rls.evaluation import Evaluation, evaluate, perplexity
from easyedit_rls.host import register, unregister
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.requests import EditRequest, parse_requests

__version__ = "0.1.0"

__all__ = [
    "AnchorError",
    "AnchorPairs",
    "EditReport",
    "EditRequest",
    "Evaluation",
    "HostError",
    "HyperParamsError",
    "LayoutError",
    "NumericalError",
    "RLSEditError",
    "RLSEditHyperParams",
    "RLSEditWarning",
    "RLSEditor",
    "RequestError",
    "StateMismatchError",
    "anchor_pairs",
    "evaluate",
    "parse_requests",
    "perplexity",
    "register",
    "unregister",
]
