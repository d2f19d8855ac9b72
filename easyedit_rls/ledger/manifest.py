"""Whose state a ledger holds, and what is different about a model or settings that it does not fit."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from easyedit_rls.anchors.pairs import AnchorPairs
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import LedgerError
from easyedit_rls.ledger.journal import FORMAT
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.weights import fingerprint
from easyedit_rls.solvers.rule import Rule, find_rule

_INFORMATION = ("format", "created", "version", "model", "templates", "settings")  # not compared
_ADDED_LATER = (
    "nullspace_weight",
    "nullspace_threshold",
    "keys",
    "solver",
    "solver_settings",
)  # settings whose defaults are what there was before them
_USED_ONCE = (
    "n_templates",
    "mom2_tolerance",
)  # only before the first edit: no matter to a ledger that does not know them


@dataclass(frozen=True)
class Manifest:
    """Identity of a ledger.

    Attributes:
        format: of the ledger's files.
        created: when, ISO 8601, UTC.
        version: of this package.
        model: name or folder that the model was loaded from; for people, never compared.
        architecture: class of the model.
        dtype: of the edited weights.
        rest: `fingerprint` of all parameters but the edited ones.
        modules: layer -> class of the edited module.
        parameters: layer -> full name of the edited parameter.
        widths: layer -> [d_k, d_v].
        objective: the settings that define the least-squares problem.
        anchors: 'moments', 'none', or what explicit anchors hash to.
        templates: context templates of keys and values.
        settings: all settings at the first batch; for people, never compared.
    """

    format: int
    created: str
    version: str
    model: str
    architecture: str
    dtype: str
    rest: str
    modules: dict[str, str]
    parameters: dict[str, str]
    widths: dict[str, list[int]]
    objective: dict[str, Any]
    anchors: str
    templates: list[str]
    settings: dict[str, Any]

    def encode(self) -> bytes:
        """As a JSON file."""
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def decode(cls, content: bytes, where: str) -> "Manifest":
        """The manifest that `encode` gave.

        Raises:
            LedgerError: it was written by a later version of the package.
        """
        values = json.loads(content)
        if not 1 <= int(values["format"]) <= FORMAT:
            raise LedgerError(
                f"{where} has format {values['format']}; this version reads up to {FORMAT}. "
                "Use the package that wrote it."
            )
        missing = sorted({f.name for f in fields(cls)} - values.keys())
        if missing:
            day = str(values.get("created"))[:10]
            raise LedgerError(
                f"{where} was written by version {values.get('version')} of the package on {day}, "
                "before it was settled "
                f"what a manifest says (it lacks {', '.join(missing)}). Use the package that wrote it."
            )
        before = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory()
            for f in fields(RLSEditHyperParams)
            if f.name in _ADDED_LATER
        }
        objective = _renamed({**before, **values["objective"]})
        return cls(**{f.name: values[f.name] for f in fields(cls)} | {"objective": objective})

    @property
    def rule(self) -> Rule:
        """The update rule of the ledger.

        Raises:
            HyperParamsError: nobody has it here; it may come with another package.
        """
        return find_rule(self.objective["solver"], self.objective["solver_settings"])

    def differences(self, other: "Manifest") -> list[str]:
        """Everything in which another model or other settings differ, one text each."""
        found = []
        mine, theirs = _flat(self), _flat(other)
        for key in sorted((mine.keys() | theirs.keys()) - {name for name in _USED_ONCE if name not in mine}):
            if mine.get(key) != theirs.get(key):
                found.append(f"{key}: the ledger has {mine.get(key)!r}, here it is {theirs.get(key)!r}")
        return found


def describe(
    model: PreTrainedModel,
    layout: Layout,
    hparams: RLSEditHyperParams,
    anchors: str,
    templates: Sequence[str],
    time: str,
    version: str,
) -> Manifest:
    """The manifest of a model under these settings."""
    edited = layout.edited
    return Manifest(
        format=FORMAT,
        created=time,
        version=version,
        model=str(getattr(model.config, "_name_or_path", "")),
        architecture=type(model).__name__,
        dtype=str(next(iter(edited.values())).parameter.dtype).removeprefix("torch."),
        rest=fingerprint(model, leave_out={weight.parameter_name for weight in edited.values()}),
        modules={str(layer): type(weight.module).__name__ for layer, weight in edited.items()},
        parameters={str(layer): weight.parameter_name for layer, weight in edited.items()},
        widths={str(layer): list(weight.shape) for layer, weight in edited.items()},
        objective=json.loads(
            json.dumps({key: value for key, value in hparams.objective().items() if key != "stats_dir"})
        ),
        anchors=anchors,
        templates=list(templates),
        settings=json.loads(json.dumps(hparams.to_dict(), default=str)),
    )


def describe_anchors(anchors: AnchorPairs | Sequence[str] | None, hparams: RLSEditHyperParams) -> str:
    """What stands for the anchors in a manifest."""
    if anchors is None:
        return "moments" if hparams.mom2_adjustment and hparams.mu_reg > 0 else "none"
    digest = hashlib.sha256()
    if isinstance(anchors, AnchorPairs):
        for kind, tensors in (("keys", anchors.keys), ("values", anchors.values)):
            for layer, tensor in sorted(tensors.items()):
                digest.update(f"{kind} {layer} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return f"pairs {digest.hexdigest()[:16]}"
    digest.update(json.dumps(list(anchors)).encode())
    return f"prompts {digest.hexdigest()[:16]}"


def _renamed(objective: Mapping[str, Any]) -> dict[str, Any]:
    """An objective in today's words: forgetting had two settings of its own before it was a solver."""
    now = dict(objective)
    factor, memory = now.pop("forgetting_factor", 1.0), now.pop("forgetting_memory", 1000.0)
    if factor != 1:
        now |= {"solver": "forgetting", "solver_settings": {"factor": factor, "memory": memory}}
    return now


def _flat(manifest: Manifest) -> dict[str, Any]:
    """What counts, one key each; settings by their own names."""
    values: dict[str, Any] = {}
    for name, value in asdict(manifest).items():
        if name in _INFORMATION:
            continue
        if isinstance(value, Mapping):
            prefix = "" if name == "objective" else f"{name} of layer "
            values |= {f"{prefix}{key}": item for key, item in value.items()}
        else:
            values[name if name != "rest" else "fingerprint of the weights that are not edited"] = value
    return values
