"""The edit as a model of its own, or as a LoRA adapter."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from easyedit_rls.errors import LedgerError, StateMismatchError
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.model.weights import EditedWeight, fingerprint

_TOLERANCE = 1e-3  # of the edit's norm: what an adapter may leave out unless a rank is given


@dataclass(frozen=True)
class AdapterReport:
    """What an adapter holds.

    Attributes:
        rank: of every layer's pair of matrices.
        errors: layer -> ‖ΔW − B A‖/‖ΔW‖, the adapter's own rounding included; see `write_adapter`.
        n_bytes: size of the adapter's weights.
    """

    rank: int
    errors: dict[int, float]
    n_bytes: int


def edited_weights(model: PreTrainedModel, manifest: Manifest, moment: Moment) -> dict[int, EditedWeight]:
    """The weights of the unedited model that a ledger was made with, by layer, for its edits.

    Raises:
        StateMismatchError: it is another model, or an edited one; lists every difference.
    """
    edited = {}
    for number, parameter in manifest.parameters.items():
        try:
            module = model.get_submodule(parameter.rpartition(".")[0])
        except AttributeError as exc:
            raise StateMismatchError(
                f"The model has no weight {parameter}. Give the model that the ledger was made with."
            ) from exc
        edited[int(number)] = EditedWeight(module, parameter.rpartition(".")[0])
    here = {
        "architecture": (manifest.architecture, type(model).__name__),
        "dtype": (manifest.dtype, str(next(iter(edited.values())).parameter.dtype).removeprefix("torch.")),
        "widths": (manifest.widths, {str(layer): list(weight.shape) for layer, weight in edited.items()}),
        "fingerprint of the weights that are not edited": (
            manifest.rest,
            fingerprint(model, leave_out={weight.parameter_name for weight in edited.values()}),
        ),
    }
    differences = [
        f"{name}: the ledger has {ours!r}, the model {theirs!r}"
        for name, (ours, theirs) in here.items()
        if ours != theirs
    ]
    if not any(text.startswith("widths") for text in differences):
        changed = [layer for layer, weight in edited.items() if not weight.holds(moment.unedited[layer])]
        differences += [f"weights of layers {changed} are not the unedited ones"] if changed else []
    if differences:
        raise StateMismatchError(
            f"This is not the unedited model that the ledger was made with ({manifest.model}): "
            f"{'; '.join(differences)}. Give that one."
        )
    return edited


def write_adapter(folder: Path, manifest: Manifest, moment: Moment, rank: int | None) -> AdapterReport:
    """Write the edit as a PEFT LoRA adapter: the best approximation of that rank (Eckart & Young 1936).

    The edit is ΔW = W − W_0, (d_k, d_v), with the master W of the state (float32, or float64 where it was
    summed anew), whatever the model's type: its rank is that of the edits' keys. A model in half precision
    holds W rounded, and the rounding has full rank.

    Args:
        folder: for adapter_config.json and adapter_model.safetensors.
        manifest: of the ledger.
        moment: its state.
        rank: of the adapter; None takes the smallest that leaves out no more than 1e-3 of the edit's norm.

    Raises:
        LedgerError: PEFT is missing, or without a rank given the adapter would be larger than the weights
            themselves.
    """
    try:
        from peft import LoraConfig
    except ImportError as exc:
        raise LedgerError("PEFT is missing. Install it: pip install 'easyedit-rls[lora]'.") from exc
    deltas = {layer: moment.merged(layer) - W_0.double() for layer, W_0 in moment.unedited.items()}
    parts = {layer: torch.linalg.svd(delta, full_matrices=False) for layer, delta in deltas.items()}
    if rank is None:
        rank = max(_needed(S) for _, S, _ in parts.values())
        d_k, d_v = next(iter(deltas.values())).shape
        if rank * (d_k + d_v) >= d_k * d_v:
            raise LedgerError(
                f"The edit has rank {rank} in weights of {d_k} x {d_v}: "
                "an adapter would be larger than the weights. "
                "Save the model (`easyedit-rls state replay`), or pass --rank and accept the error it prints."
            )
    tensors: dict[str, Tensor] = {}
    errors = {}
    for layer, (U, S, Vh) in parts.items():
        root = S[:rank].sqrt()
        A, B = (
            (U[:, :rank] * root).T.float().contiguous(),
            (root[:, None] * Vh[:rank]).T.float().contiguous(),
        )  # ΔWᵀ = B A
        name = f"base_model.model.{manifest.parameters[str(layer)].rpartition('.')[0]}"
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        size = float(deltas[layer].norm())
        errors[layer] = (
            float((deltas[layer] - (B.double() @ A.double()).T).norm()) / size if size > 0 else 0.0
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[name.rpartition(".")[0] for name in manifest.parameters.values()],
        fan_in_fan_out="Conv1D" in manifest.modules.values(),
        task_type="CAUSAL_LM",
        base_model_name_or_path=manifest.model,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return AdapterReport(
        rank, errors, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    )


def _needed(S: Tensor) -> int:
    """The smallest rank that leaves out no more than the tolerance."""
    left_out = S.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of what ranks 0, 1, ... leave out
    return max(1, int((left_out > _TOLERANCE * left_out[0]).sum()))
