"""What every benchmark's output says: spreads, versions and the machine."""

import platform
import statistics
from collections.abc import Sequence

import torch
import transformers

import easyedit_rls


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def versions() -> dict[str, str]:
    """Of the package and of what it computes with."""
    return {"easyedit_rls": easyedit_rls.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def machine() -> dict[str, object]:
    """Where it ran."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": platform.machine(), "gpu": gpu, "threads": torch.get_num_threads(), "python": platform.python_version()}
