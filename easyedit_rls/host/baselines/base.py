"""What all of EasyEdit's editors share: settings made of RLSEdit's, a request's shape, padding, moments, and
what their modules remember.
"""

import contextlib
import importlib
import io
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import Editor, Setup
from easyedit_rls.errors import HyperParamsError, RequestError
from easyedit_rls.host.find import easyeditor, settings_fields
from easyedit_rls.host.moments import write_moments

# names the folder that EasyEdit looks for moments in; what the text is, our settings say
DATASET = "wikitext"
MODULES = (
    "rewrite_module_tmp",
    "layer_module_tmp",
    "mlp_module_tmp",
    "attn_module_tmp",
    "ln_f_module",
    "lm_head_module",
)
_PLACES = ("stats_dir", "P_loc")


class EasyEditBaseline(Editor):
    """One of EasyEdit's editors as a function of a batch.

    What such an editor keeps in globals of its modules is put there for a batch and taken out behind it, so
    editors of several models may live in one process. Random numbers come from RLSEdit's seed and the number
    of the batch; the caller's stay as they are.

    Attributes:
        alg_name: EasyEdit's name.
        settings_class: module under `easyeditor.models`, and class, of its settings.
        takes_batches: whether it edits several requests at once; else one by one.
        needs_moments: whether it reads second moments.
        padding: side that its tokenizer pads on.
        settings: EasyEdit's settings object.
        state: module under `easyeditor.models` -> globals.
        n_batches: edited so far.

    Raises:
        HostError: there is no checkout, or it is another version.
        HyperParamsError: see `check`.
    """

    needs_host = True
    alg_name: ClassVar[str]
    settings_class: ClassVar[tuple[str, str]]
    takes_batches: ClassVar[bool] = True
    needs_moments: ClassVar[bool] = False
    padding: ClassVar[str] = "right"

    def __init__(self, setup: Setup) -> None:
        self.check(setup.settings, setup.hparams)
        easyeditor()
        self.model, self.tok, self.hparams, self.n_batches = setup.model, setup.tok, setup.hparams, 0
        self._folder = tempfile.TemporaryDirectory()
        hp = RLSEditHyperParams.from_dict({**setup.hparams.to_dict(), "stats_dir": self._folder.name})
        module, name = self.settings_class
        known = getattr(importlib.import_module(f"easyeditor.models.{module}"), name)
        made = self.complete({**self._general(hp), **self.defaults(hp), **setup.settings})
        names = {field.name for field in fields(known)}
        self.settings = known(**{key: value for key, value in made.items() if key in names})
        self._apply = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT[self.alg_name]
        if self.needs_moments:
            write_moments(self.model, self.tok, hp, dataset=DATASET)
        fronts = [text.replace("{", " ").replace("}", " ") + "{}" for text in setup.templates]
        self.state = self.globals(fronts)
        with self._as_they_want_it():
            self.prepare()

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that these are settings of this editor; where there is no EasyEdit, only those that are made of
        RLSEdit's can be told.

        Raises:
            HyperParamsError: one is unknown or of another kind.
        """
        names, made = settings_fields(*cls.settings_class), cls.defaults(hparams)
        if names is not None and (unknown := sorted(set(settings) - names)):
            raise HyperParamsError(
                f"{cls.alg_name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(names))}."
            )
        for name, value in settings.items():
            kind = _kind(made.get(name))
            if kind and _kind(value) != kind:
                raise HyperParamsError(f"{cls.alg_name}: {name} is {value!r}. Give {kind}.")

    @classmethod
    def begin(cls, setup: Setup) -> "EasyEditBaseline":
        """The editor before its first batch."""
        return cls(setup)

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """The editor's settings, made of RLSEdit's."""
        raise NotImplementedError

    def complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All settings, in the form that this model needs."""
        return settings

    def globals(self, fronts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What its modules' globals shall be before the first batch: module -> name -> value.

        Args:
            fronts: context templates, `{}` at their end, besides the bare prompt's.
        """
        return {}

    def prepare(self) -> None:
        """Do what comes before the first batch."""

    def describe(self) -> dict[str, Any]:
        """The settings, but for the temporary places of moments and projection."""
        return {name: value for name, value in vars(self.settings).items() if name not in _PLACES}

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Put back what `memory` gave; the number of batches seeds what is random in the next one."""
        self.n_batches = n_batches
        return True

    def close(self) -> None:
        """Remove the files that EasyEdit was given."""
        self._folder.cleanup()

    def edit(self, requests: Sequence[EditRequest]) -> str:
        """Edit one batch; returns what EasyEdit printed.

        Raises:
            RequestError: a request is a chat.
        """
        given = [self.request(request, i) for i, request in enumerate(requests)]
        with self._as_they_want_it() as printed:
            for some in [given] if self.takes_batches else [[one] for one in given]:
                self.apply(some)
        self.n_batches += 1
        return printed.getvalue()

    def apply(self, requests: Sequence[dict[str, Any]]) -> Any:
        """Let EasyEdit edit requests."""
        return self._apply(self.model, self.tok, requests, self.settings)

    def request(self, request: EditRequest, index: int) -> dict[str, Any]:
        """A request in EasyEdit's shape."""
        if request.chat is not None:
            raise RequestError(
                "is a chat, which EasyEdit's editors don't know. Give a plain prompt.",
                index=index,
                field="messages",
            )
        return {
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": request.target,
            "case_id": request.case_id if request.case_id is not None else index,
        }

    def _general(self, hp: RLSEditHyperParams) -> dict[str, Any]:
        name = (self.model.config._name_or_path or hp.model_name).rstrip("/").rsplit("/")[-1]
        return {
            "alg_name": self.alg_name,
            "device": "cpu" if self.model.device.type == "cpu" else self.model.device.index,
            # some look for a family in the name, and all these do for one like it what is right for any
            "model_name": f"{name}-llama",
            "mom2_dataset": DATASET,
            "model_parallel": False,
        }

    @contextlib.contextmanager
    def _as_they_want_it(self) -> Iterator[io.StringIO]:
        """Their globals, padding and random numbers, and their words caught; all is put back."""
        side, pad = self.tok.padding_side, self.tok.pad_token
        device = [self.model.device] if self.model.device.type == "cuda" else []
        seed, states = self.hparams.seed + self.n_batches, (np.random.get_state(), random.getstate())
        theirs = {name: vars(importlib.import_module(f"easyeditor.models.{name}")) for name in self.state}
        before = {name: dict(values) for name, values in theirs.items()}
        printed = io.StringIO()
        try:
            self.tok.padding_side, self.tok.pad_token = self.padding, pad or self.tok.eos_token
            for name, values in self.state.items():
                theirs[name].update(values)
            with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=device):
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
                yield printed
        finally:
            for name, values in self.state.items():
                for key in values:
                    values[key] = theirs[name].pop(key)
                theirs[name].update({key: before[name][key] for key in values if key in before[name]})
            self.tok.padding_side, self.tok.pad_token = side, pad
            np.random.set_state(states[0])
            random.setstate(states[1])


def some(hp: RLSEditHyperParams, *names: str) -> dict[str, Any]:
    """Some of RLSEdit's settings."""
    return {name: getattr(hp, name) for name in names}


def owner_of_head(model: PreTrainedModel, lm_head: str) -> str:
    """The module under which the head's weight is found by name (MEMIT looks there): of a tied head, the
    embedding.
    """
    weight = model.get_submodule(lm_head).weight
    owner: str = next(name for name, parameter in model.named_parameters() if parameter is weight)
    return owner.removesuffix(".weight")


def _kind(value: Any) -> str:
    """What a value is, for messages; empty where anything may stand."""
    kinds: dict[str, Any] = {"a number": Real, "a list": (list, tuple), "a text": str}
    if isinstance(value, bool):
        return ""
    return next((kind for kind, types in kinds.items() if isinstance(value, types)), "")
