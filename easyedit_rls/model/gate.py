"""A gate in front of an edited weight: a token sees the edits only where they have something to say of it.

Recursive least squares is Bayesian linear regression. With prior covariance C_0 and C_t after t batches, the
variance of what the weight makes of a key a falls from ``a C_0 aᵀ`` to ``a C_t aᵀ``, and

    g(a) = 1 − (a C_t aᵀ) / (a C_0 aᵀ)   in [0, 1]

is the share that the edits took away: the *leverage* they have on a. With C_0 = R_0 R_0ᵀ and C_t = R_t R_tᵀ
it is ``1 − ‖a R_t‖²/‖a R_0‖²``. The gate's prior is ρ times the weights' (`gate_prior`): A_0 = C_0^-1 counts
ρ A_0, and A_t = C_t^-1 counts ``A_t − (1 − ρ) A_0``, which with few edits changes little, and with many lets
those that were made stand out. A token with g above the threshold τ is *open*: its output is ``a W_t``, that
of all others ``a W_0``, to the bit. g does not change when a is scaled.

One decision a token: the gate's layer is the first one that is edited. No edit changes what comes to it, so
what is written at a key stays where it can be found, whatever is edited later. The layers above go by the
same decision.

A memory that is full goes on in *shards*, each with a covariance C_s and weights W_s of its own. A token goes
to the shard with the largest g_s, if that is above τ: the edits of one shard don't take room from those of
another. Of shards with nearly the same g_s it goes to the newest, so that later facts count.

This file needs torch and safetensors alone: a saved memory has a copy beside it, so that it can be loaded
where nothing else of this package is:

    from gate import load_edited
    load_edited(model, "folder")                        # model: the unedited one
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from easyedit_rls.errors import GateError

CLOSED = float("inf")  # a threshold that no token passes

_ALIKE = 0.01  # leverages that differ less

_NAME = "_easyedit_rls_gate"  # of the submodule, on each edited projection
_FILE, _FORMATS = "gates.safetensors", ("1", "2")  # the second has shards
_OWN_IMPORT = re.compile(r"^from easyedit_rls\.errors import GateError$", re.MULTILINE)
_SAMPLES = 4096  # values of a weight that its fingerprint is made of


class Decision(nn.Module):
    """Which tokens are open. The factors keep their type when the model is cast, and are in no state dict.

    Attributes:
        factors: ``[R_0 | R_1 | … | R_n]`` of n shards, (d_k, (1 + n) d_k), float32; empty before the first
            edit.
        prior: A_0, (d_k, d_k), what an editor makes them of; None where the gates were loaded.
        threshold: τ.
        open: of the last pass, (rows, tokens) or (tokens,), int16: number of the shard a token sees, from
            1; 0 where it is closed. None before a pass.
        is_used_up: whether the pass that `open` is of went through all gates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors: Tensor = torch.empty(0)
        self.prior: Tensor | None = None
        self.threshold = CLOSED
        self.open: Tensor | None = None
        self.is_used_up = False

    @property
    def newest(self) -> int:
        """Number of the shard that edits go to."""
        return self.factors.shape[1] // self.factors.shape[0] - 1 if self.factors.dim() == 2 else 1

    def leverages(self, keys: Tensor) -> Tensor:
        """g_s of keys, (..., d_k) -> (..., shards), in the factors' type."""
        products = (keys.to(self.factors) @ self.factors).square()
        norms = torch.stack([part.sum(-1) for part in products.chunk(1 + self.newest, -1)], -1)
        prior, posterior = norms[..., :1], norms[..., 1:]
        return torch.where(prior > 0, 1 - posterior / prior, 0)

    def leverage(self, keys: Tensor) -> Tensor:
        """The largest g_s of keys, (..., d_k) -> (...), in the factors' type."""
        return self.leverages(keys).amax(-1)

    def route(self, leverages: Tensor) -> Tensor:
        """What tokens see, as `open`, from their g_s, (..., shards): of shards that know a key nearly alike,
        as those do that each have a fact of one subject, the newest counts.
        """
        largest = leverages.amax(-1, keepdim=True)
        numbers = torch.arange(1, leverages.shape[-1] + 1, device=leverages.device)
        shard = torch.where(leverages >= largest - _ALIKE, numbers, 0).amax(-1)
        return torch.where(largest.squeeze(-1) > self.threshold, shard, 0).to(torch.int16)

    def decide(self, keys: Tensor) -> None:
        """Take the decision for the tokens of a pass, from their keys at the gate's layer, (..., d_k)."""
        if self.threshold == CLOSED:
            self.open = torch.zeros(keys.shape[:-1], dtype=torch.int16, device=keys.device)
        else:
            self.open = self.route(self.leverages(keys))
        self.is_used_up = False

    def hold(self, is_open: Tensor) -> None:
        """Set the decision for a pass that begins above the gate's layer, (rows, tokens), as `open`."""
        self.open, self.is_used_up = is_open, False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decision":
        """Go to another device with the model, but into no other type."""
        device = fn(torch.empty(0).to(self.factors)).device
        self.factors = self.factors.to(device)
        self.prior = None if self.prior is None else self.prior.to(device)
        return self


class Gate(nn.Module):
    """On one edited projection: its weight with the edits, and the way to it.

    Args:
        projection: ``nn.Linear`` or transformers' ``Conv1D``.
        decision: shared by all gates of a model.
        decides: whether this is the gate's layer.
        is_last: whether no gate stands above this one.

    Attributes:
        weight: W_t of the newest shard in the projection's own orientation, type and device.
        decision: see above.
    """

    def __init__(self, projection: nn.Module, decision: Decision, decides: bool, is_last: bool) -> None:
        super().__init__()
        given: Any = projection.weight
        self.weight = nn.Parameter(given.detach().clone(), requires_grad=False)
        self._is_linear, self._decides, self._is_last = isinstance(projection, nn.Linear), decides, is_last
        self._unedited = given.dtype, digest_of({"": projection})
        self._shared = [decision]  # in a list: it is the submodule of one gate alone
        self._n_full = 0
        if decides:
            self.decider = decision

    @property
    def full(self) -> list[Tensor]:
        """Weights of the shards before the newest, in order, oriented as `weight`."""
        return [self.get_buffer(f"shard_{number}") for number in range(self._n_full)]

    @full.setter
    def full(self, weights: Sequence[Tensor]) -> None:
        for number in range(len(weights), self._n_full):
            delattr(self, f"shard_{number}")
        for number, given in enumerate(weights):
            own = torch.empty_like(self.weight.data).copy_(given)  # laid out as `weight`, bit for bit alike
            self.register_buffer(f"shard_{number}", own, persistent=False)
        self._n_full = len(weights)

    @property
    def decision(self) -> Decision:
        """Shared by all gates of a model."""
        return self._shared[0]

    def is_untouched(self, projection: nn.Module) -> bool:
        """Whether the projection's own weight is what it was when the gate was put on it; one that was cast
        since counts as it is.
        """
        weight: Any = projection.weight
        now = weight.dtype, digest_of({"": projection})
        if now[0] != self._unedited[0]:
            self._unedited = now
        return now == self._unedited

    def pass_edits(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The projection's forward hook: output with the edits, where a token is open."""
        keys = args[0]
        if self._decides:
            self.decision.decide(keys)
        is_open = self.decision.open
        if is_open is None or not self._is_of(is_open, keys):
            raise GateError(
                "The gate's layer saw other tokens than this one. Run whole passes through the model; to run "
                "a part of its layers, take the gates off (remove_gates)."
            )
        self.decision.is_used_up = self._is_last
        is_open = is_open.to(keys.device).reshape(keys.shape[:-1])
        weights = enumerate((*self.full, self.weight), 1)
        if keys.device.type != "cpu" or torch.compiler.is_compiling():  # no waiting for what is open
            for number, weight in weights:
                edited = self._edited(projection, keys, weight)
                output = torch.where((is_open == number)[..., None], edited, output)
            return output
        if not bool(is_open.any()):
            return output
        output = output.clone()
        for number, weight in weights:
            tokens = is_open == number
            output[tokens] = self._edited(projection, keys[tokens], weight)
        return output

    def _is_of(self, is_open: Tensor, keys: Tensor) -> bool:
        """Whether a decision is that of a pass with these keys. One that was used up serves again where
        gradients are wanted: checkpoints of activations run layers a second time.
        """
        tokens = keys.shape[:-1]
        fits = is_open.shape == tokens or (
            1 in (is_open.dim(), len(tokens)) and is_open.numel() == tokens.numel()
        )
        return fits and (torch.is_grad_enabled() or not self.decision.is_used_up)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A state dict is the unedited model's."""
        if self._decides:
            warnings.warn(
                "The model's edits stand behind gates, which no state dict and no save_pretrained holds. "
                "Save them with save_edited(model, folder), or write them into the weights with "
                "merge_gates(model).",
                stacklevel=2,
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The same."""

    def _edited(self, projection: nn.Module, keys: Tensor, weight: Tensor) -> Tensor:
        weight, bias = weight.to(keys.dtype), projection.bias
        return F.linear(keys, weight if self._is_linear else weight.T, bias)  # type: ignore[arg-type]


def gate_of(projection: nn.Module) -> Gate:
    """The gate on a projection.

    Raises:
        GateError: it has none.
    """
    gate = projection._modules.get(_NAME)
    if not isinstance(gate, Gate):
        raise GateError("The projection has no gate: it was taken off. Make a new editor of the model.")
    return gate


def gate_weight_name(parameter_name: str) -> str:
    """Full name of the gate's weight for an edited parameter's, ``layer.projection.weight``."""
    return f"{parameter_name.removesuffix('weight')}{_NAME}.weight"


def is_behind_gate(parameter_name: str) -> bool:
    """Whether a parameter of a model is a gate's."""
    return f".{_NAME}." in parameter_name


def has_gate(projection: nn.Module) -> bool:
    """Whether a projection has a gate."""
    return _NAME in projection._modules


def has_gates(model: nn.Module) -> bool:
    """Whether a model's edits stand behind gates."""
    return bool(gated_modules(model))


def put_gates(projections: list[nn.Module]) -> Decision:
    """Put a gate on each edited projection, lowest layer first, which is the gate's; closed, so that nothing
    changes.
    """
    decision = Decision()
    for number, projection in enumerate(projections):
        is_last = number == len(projections) - 1
        gate = Gate(projection, decision, decides=number == 0, is_last=is_last)
        projection.add_module(_NAME, gate)
        projection.register_forward_hook(gate.pass_edits)
    return decision


def remove_gates(model: nn.Module) -> None:
    """Take all gates off a model, and the edits with them: it is the unedited one again."""
    for module in gated_modules(model).values():
        gate, hooks = gate_of(module), module._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is gate]:
            del hooks[key]
        delattr(module, _NAME)


def merge_gates(model: nn.Module) -> None:
    """Write the edits into the model's own weights and take the gates off: all tokens see them then, those
    of all shards at once.
    """
    for module in gated_modules(model).values():
        weight: Any = module.weight
        gate = gate_of(module)
        with torch.no_grad():
            unedited, merged = weight.float(), gate.weight.float()
            for full in gate.full:
                merged = merged + (full.float() - unedited)
            weight.copy_(merged)
    remove_gates(model)


def save_edited(model: nn.Module, folder: str | Path) -> None:
    """Write a model's gates into ``gates.safetensors``, and beside it this file, which loads them.

    Raises:
        GateError: the model has none.
    """
    found = gated_modules(model)
    if not found:
        raise GateError("The model has no gates. Edit it with memory: gated.")
    decision, folder = gate_of(next(iter(found.values()))).decision, Path(folder)
    gates = {name: gate_of(module) for name, module in found.items()}
    n_full = len(next(iter(gates.values())).full)
    about = {
        "format": _FORMATS[n_full > 0],
        "full": str(n_full),
        "threshold": repr(decision.threshold),
        "layers": json.dumps(list(found)),
        "unedited": digest_of(found),
    }
    tensors = {f"{name}.weight": gate.weight.contiguous() for name, gate in gates.items()}
    for name, gate in gates.items():
        tensors |= {f"{name}.shard_{number}": W.contiguous() for number, W in enumerate(gate.full)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"factors": decision.factors.contiguous(), **tensors}, folder / _FILE, about)
    source = Path(__file__).read_text(encoding="utf-8")
    source = _OWN_IMPORT.sub("class GateError(RuntimeError):\\n    ...", source)
    (folder / "gate.py").write_text(source, encoding="utf-8")


def load_edited(model: nn.Module, folder: str | Path) -> None:
    """Put gates that `save_edited` wrote on the unedited model that they were made with.

    Raises:
        GateError: the folder holds none, or they are another model's.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise GateError(f"There is no {path}. Give a folder that edits behind gates were saved in.")
    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        if about.get("format") not in _FORMATS:
            raise GateError(
                f"{path} has format {about.get('format')}, not {_FORMATS[-1]}. Get a newer gate.py."
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    known, names = dict(model.named_modules()), json.loads(about["layers"])
    found = {name: known[name] for name in names if name in known}
    if len(found) < len(names) or digest_of(found) != about["unedited"]:
        raise GateError(
            f"{path} was made with another model, or with this one in another type. Load the unedited model "
            "as it was when it was edited."
        )
    remove_gates(model)
    modules = [known[name] for name in names]
    decision = put_gates(modules)
    decision.factors = tensors["factors"].to(modules[0].weight.device)
    decision.threshold = float(about["threshold"])
    for name, module in zip(names, modules):
        gate_of(module).weight.data.copy_(tensors[f"{name}.weight"])
        gate_of(module).full = [tensors[f"{name}.shard_{i}"] for i in range(int(about.get("full", 0)))]


def gated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Projections with a gate by name, the gate's layer first."""
    return {name: module for name, module in model.named_modules() if has_gate(module)}


def digest_of(projections: Mapping[str, nn.Module]) -> str:
    """SHA-256 over evenly spaced values of the projections' own weights."""
    digest = hashlib.sha256()
    for name, module in projections.items():
        weight: Any = module.weight
        values = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLES)]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(values.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()
