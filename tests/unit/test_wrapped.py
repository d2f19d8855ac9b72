"""Models that come wrapped are refused with what they are and how to take that off; plain ones are not."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from easyedit_rls import RLSEditHyperParams
from easyedit_rls.errors import LayoutError
from easyedit_rls.model.discovery import read_structure
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.wrapped import refuse_wrapped
from tests import zoo
from tests.conftest import tiny_llama, tiny_settings


class StandIn(nn.Module):
    """What peft puts around a linear module."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)


class Integers(nn.Linear):
    """A linear module of torch's dynamic quantization: it keeps its weight out of sight."""

    def __init__(self) -> None:
        super().__init__(48, 32, bias=False)
        del self.weight
        self._packed_params = nn.Module()


class Passing(torch.Tensor):
    """A tensor of integers that passes for floats, as torchao's do."""

    @staticmethod
    def __new__(cls, integers):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers):
        self.integers = integers

    def __tensor_flatten__(self):
        return ["integers"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Passing(inner["integers"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, func
        return Passing(args[0].integers)


def adapted(**lora):
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **lora))


def with_adapter_inside():
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"]), tiny_llama())


def with_stand_in():
    model = tiny_llama()
    attention = model.model.layers[3].self_attn
    attention.q_proj = StandIn(attention.q_proj)
    return model


def compiled_in_place():
    model = tiny_llama()
    model.compile()
    return model


def compiled_layer():
    model = tiny_llama()
    model.model.layers[2] = torch.compile(model.model.layers[2])
    return model


MERGE = r"carries an adapter \(\w+\). Merge it into the model first: model = model.merge_and_unload\(\)"
WRAPPED = {
    "peft": (adapted, rf"layers.0.self_attn.q_proj {MERGE}"),
    "peft's prompts": (lambda: get_peft_model(tiny_llama(),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        r"wrapped by an adapter \(PeftModel\w*\). Hand over the model in it: model.get_base_model\(\)"),
    "inside": (with_adapter_inside, rf"model.layers.0.mlp.down_proj {MERGE}"),
    "stand-in": (with_stand_in, rf"model.layers.3.self_attn.q_proj {MERGE}"),
    "compiled": (lambda: torch.compile(tiny_llama()),
        r"torch.compile \(OptimizedModule\).* Hand over model._orig_mod"),
    "compiled in place": (compiled_in_place,
        r"The model is compiled .* Load the model anew, and compile it after editing"),
    "compiled layer": (compiled_layer, r"Model.layers.2 is compiled"),
    "parallel": (lambda: nn.DataParallel(tiny_llama()), r"wrapped \(DataParallel\).* Hand over model.module"),
    "no model": (lambda: nn.Linear(2, 2),
        r"Linear is no model of transformers. Load it with AutoModelForCausalLM"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models_are_refused(name):
    make, message = WRAPPED[name]
    for use in (
        lambda model: find_layout(model, tiny_settings("llama")),
        read_structure,
        RLSEditHyperParams.for_model,
    ):
        with pytest.raises(LayoutError, match=message):
            use(make())


def test_the_cures_work():
    prompts, _ = WRAPPED["peft's prompts"]
    for model in (
        adapted().merge_and_unload(),
        prompts().get_base_model(),
        torch.compile(tiny_llama())._orig_mod,
        nn.DataParallel(tiny_llama()).module,
    ):
        assert find_layout(model, tiny_settings("llama")).edited


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_plain_models_pass(name):
    refuse_wrapped(zoo.make(name))


@pytest.mark.parametrize("module", [Integers, "passing"])
def test_quantized_weights_that_hide_are_refused(module):
    model = tiny_llama()
    for layer in model.model.layers:
        if module is Integers:
            layer.mlp.down_proj = Integers()
        else:
            layer.mlp.down_proj.weight = nn.Parameter(
                Passing(torch.ones(32, 48, dtype=torch.int8)), requires_grad=False
            )
    with pytest.raises(
        LayoutError, match=r"mlp.down_proj is quantized \(\w+\), and edited weights have to be ordinary"
    ):
        find_layout(model, tiny_settings("llama"))
