"""MEMOIR (Wang et al. 2025, arXiv 2506.07899): edits stand in a memory beside one projection, reached through
masks (`model.masked_memory`), and are learned by gradient descent, one after the other.

A fact's texts are its prompt bare and behind each context template. All of them go through the mask of the
bare prompt, in one pass; only the layers from the memory's on are run again in each step. The loss is the
mean over texts of the mean NLL of the target's tokens. Weight decay acts on all of W_m: older edits shrink.

Where this differs from the published code: the permutation is kept with the memory; a target is tokenized as
everywhere in this package; the loss of a text is divided by its target's tokens, there by all places behind
its prompt, padding included (`loss: published` does so).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from easyedit_rls._base.settings import read_settings, setting
from easyedit_rls.anchors.text import token_blocks
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import Editor, Setup, register_editor
from easyedit_rls.errors import GateError, HyperParamsError, LayoutError, NumericalError, StateMismatchError
from easyedit_rls.model.attached_memory import find_memory_of, put_memory
from easyedit_rls.model.batching import device_of, logits_at, pad, run
from easyedit_rls.model.hooks import form_of, hidden_of, record_outputs, skip_layers, tap, undisturbed
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.masked_memory import MaskedMemory, prompt_means
from easyedit_rls.model.subject import Row, answer_rows
from easyedit_rls.model.tokens import start_tokens
from easyedit_rls.model.weights import refuse_unsound

_PROMPT_TOKENS = 16  # of a text that has nothing to do with edits
_SHARE = 2 / 7  # of a projection's inputs that are active: 4,096 of 14,336


@dataclass(kw_only=True)
class MEMOIRSettings:
    """Settings of MEMOIR, named as in the published code."""

    layer: int | None = setting(
        "Layer beside whose MLP the memory stands; None takes the one as far up as layer 27 of 32.",
        None,
        test=lambda value: value is None or (type(value) is int and value >= 0),
        allowed="a layer number from 0, or null",
    )
    top_k: int | None = setting(
        "Active inputs of a mask; None takes 2 of 7, as 4,096 of Llama 3's 14,336.",
        None,
        test=lambda value: value is None or (type(value) is int and value > 0),
        allowed="a number above 0, or null",
    )
    irr_threshold: float = setting(
        "Share of active inputs that a prompt's mask must have in common with an edit's.",
        0.4,
        least=0,
        most=1,
    )
    edit_lr: float = setting("Learning rate.", 1.0, above=0)
    n_iter: int = setting("Steps a fact, at most.", 30, least=1)
    weight_decay: float = setting("Weight decay, on the whole memory.", 1e-5, least=0)
    max_norm: float = setting("Norm that a step's gradient is cut to.", 1.0, above=0)
    stop_loss: float = setting("A fact is done when its loss is at most this,", 0.02, least=0)
    stop_change: float = setting("and changed by at most this.", 1e-4, least=0)
    n_background: int = setting("Texts that the background's features are the mean of.", 100, least=1)
    loss: str = setting(
        "What a text's loss is divided by: 'mean', its target's tokens; 'published', all places behind its "
        "prompt, padding included.",
        "mean",
        choices=["mean", "published"],
    )


@register_editor("MEMOIR")
class MEMOIR(Editor):
    """A memory behind masks, trained on one fact at a time. Editing again does not replace, and nothing can
    be taken back.

    Args:
        setup: its settings are `MEMOIRSettings`; templates are its own, the seed is that of its hparams.
        masked: the memory that the model has already, to go on with; None puts an empty one on.

    Attributes:
        masked: the memory.

    Raises:
        HyperParamsError: a setting is unknown or out of range.
        LayoutError: the model has no such layer, or a weight is offloaded.
        NumericalError: a weight is not finite.
        AnchorError: there is no text for the background.
        GateError: the model has a memory with edits, which was not given.
        StateMismatchError: the memory that was given stands elsewhere, or has other settings.
    """

    def __init__(self, setup: Setup, masked: MaskedMemory | None = None) -> None:
        self.settings = read_settings(MEMOIRSettings, setup.settings, "editor MEMOIR")
        self.model, self.tok, self._templates = setup.model, setup.tok, list(setup.templates)
        hp = setup.hparams
        self._number = (
            (hp.v_loss_layer + 1) * 27 // 32 if self.settings.layer is None else self.settings.layer
        )
        try:
            self._layers = [
                setup.model.get_submodule(hp.layer_module_tmp.format(n)) for n in range(self._number + 1)
            ]
            self._projection = setup.model.get_submodule(hp.rewrite_module_tmp.format(self._number))
        except AttributeError as exc:
            raise LayoutError(f"MEMOIR: the model has no layer {self._number}: {exc}. Set layer.") from exc
        weight: Any = self._projection.weight
        d_k = weight.shape[1 if isinstance(self._projection, torch.nn.Linear) else 0]
        top_k = round(_SHARE * d_k) if self.settings.top_k is None else self.settings.top_k
        if top_k > d_k:
            raise HyperParamsError(
                f"MEMOIR: top_k is {top_k}; allowed: up to {d_k}, the projection's inputs."
            )
        if masked is not None:
            self.masked = masked
            self._refuse_other(masked, top_k)
            return
        refuse_unsound(self.model)
        order = torch.Generator().manual_seed(hp.seed)
        with undisturbed(self.model):
            self.masked = put_memory(
                setup.model,
                self._projection,
                permutation=torch.randperm(d_k, generator=order),
                background=self._background(hp),
                top_k=top_k,
                threshold=self.settings.irr_threshold,
            )

    def _refuse_other(self, masked: MaskedMemory, top_k: int) -> None:
        """See that a memory is the one that these settings would make."""
        is_there = find_memory_of(self._projection) == ("", masked)
        if not is_there or (masked.top_k, masked.threshold) != (top_k, self.settings.irr_threshold):
            raise StateMismatchError(
                f"The model's memory has top_k {masked.top_k} and irr_threshold {masked.threshold}, or "
                "stands elsewhere. Give the settings that it was made with."
            )

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that these are settings of this editor."""
        read_settings(MEMOIRSettings, settings, "editor MEMOIR")

    @classmethod
    def begin(cls, setup: Setup) -> "MEMOIR":
        """The editor with an empty memory."""
        return cls(setup)

    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Learn a batch, fact by fact; all of it, or nothing.

        Raises:
            RequestError: a target has no token of its own, or a text is longer than the model's positions.
            NumericalError: a loss or W_m is not finite.
            StateMismatchError: somebody else changed W_m.
            GateError: the memory was taken off.
        """
        known = find_memory_of(self.model)
        if known is None or known[1] is not self.masked:
            raise GateError("The memory was taken off the model. Make a new editor of it.")
        texts = [self._rows(request, index) for index, request in enumerate(requests)]
        if not texts:
            return
        with undisturbed(self.model), self.masked.batch():
            for rows in texts:
                self._learn(rows)

    def describe(self) -> dict[str, Any]:
        """All settings, layer and top_k as they are used."""
        return asdict(self.settings) | {"layer": self._number, "top_k": self.masked.top_k}

    def memory(self) -> dict[str, Tensor]:
        """W_m, masks, permutation and background."""
        return self.masked.tensors()

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Put those back."""
        if memory:
            self.masked.take(memory)
        return True

    def _rows(self, request: EditRequest, index: int) -> list[Row]:
        """A fact's texts, the bare prompt first."""
        probes = [request.probe(front + request.prompt, request.target) for front in ("", *self._templates)]
        rows = answer_rows(self.tok, probes, [index] * len(probes))
        refuse_unfit(self.model, self.tok, [row.ids for row in rows], [index] * len(rows))
        return rows

    def _learn(self, rows: Sequence[Row]) -> None:
        """Train W_m on one fact, through the mask of its bare prompt."""
        memory, device = self.masked, device_of(self.model)
        mask = memory.masks_of(self.features([rows[0].ids[: rows[0].target_start]]))[0]
        batch = pad([row.ids[:-1] for row in rows], "right", device)
        lower = self._layers[:-1]
        hidden, forms = self._below(batch)
        places = [(r, row.target_start - 1 + k) for r, row in enumerate(rows) for k in range(len(row.target))]
        tokens = torch.tensor([token for row in rows for token in row.target], device=device)
        shares = self._shares(rows, batch.ids.shape[1]).to(device)
        memory.forced = mask
        memory.weight.requires_grad_(True)
        optimizer = torch.optim.SGD(
            [memory.weight], self.settings.edit_lr, weight_decay=self.settings.weight_decay
        )
        before, last = 0.0, 1e9
        try:
            for _ in range(self.settings.n_iter):
                with torch.enable_grad(), skip_layers(lower, forms, hidden):
                    logits = logits_at(self.model, batch, places)
                    loss = (F.cross_entropy(logits.float(), tokens, reduction="none") * shares).sum()
                    if not torch.isfinite(loss):
                        raise NumericalError("MEMOIR: the loss is not finite. Lower edit_lr.")
                    if abs(last - before) <= self.settings.stop_change and last <= self.settings.stop_loss:
                        break
                    (memory.weight.grad,) = torch.autograd.grad(loss, [memory.weight])
                torch.nn.utils.clip_grad_norm_([memory.weight], self.settings.max_norm)
                optimizer.step()
                before, last = last, float(loss)
        finally:
            memory.weight.requires_grad_(False)
            memory.weight.grad = None
            memory.forced = None
        if not torch.isfinite(memory.weight).all():
            raise NumericalError("MEMOIR: the memory's weight is not finite. Lower edit_lr.")
        memory.masks = torch.cat([memory.masks, mask[None]])

    def _shares(self, rows: Sequence[Row], width: int) -> Tensor:
        """How much each target token's NLL counts, (tokens,)."""
        shares = []
        for row in rows:
            n = len(row.target)
            if self.settings.loss == "published":
                n = width - max(0, row.target_start - 2)
            shares += [1 / n / len(rows)] * len(row.target)
        return torch.tensor(shares)

    def _below(self, batch: Any) -> tuple[Tensor | None, list[Any]]:
        """What comes to the memory's layer, and the forms of the layers' outputs below it."""
        if self._number == 0:
            return None, []
        with record_outputs(self._layers[:-1]) as outputs, tap(outputs={0: self._layers[-2]}, stop=True):
            run(self.model, batch)
        return hidden_of(outputs[-1]), [form_of(output) for output in outputs]

    def features(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """f of prompts, (n, d_k)."""
        return self._means(prompts) - self.masked.background

    def _means(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Mean key of each prompt's tokens, (n, d_k), float32."""
        batch = pad(prompts, "right", device_of(self.model))
        with tap(inputs={0: self._projection}, stop=True) as seen:
            run(self.model, batch)
        return prompt_means(seen[0].reshape(*batch.ids.shape, -1), batch.mask.bool())

    def _background(self, hp: RLSEditHyperParams) -> Tensor:
        """Mean of the features of texts that have nothing to do with edits, (d_k,)."""
        n = self.settings.n_background
        settings = RLSEditHyperParams.from_dict({**hp.to_dict(), "mom2_n_samples": n})
        rows = list(chain.from_iterable(token_blocks(self.model, self.tok, settings)))[:n]
        length = _PROMPT_TOKENS + len(start_tokens(self.tok))
        return torch.cat([self._means([row[:length]]) for row in rows]).mean(0)
