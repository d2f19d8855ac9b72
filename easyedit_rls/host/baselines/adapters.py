"""Editors that put modules of their own into the model: LoRA, GRACE, WISE.

EasyEdit hands back a wrapper; what it wraps is the model that it was given, with the new modules inside, so
`model` stays that one. It has parameters then which it hadn't, and LoRA's weights have another name.
"""

import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyedit_rls.anchors.text import shipped_text
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import register_editor
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.host.baselines.base import EasyEditBaseline


@register_editor("LoRA")
class LoRA(EasyEditBaseline):
    """Low-rank adapters on RLSEdit's modules, trained on each batch in turn."""

    alg_name = "LoRA"
    settings_class = ("lora.lora_hparams", "LoRAHyperParams")
    padding = "left"

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """Plain LoRA: peft's AdaLoRA wants to know the number of steps, which EasyEdit doesn't say."""
        own = {"lora_type": "lora", "layers": [], "num_steps": 40, "batch_size": 1, "lr": 1e-3, "rank": 8}
        rest = {"weight_decay": 0.0, "kl_factor": 0.0, "norm_constraint": False}
        modules = [hp.rewrite_module_tmp.format(layer) for layer in hp.layers]
        return {**own, **rest, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": modules}

    def prepare(self) -> None:
        """Put adapters in that change nothing."""
        self._adapted = self.model
        steps, self.settings.num_steps = self.settings.num_steps, 0
        try:
            self.apply([])
        finally:
            self.settings.num_steps = steps

    def apply(self, requests: Sequence[dict[str, Any]]) -> None:
        """Train; the switches that save memory go back to where they were."""
        caches = self.model.config.use_cache
        self._adapted, _ = self._apply(self._adapted, self.tok, requests, self.settings)
        self.model.disable_input_require_grads()
        self.model.gradient_checkpointing_disable()
        self.model.config.use_cache = caches

    def memory(self) -> dict[str, Tensor]:
        """The adapters' weights."""
        return {name: p.detach() for name, p in self.model.named_parameters() if "lora_" in name}

    @torch.no_grad()
    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Put those weights back."""
        for name, weight in memory.items():
            self.model.get_parameter(name).copy_(weight)
        return super().remember(memory, n_batches)


class _Wrapped(EasyEditBaseline):
    """What GRACE and WISE share: one module of a late layer is put into an adapter, one request at a time is
    edited.
    """

    takes_batches = False
    padding = "left"
    package: ClassVar[str]
    place: str

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """The module as far up as EasyEdit has it: layer 27 of 32."""
        return {"inner_params": [hp.rewrite_module_tmp.format((hp.v_loss_layer + 1) * 27 // 32)]}

    def complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        """With the module's name in the form that EasyEdit evaluates: layers[27]."""
        self.place = settings["inner_params"][0].removesuffix(".weight").replace("[", ".").replace("]", "")
        evaluated = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", self.place)
        return {**settings, "inner_params": [f"{evaluated}.weight"]}

    @property
    def adapter(self) -> Any:
        """What stands there."""
        return self.model.get_submodule(self.place)

    def wrap(self) -> Any:
        """Put the adapter in, if it isn't there; EasyEdit's wrapper of the whole model."""
        theirs = importlib.import_module(f"easyeditor.models.{self.package.lower()}.{self.package}")
        return vars(theirs)[self.package](
            model=self.model, config=self.settings, device=torch.device(self.model.device)
        )


@register_editor("GRACE")
class GRACE(_Wrapped):
    """A codebook of values at one module; Hartvigsen et al. 2023, arXiv 2211.11031.

    Its adapter looks at one token, which is the prompt's last in EasyEdit's own loop of generation and would
    be any here. So every token is looked at behind an edit, each by itself: what a token's input is does not
    hang on what follows, and one that no key is near to stays as it is.
    """

    alg_name, package = "GRACE", "GRACE"
    settings_class = ("grace.grace_hparams", "GraceHyperParams")

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """What EasyEdit ships."""
        own = {"edit_lr": 1.0, "n_iter": 50, "eps": 1.0, "dist_fn": "euc", "val_init": "cold", "dropout": 0.0}
        rest = {"val_train": "sgd", "val_reg": "None", "reg": "early_stop", "replacement": "replace_last"}
        return {**super().defaults(hp), **own, **rest, "eps_expand": "coverage", "num_pert": 8}

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that these are settings of this editor, and mean single tokens."""
        super().check(settings, hparams)
        if settings.get("replacement", "replace_last") != "replace_last":
            raise HyperParamsError(f"GRACE: replacement is {settings['replacement']!r}. Give 'replace_last'.")
        if settings.get("n_iter", 2) < 2:
            raise HyperParamsError(f"GRACE: n_iter is {settings['n_iter']}. Give 2 or more.")

    def prepare(self) -> None:
        """Put the adapter in, with an empty codebook."""
        self.wrap()
        self.adapter.register_forward_pre_hook(_apart)
        self.adapter.register_forward_hook(_together)

    def memory(self) -> dict[str, Tensor]:
        """The codebook."""
        book = self.adapter
        if "keys" not in vars(book):
            return {}
        labels = {f"label.{i}": label for i, label in enumerate(book.key_labels)}
        found = {"keys": book.keys, "values": book.values.detach(), "epsilons": book.epsilons.detach()}
        return {**found, **labels}

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Put the codebook back."""
        if memory:
            book, device = self.adapter, self.model.device
            book.keys, book.epsilons = memory["keys"].to(device), memory["epsilons"].to(device)
            book.values = nn.Parameter(memory["values"].to(device))
            book.key_labels = [memory[f"label.{i}"].to(device) for i in range(len(memory) - 3)]
            book.edit_ids, book.iter = [], self.settings.n_iter - 1
        return super().remember(memory, n_batches)


@register_editor("WISE")
class WISE(_Wrapped):
    """A second weight beside one module, and a router between them; Wang et al. 2024, arXiv 2405.14768.

    Its adapter decides for a whole batch, padding included. Behind an edit each text decides for itself here,
    as where EasyEdit measures one prompt after the other.
    """

    alg_name, package = "WISE", "WISE"
    settings_class = ("wise.wise_hparams", "WISEHyperParams")

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """What EasyEdit ships, but for the ratio, 0.88 there: the threshold is a share of what templates and
        padding made larger, and above what a bare prompt reaches.
        """
        own = {"edit_lr": 1.0, "n_iter": 70, "mask_ratio": 0.2, "alpha": 5.0, "beta": 20.0, "gamma": 10.0}
        merge = {"merge_freq": 1000, "save_freq": 500, "merge_alg": "ties", "weights": 1.0, "densities": 0.53}
        rest = {"act_ratio": 0.7, "retrieve": True, "replay": False, "norm_constraint": 1.0}
        goal = {"objective_optimization": "only_label"}
        return {**super().defaults(hp), **own, **merge, **rest, **goal}

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that these are settings of this editor, and keep its memory in the process."""
        super().check(settings, hparams)
        for name in ("save_path", "load_path", "replay"):
            if settings.get(name):
                raise HyperParamsError(f"WISE: {name} is {settings[name]!r}. Leave it out.")

    def complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        """With a name that tells it how the weight lies, which it reads off the model's name."""
        found = super().complete(settings)
        kind = "gpt2" if isinstance(self.model.get_submodule(self.place), Conv1D) else "llama"
        return {**found, "model_name": re.sub("gpt2|llama$", "", found["model_name"]) + kind}

    def globals(self, fronts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Context templates, and a history of none."""
        history: dict[str, Any] = {"edit_history": [], "merge_group_edit_history": []}
        return {"wise.utils": {"CONTEXT_TEMPLATES_CACHE": ["{}", *fronts]}, "wise.WISE": history}

    def prepare(self) -> None:
        """Put the adapter in; further edits are to go into the same one."""
        self.settings.sequential_edit = True
        self._others = [text.split() for text in shipped_text().split("\n\n")]
        self.wrap()
        hook = functools.partial(_keep_mask, name=self.place)
        self.model.register_forward_pre_hook(hook, with_kwargs=True)
        self.adapter.register_forward_hook(_row_by_row)

    def request(self, request: EditRequest, index: int) -> dict[str, Any]:
        """With a text that has nothing to do with it, as long as the prompt at most, for the router."""
        words = self._others[(self.n_batches * 1000 + index) % len(self._others)]
        text = " ".join(words[: len(request.prompt.split())])
        return {**super().request(request, index), "loc_prompt": text}

    def apply(self, requests: Sequence[dict[str, Any]]) -> None:
        """Edit, and keep nothing of the last pass."""
        super().apply(requests)
        self.adapter.new_weight.requires_grad_(False)
        self.adapter.original_layer_output = self.adapter.new_weight_layer_output = None

    def memory(self) -> dict[str, Tensor]:
        """All that the adapter has."""
        own = self.adapter
        acts = [[a.avg, a.count, a.sum, a.min_a] for a in (own.editing_mean_act, *own.memory_mean_act)]
        found = {
            "weight": own.layer.weight,
            "new_weight": own.new_weight,
            "acts": torch.tensor(acts).double(),
        }
        found["counts"] = torch.tensor([own.editing_total_cnt, own.merge_cnt])
        if "weight_mask" in vars(own):
            found["weight_mask"] = own.weight_mask
        return {k: t.detach() for k, t in found.items()} | {
            f"memory.{i}": weight.detach() for i, weight in enumerate(own.memory_weight)
        }

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Put that back."""
        own, device = self.adapter, self.model.device
        found = {name: tensor.to(device) for name, tensor in memory.items()}
        own.layer.weight = nn.Parameter(found["weight"], requires_grad=False)
        own.new_weight = nn.Parameter(found["new_weight"], requires_grad=False)
        own.editing_total_cnt, own.merge_cnt = memory["counts"].tolist()
        own.memory_weight = [found[f"memory.{i}"] for i in range(sum("memory." in name for name in memory))]
        if "weight_mask" in found:
            own.weight_mask = found["weight_mask"]
        kept = []
        for values in memory["acts"].tolist():
            kept.append(type(own.editing_mean_act)())
            kept[-1].avg, kept[-1].count, kept[-1].sum, kept[-1].min_a = values
        own.editing_mean_act, own.memory_mean_act = kept[0], kept[1:]
        return super().remember(memory, n_batches)


def _apart(adapter: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """Each token a row of its own."""
    if adapter.training:
        return None
    adapter.shape = args[0].shape[:-1]
    return (args[0].reshape(-1, 1, args[0].shape[-1]),)


def _together(adapter: Any, args: tuple[Tensor], output: Tensor) -> Tensor | None:
    """And back."""
    return None if adapter.training else output.reshape(*adapter.shape, -1)


def _keep_mask(model: nn.Module, args: Any, kwargs: Mapping[str, Any], name: str) -> None:
    """Tell the adapter which tokens are padding.

    Raises:
        ValueError: several texts share a row, which could not decide for themselves.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError("WISE takes one text a row, with a mask of padding.")
    vars(model.get_submodule(name))["mask"] = mask


def _row_by_row(adapter: Any, args: tuple[Tensor], output: Tensor) -> Tensor | None:
    """What the adapter gives each row's own tokens."""
    mask = vars(adapter)["mask"]
    if adapter.editing:
        return None
    out, n_tokens = output.clone(), args[0].shape[1]
    for i, row in enumerate(args[0]):
        real = slice(None) if mask is None else mask[i, -n_tokens:].bool()
        out[i, real] = adapter.forward(row[real][None])[0]
    return out
