"""`RLSEditor` on tiny models: a batch is done or leaves no trace, and weights are never mistaken."""

import copy

import pytest
import torch

from easyedit_rls import NumericalError, RequestError, RLSEditor, StateMismatchError
from easyedit_rls.editors import rls as editor_module
from tests.helpers import same, tensors_of


def test_rollback_is_bit_for_bit_and_once(model, tok, requests, settings):
    editor = RLSEditor(model, tok, settings())
    with pytest.raises(StateMismatchError, match="No batch"):
        editor.rollback()
    editor.edit(requests[:2])
    kept, covariance = tensors_of(model), editor.state.layers[1].covariance()
    editor.edit(requests[2:])
    assert not same(tensors_of(model), kept)
    editor.rollback()
    assert same(tensors_of(model), kept)
    assert torch.equal(editor.state.layers[1].covariance(), covariance)
    assert editor.n_edits == 2
    with pytest.raises(StateMismatchError, match="only once"):
        editor.rollback()


def test_going_on_after_a_rollback_equals_never_having_made_the_batch(model, tok, requests, settings):
    twin = copy.deepcopy(model)
    straight = RLSEditor(twin, tok, settings())
    straight.edit(requests[:1])
    straight.edit(requests[3:])
    editor = RLSEditor(model, tok, settings())
    editor.edit(requests[:1])
    editor.edit(requests[1:3])
    editor.rollback()
    assert editor.edit(requests[3:]).batch == 2
    assert same(tensors_of(model), tensors_of(twin))


def test_state_follows_weights_that_the_host_rolled_back(model, tok, requests, settings):
    twin = copy.deepcopy(model)
    straight = RLSEditor(twin, tok, settings())
    straight.edit(requests[:2])
    editor = RLSEditor(model, tok, settings())
    found = tensors_of(model)
    editor.edit(requests[2:])
    model.load_state_dict(found)  # the host puts the weights back and tells nobody
    assert editor.edit(requests[:2]).n_edits == 2
    assert same(tensors_of(model), tensors_of(twin))


def test_weights_that_somebody_else_changed_are_refused(model, tok, requests, settings):
    editor = RLSEditor(model, tok, settings())
    editor.edit(requests[:2])
    with torch.no_grad():
        editor.layout.edited[2].parameter.add_(0.01)
    changed = tensors_of(model)
    for act in (lambda: editor.edit(requests[2:]), editor.rollback):
        with pytest.raises(StateMismatchError, match=r"layers \[2\].*reset\(\).*adopt_weights\(\)"):
            act()
        assert same(tensors_of(model), changed)
    editor.adopt_weights()
    assert editor.edit(requests[2:]).n_edits == 4
    with torch.no_grad():
        editor.layout.edited[1].parameter.add_(0.01)
    editor.reset()
    assert editor.edit(requests).n_edits == 4


def test_two_editors_share_nothing(model, tok, requests, settings):
    twin = copy.deepcopy(model)
    first, second = RLSEditor(model, tok, settings()), RLSEditor(twin, tok, settings())
    first.edit(requests[:2])
    assert second.edit(requests[:2]).n_edits == 2
    assert same(tensors_of(model), tensors_of(twin))


def bad_request(change, index=0):
    def spoil(editor, requests, monkeypatch):
        return [{**request, **change} if i == index else request for i, request in enumerate(requests)]

    return spoil


def nan_weight(editor, requests, monkeypatch):
    with torch.no_grad():
        editor.layout.edited[2].parameter[0, 0] = float("nan")
    editor.reset()
    return requests


def nan_elsewhere(editor, requests, monkeypatch):
    with torch.no_grad():
        editor.model.get_input_embeddings().weight[:] = float("nan")
    return requests


def interrupt(call, at):
    """Ctrl-C in the middle of a batch, at the n-th call of a function of the editor's module."""

    def spoil(editor, requests, monkeypatch):
        owner, _, name = ("." + call).rpartition(".")
        owner = getattr(editor_module, owner[1:]) if owner else editor_module
        real, calls = getattr(owner, name), []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, interrupted)
        return requests

    return spoil


def interrupt_write(editor, requests, monkeypatch):
    """Ctrl-C just after the last layer was written."""
    weight = editor.layout.edited[2]
    real = weight.write

    def write(W):
        real(W)
        raise KeyboardInterrupt

    monkeypatch.setattr(weight, "write", write)
    return requests


@pytest.mark.parametrize("has_history", [False, True])
@pytest.mark.parametrize(("spoil", "error", "message"), [
    (bad_request({"subject": "Danube"}, 0), RequestError,
        "Request 0, field 'prompt'.*does not contain the subject"),
    (bad_request({"target_new": ""}, 3), RequestError, "Request 3, field 'target_new'.*is empty"),
    (bad_request({"target_new": "<unk>"}, 1), RequestError, "Request 1, field 'target_new'.*unknown token"),
    (nan_weight, NumericalError, "holds NaN.*Load the model again"),
    (nan_elsewhere, NumericalError, "NaN|not finite"),
    (interrupt("optimize_values", 1), KeyboardInterrupt, None),
    (interrupt("LayerWalk.advance_to", 1), KeyboardInterrupt, None),
    (interrupt("LayerWalk.advance_to", 2), KeyboardInterrupt, None),
    (interrupt("LayerWalk.value_states", 2), KeyboardInterrupt, None),
    (interrupt_write, KeyboardInterrupt, None),
])  # fmt: skip
def test_what_fails_changes_nothing(
    model, tok, requests, settings, monkeypatch, spoil, error, message, has_history
):
    editor = RLSEditor(model, tok, settings())
    if has_history:
        editor.edit({"prompt": "The moon is made of", "subject": "moon", "target_new": "bread"})
    with monkeypatch.context() as patch:
        given = spoil(editor, requests, patch)
        before = tensors_of(model)
        n_edits, covariances = (
            editor.n_edits,
            {layer: state.covariance() for layer, state in editor.state.layers.items()},
        )
        with pytest.raises(error, match=message):
            editor.edit(given)
    after = tensors_of(model)
    assert all(torch.equal(before[name].nan_to_num(123.0), after[name].nan_to_num(123.0)) for name in before)
    assert editor.n_edits == n_edits
    assert all(
        torch.equal(editor.state.layers[layer].covariance(), covariance)
        for layer, covariance in covariances.items()
    )
    if error is KeyboardInterrupt:  # and the same call goes through afterwards, as if nothing had happened
        twin = copy.deepcopy(model)
        assert editor.edit(requests).n_edits == n_edits + len(requests)
        assert not same(tensors_of(model), tensors_of(twin))


def test_an_interrupted_batch_leaves_no_trace(model, tok, requests, settings, monkeypatch):
    twin = copy.deepcopy(model)
    straight = RLSEditor(twin, tok, settings())
    straight.edit(requests[:2])
    straight.edit(requests[2:])
    editor = RLSEditor(model, tok, settings())
    editor.edit(requests[:2])
    with monkeypatch.context() as patch:
        interrupt("LayerWalk.advance_to", 2)(editor, requests, patch)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(requests[2:])
    editor.edit(requests[2:])
    assert same(tensors_of(model), tensors_of(twin))
