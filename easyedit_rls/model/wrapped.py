"""Models in a wrapping which edits can't reach through: adapters, compiled and parallel ones. Told by
structure.
"""

from torch import nn
from transformers import PreTrainedModel

from easyedit_rls.errors import LayoutError


def refuse_wrapped(model: nn.Module) -> None:
    """See that a model is a plain one of transformers, whose modules run as they stand there.

    Raises:
        LayoutError: it is wrapped or something within it is; says by what, and how to take it off.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise LayoutError(f"{kind} is no model of transformers. Load it with AutoModelForCausalLM.")
    if "_orig_mod" in model._modules:
        raise LayoutError(
            f"The model is wrapped by torch.compile ({kind}), which runs code of its own. "
            "Hand over model._orig_mod."
        )
    for name, module in model.named_modules():
        where = name or "the model"
        if hasattr(module, "base_layer"):
            raise LayoutError(
                f"{name} carries an adapter ({type(module).__name__}). "
                "Merge it into the model first: model = model.merge_and_unload()."
            )
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise LayoutError(
                f"{where[0].upper()}{where[1:]} is compiled (torch.compile), "
                "so that hooks on its modules are not "
                "seen. Load the model anew, and compile it after editing."
            )
    if isinstance(model, PreTrainedModel):
        return
    if hasattr(model, "peft_config"):
        raise LayoutError(
            f"The model is wrapped by an adapter ({kind}). Hand over the model in it: model.get_base_model()."
        )
    if isinstance(model._modules.get("module"), nn.Module):
        raise LayoutError(
            f"The model is wrapped ({kind}), so its modules have other names. Hand over model.module."
        )
    raise LayoutError(f"{kind} is no model of transformers. Load it with AutoModelForCausalLM.")
