"""easyedit-rls: lifelong editing of language models by recursive least squares
(RLSEdit, arXiv 2601.15686).
"""

from easyedit_rls._version import __version__
from easyedit_rls.anchors.pairs import AnchorPairs, anchor_pairs
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest, parse_requests
from easyedit_rls.editors.reports import EditReport, RetractReport
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.errors import (
    AnchorError,
    DataError,
    FillWarning,
    GateError,
    HostError,
    HyperParamsError,
    LayoutError,
    LedgerError,
    NumericalError,
    RequestError,
    RLSEditError,
    RLSEditWarning,
    StateMismatchError,
    UnsaidWarning,
)
from easyedit_rls.evaluation import Evaluation, evaluate, perplexity
from easyedit_rls.host import register, unregister
from easyedit_rls.model.gate import load_edited, merge_gates, remove_gates, save_edited

__all__ = [
    "AnchorError",
    "AnchorPairs",
    "DataError",
    "EditReport",
    "EditRequest",
    "Evaluation",
    "FillWarning",
    "GateError",
    "HostError",
    "HyperParamsError",
    "LayoutError",
    "LedgerError",
    "NumericalError",
    "RLSEditError",
    "RLSEditHyperParams",
    "RLSEditWarning",
    "RLSEditor",
    "RequestError",
    "RetractReport",
    "StateMismatchError",
    "UnsaidWarning",
    "__version__",
    "anchor_pairs",
    "evaluate",
    "load_edited",
    "merge_gates",
    "parse_requests",
    "perplexity",
    "register",
    "remove_gates",
    "save_edited",
    "unregister",
]
