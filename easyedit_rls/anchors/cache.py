"""Second moments of keys over ordinary text: from the cache, from EasyEdit's files, or from text.

The anchor term of the objective is ``μ²‖K_0 W − V_0‖²``. With moments, ``K_0ᵀK_0 = n_0 · E[k kᵀ]`` over
ordinary text and V_0 = K_0 W_0. The text comes with the package (the default), from the model itself, a text
file, a Hugging Face dataset, or is already summed up in EasyEdit's cached ``.npz`` files. Moments are cached
under the user's cache folder, by model fingerprint, layer, source and size.
"""

import hashlib
import logging
import os
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.files import user_path
from easyedit_rls.anchors.moments import Moment, sum_moments
from easyedit_rls.anchors.text import SAMPLED_TOKENS, TEXT_TOKENS, shipped_text, token_blocks
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import AnchorError
from easyedit_rls.model.layout import Layout, find_layout
from easyedit_rls.model.tokens import end_tokens, start_tokens
from easyedit_rls.model.weights import fingerprint

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where moments are cached: ``$EASYEDIT_RLS_CACHE``, or the user's cache folder."""
    given = os.environ.get("EASYEDIT_RLS_CACHE")
    return user_path(given) if given else user_cache_path("easyedit-rls", appauthor=False)


def moments(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    *,
    show_progress: bool | None = None,
) -> dict[int, Moment]:
    """Second moments of the keys at every edited layer, from the cache or from text.

    Args:
        model: the unedited model.
        tok: its tokenizer.
        hparams: mom2_dataset, mom2_n_samples, mom2_tolerance, mom2_dtype, stats_dir, seed, layers and module
            names.
        show_progress: None shows bars on a terminal only.

    Raises:
        AnchorError: the text or the cached file can't be had, or is of another width.
    """
    layout = find_layout(model, hparams)
    source = hparams.mom2_dataset
    if source.endswith(".npz"):
        raise AnchorError(
            f"mom2_dataset is the file {source}. Give the name of its text, "
            "e.g. wikipedia, and set stats_dir to its folder."
        )
    if source not in ("shipped", "self") and not source.endswith(".txt"):
        stored = easyedit_files(model, layout, hparams)
        if all(path.is_file() for path in stored.values()):
            return {layer: read_npz(path, layout.edited[layer].shape[0]) for layer, path in stored.items()}

    places = _cache_places(model, layout, tok, hparams)
    found = {
        layer: _read_cached(path, layout.edited[layer].shape[0])
        for layer, path in places.items()
        if path.is_file()
    }
    missing = [layer for layer in places if layer not in found]
    if missing:
        blocks = token_blocks(model, tok, hparams)
        fresh = sum_moments(model, layout, missing, blocks, hparams, show_progress=show_progress)
        for layer, moment in fresh.items():
            _write_cached(places[layer], moment)
        found.update(fresh)
    return {layer: found[layer] for layer in places}


def read_npz(path: str | Path, d_k: int) -> Moment:
    """Read second moments in the format of EasyEdit's ``layer_stats`` (never unpickling).

    Args:
        path: the .npz file.
        d_k: the width expected.

    Raises:
        AnchorError: unreadable, or of another width.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            total, count = torch.from_numpy(stored["mom2.mom2"]), int(stored["mom2.count"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as exc:
        raise AnchorError(
            f"{Path(path).absolute()} holds no second moments of EasyEdit: {exc}. "
            "Delete it or change stats_dir."
        ) from exc
    return _checked(Moment(total / count, count), d_k, Path(path))


def write_npz(path: str | Path, moment: Moment, n_texts: int) -> None:
    """Write second moments so that EasyEdit's ``layer_stats`` reads them instead of its data set.

    Args:
        path: see `easyedit_files` for where EasyEdit looks.
        moment: what to write.
        n_texts: EasyEdit's sample_size (mom2_n_samples), which it compares.
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(
            file,
            **{  # type: ignore[arg-type]
                "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
                "mom2.count": moment.n_tokens,
                "mom2.mom2": (moment.mean * moment.n_tokens).numpy(),
                "sample_size": n_texts,
            },
        )
    os.replace(file.name, path)


def easyedit_files(model: PreTrainedModel, layout: Layout, hparams: RLSEditHyperParams) -> dict[int, Path]:
    """Where EasyEdit caches each layer's moments:
    ``<stats_dir>/<model>/<dataset>_stats/<module>_<dtype>_mom2_<n_samples>.npz``.
    """
    model_name = (model.config._name_or_path or hparams.model_name).rstrip("/").rsplit("/")[-1]
    folder = user_path(hparams.stats_dir) / model_name / f"{hparams.mom2_dataset}_stats"
    suffix = f"{hparams.mom2_dtype}_mom2_{hparams.mom2_n_samples}.npz"
    return {
        layer: folder / f"{w.parameter_name.removesuffix('.weight')}_{suffix}"
        for layer, w in layout.edited.items()
    }


def _cache_places(
    model: PreTrainedModel, layout: Layout, tok: PreTrainedTokenizerBase, hparams: RLSEditHyperParams
) -> dict[int, Path]:
    """Cache file of each layer; its name changes with all that changes the moments."""
    source = hparams.mom2_dataset
    if source.endswith(".txt"):
        content = user_path(source).read_bytes() if user_path(source).is_file() else b""
        identity = f"file {hashlib.sha256(content).hexdigest()} seed {hparams.seed}"
    elif source == "shipped":
        identity = f"file {hashlib.sha256(shipped_text().encode()).hexdigest()} seed {hparams.seed}"
    else:
        identity = f"{source} seed {hparams.seed} tokens {SAMPLED_TOKENS} {TEXT_TOKENS}"
        if source == "self" and start_tokens(tok):
            identity += " from the start token"
    identity = f"{identity} {hparams.mom2_dtype} tolerance {hparams.mom2_tolerance} vocabulary {len(tok)}"
    if any(residual.norm is not None for residual in layout.residuals.values()):
        identity += " behind norms"  # tokens are weighed there
    if end_tokens(tok):
        identity += " without end tokens"  # texts had them once
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache_folder() / "moments" / fingerprint(model)
    name = re.sub(r"[^\w.-]+", "-", Path(source).name)
    return {
        layer: folder / f"{weight.parameter_name}-{name}-{digest}-{hparams.mom2_n_samples}.safetensors"
        for layer, weight in layout.edited.items()
    }


def _read_cached(path: Path, d_k: int) -> Moment:
    try:
        with safe_open(path, framework="pt") as stored:
            moment = Moment(
                stored.get_tensor("mean"),
                int(stored.metadata()["n_tokens"]),
                float(stored.metadata()["error"]),
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as exc:
        raise AnchorError(f"{path} holds no second moments, or is damaged: {exc}. Delete it.") from exc
    logger.info(
        "Second moments of %d tokens (relative error about %.3f) read from %s",
        moment.n_tokens,
        moment.error,
        path,
    )
    return _checked(moment, d_k, path)


def _write_cached(path: Path, moment: Moment) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        temporary = Path(file.name)
    save_file(
        {"mean": moment.mean.contiguous()},
        temporary,
        metadata={"n_tokens": str(moment.n_tokens), "error": str(moment.error)},
    )
    os.replace(temporary, path)


def _checked(moment: Moment, d_k: int, path: Path) -> Moment:
    if tuple(moment.mean.shape) != (d_k, d_k):
        raise AnchorError(
            f"{path.absolute()} holds moments of width {moment.mean.shape[0]}, "
            f"but the layer's is {d_k}. Delete it, or change stats_dir."
        )
    return moment
