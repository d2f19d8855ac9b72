"""Where models and passes lie: memory that runs out, layers behind accelerate's hooks, weights that are not
there.
"""

import pytest
import torch
from accelerate import dispatch_model

from easyedit_rls import LayoutError, RLSEditor, RLSEditWarning
from tests.conftest import tiny_llama, tiny_settings


def short_of_memory(model, most, passes):
    """The model's first layer fails as a device does, on passes of more than `most` tokens."""

    def look(module, args):
        tokens = args[0].shape[0] * args[0].shape[1]
        passes.append(tokens)
        if tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return model.model.layers[0].register_forward_pre_hook(look)


def edited(model, tok, requests, **changes):
    RLSEditor(model, tok, tiny_settings("llama", mom2_adjustment=False, **changes)).edit(requests)
    return model.state_dict()


def test_passes_shrink_until_they_fit_with_one_warning(tok, requests):
    model, passes = tiny_llama(), []
    handle = short_of_memory(model, 70, passes)
    editor = RLSEditor(model, tok, tiny_settings("llama", mom2_adjustment=False, batch_tokens=1000))
    with pytest.warns(
        RLSEditWarning, match=r"passes of 1000 tokens; they have 62 now. Set batch_tokens: 62"
    ) as caught:
        editor.edit(requests)
    assert len([warning for warning in caught if warning.category is RLSEditWarning]) == 1
    n_passes = len(passes)
    editor.edit([{"prompt": "Sailors know {}", "subject": "the Oder", "target_new": "people"}])
    assert max(passes[n_passes:]) <= 62  # it is not tried again
    handle.remove()
    fresh = tiny_llama()
    again = RLSEditor(fresh, tok, tiny_settings("llama", mom2_adjustment=False, batch_tokens=62))
    again.edit(requests)
    again.edit([{"prompt": "Sailors know {}", "subject": "the Oder", "target_new": "people"}])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_a_pass_that_never_fits_fails_and_leaves_the_model_as_it_was(tok, requests):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    short_of_memory(model, 3, [])
    with pytest.raises(torch.OutOfMemoryError):
        edited(model, tok, requests)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_behind_accelerates_hooks_are_edited_alike(tok, requests):
    """What device_map sets up: a hook on every part that moves what comes in to where the part lies."""
    parts = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    model = dispatch_model(tiny_llama(), dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    own = [layer.forward for layer in model.model.layers]
    found = edited(model, tok, requests)
    assert [layer.forward for layer in model.model.layers] == own
    assert all(torch.equal(value, found[name]) for name, value in edited(tiny_llama(), tok, requests).items())


def test_offloaded_weights_are_refused(tok, requests):
    model = tiny_llama()
    model.model.layers[3].to("meta")
    with pytest.raises(LayoutError, match=r"model.layers.3.* is offloaded"):
        edited(model, tok, requests)
