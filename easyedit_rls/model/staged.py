"""Rows of tokens that go up through the layers in stages: what lies below is not run again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from easyedit_rls.model.batching import Batch, run
from easyedit_rls.model.gated_weight import find_decision
from easyedit_rls.model.hooks import form_of, hidden_of, record_outputs, skip_layers, tap
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.prefix_cache import SharedPrefixes


@dataclass
class _Stage:
    """How far a batch has come.

    Attributes:
        batch: its tokens.
        level: layers whose output is known for good.
        forms: what these layers return beside the hidden states.
        hidden: output of the last of them, (rows, length, d); None at level 0.
        is_open: which tokens the gate lets through, where there is one, (rows, length).
    """

    batch: Batch
    level: int = 0
    forms: list[Any] = field(default_factory=list)
    hidden: Tensor | None = None
    is_open: Tensor | None = None


class StagedRows:
    """Rows of tokens on their way up through the layers; what several begin with runs once.

    Args:
        model: the model.
        layout: its modules.
        rows: token ids.
        batch_tokens: tokens in one pass, at most.
    """

    def __init__(
        self, model: PreTrainedModel, layout: Layout, rows: Sequence[Sequence[int]], batch_tokens: int
    ) -> None:
        self._model, self._layers, self._n_rows = model, layout.lower_layers, len(rows)
        self._gate = find_decision(layout)
        # through all layers, since a model may ask any of them for the length
        self._prefixes = SharedPrefixes(model, rows, batch_tokens, layout.loss_layer, n_own=1)
        self._stages = [_Stage(group.batch) for group in self._prefixes.groups]
        self._common = None if self._prefixes.texts is None else _Stage(self._prefixes.texts)

    def last_states(self, module: nn.Module, is_input: bool, level: int) -> Tensor:
        """Input or output of a module at each row's last token, (rows, width), float32.

        Args:
            module: runs at `level` or above.
            is_input: which of both.
            level: the layers below this one must not change any more; their states are kept.
        """
        wanted = {"inputs" if is_input else "outputs": {"state": module}}
        if self._common is not None:
            cache, below = DynamicCache(config=self._model.config), self._common.level
            self._run(self._common, wanted, level, cache)
            known = self._prefixes.cache.layers
            known[below:] = [
                new if new.is_initialized else old for new, old in zip(cache.layers[below:], known[below:])
            ]
        states: list[Tensor | None] = [None] * self._n_rows
        for group, stage in zip(self._prefixes.groups, self._stages):
            ends = self._run(stage, wanted, level, self._prefixes.cache_of(group))[:, -1].float()
            for i, state in zip(group.rows, ends):
                states[i] = state
        return torch.stack(states)  # type: ignore[arg-type]

    def _run(self, stage: _Stage, wanted: dict[str, Any], level: int, cache: DynamicCache | None) -> Tensor:
        """What the wanted module sees, (rows, length, width); the batch goes up to `level`."""
        if self._gate is not None and stage.is_open is not None:
            self._gate.hold(stage.is_open)  # the gate's layer may lie below the ones that are run
        below, between = self._layers[: stage.level], self._layers[stage.level : level]
        with (
            torch.no_grad(),
            skip_layers(below, stage.forms, stage.hidden),
            record_outputs(between) as outputs,
            tap(**wanted, stop=True) as seen,
        ):
            run(self._model, stage.batch, cache=cache, use_cache=cache is not None)
        if self._gate is not None:
            stage.is_open = self._gate.open
        if between:
            stage.level, stage.hidden = level, hidden_of(outputs[-1])
            stage.forms = stage.forms + [form_of(output) for output in outputs]
        # some models flatten rows and tokens before the MLP
        return seen["state"].reshape(*stage.batch.ids.shape, -1)
