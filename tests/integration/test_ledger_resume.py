"""An editor goes on from its ledger bit for bit; what does not fit the ledger is refused."""

import copy
import json

import pytest
import torch

from easyedit_rls import AnchorPairs, LedgerError, RLSEditor, StateMismatchError, anchor_pairs
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.reading import journals, latest
from easyedit_rls.ledger.snapshot import read_history, read_manifest, read_moment, read_prior
from tests.conftest import FAMILIES, tiny_settings
from tests.helpers import FADING, FORGETTING, content, edited_weights, same, same_state


@pytest.mark.parametrize("forgetting", FORGETTING)
@pytest.mark.parametrize("has_checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_batches_equal_two_a_new_process_and_one(
    fresh, requests, settings, tmp_path, forgetting, has_checkpoint, dtype
):
    hp = settings(**forgetting, context_templates=None, mom2_adjustment=False)
    straight = fresh(hp, dtype=dtype)
    for batch in (requests[:1], requests[1:3], requests[3:]):
        straight.edit(batch)

    first = fresh(hp, tmp_path / "state", dtype)
    first.edit(requests[:1])
    first.edit(requests[1:3])
    after_two = edited_weights(first)
    if has_checkpoint:
        first.close()
    else:
        first.state.ledger.close()  # as when the process is killed
    torch.manual_seed(1234)
    second = fresh(hp, tmp_path / "state", dtype)
    assert same(edited_weights(second), after_two)
    assert second.n_edits == 3
    assert second.edit(requests[3:]).batch == 3
    assert same_state(second, straight)
    assert second.state.templates == straight.state.templates


def test_no_value_is_optimized_again(fresh, requests, settings, tmp_path, monkeypatch):
    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests)
    for name in ("optimize_values", "make_priors", "templates_of", "LayerWalk"):
        monkeypatch.setattr(f"easyedit_rls.editors.rls.{name}", None)
    assert same_state(fresh(settings(), tmp_path), editor)


def test_every_kind_of_change_comes_back(fresh, requests, settings, tmp_path):
    """Superseded, retracted, rolled back, adopted: each new process has the state that the editors without a
    ledger have.
    """
    hp, alone = settings(checkpoint_every=3), None
    steps = [
        lambda e: e.edit(requests[:3]),
        lambda e: e.edit({**requests[0], "target_new": "slow water"}),
        lambda e: e.retract([2]),
        lambda e: e.edit(requests[3]),
        lambda e: e.rollback(),
        lambda e: e.edit({**requests[3], "importance": 2.5}),
        lambda e: e.amend(3, {**requests[2], "target_new": "birds"}),
        lambda e: e.adopt_weights(),
        lambda e: e.edit(requests[1]),
    ]
    alone = fresh(hp)
    for i, step in enumerate(steps):
        kept = fresh(hp, tmp_path)
        if i:
            assert same_state(kept, alone)
        step(kept)
        step(alone)
        assert same_state(kept, alone)
        if i % 2:
            kept.close()
        else:
            kept.state.ledger.close()
    assert [line.kind for line in latest(tmp_path).lines if line.kind not in ("checkpoint", "begin")] == [
        "entry"
    ] * 4 + ["rollback"] + ["entry"] * 4
    assert sorted(alone.state.history.live) == [4, 6, 7, 8]
    again = read_moment(latest(tmp_path), from_start=True)
    assert all(
        torch.equal(again.solutions[layer].weight, solution.weight)
        for layer, solution in alone.state.layers.items()
    )


def test_the_last_batch_can_be_rolled_back_in_a_new_process(fresh, requests, settings, tmp_path):
    first = fresh(settings(), tmp_path)
    first.edit(requests[:2])
    kept = edited_weights(first)
    first.edit(requests[2:])
    first.close()
    second = fresh(settings(), tmp_path)
    second.rollback()
    assert same(edited_weights(second), kept)
    second.state.ledger.close()
    third = fresh(settings(), tmp_path)
    assert same(edited_weights(third), kept)
    with pytest.raises(StateMismatchError, match="No batch"):
        third.rollback()


def test_a_batch_that_the_host_rolled_back_leaves_the_ledger(fresh, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests[:1])
    found = edited_weights(editor)
    editor.edit(requests[1:2])
    for layer, parameter in found.items():
        editor.layout.edited[layer].restore(parameter)
    editor.edit(requests[2:])
    assert [edit.request.subject for edit in read_history(latest(tmp_path)).live.values()] == [
        "Oder",
        "Mount Sainte-Victoire",
        "rye",
    ]
    assert [line.kind for line in latest(tmp_path).lines] == ["begin", "entry", "entry", "rollback", "entry"]
    editor.close()
    assert same(edited_weights(fresh(settings(), tmp_path)), edited_weights(editor))


@pytest.mark.parametrize("at", ["unedited", "earlier", "now"])
def test_a_saved_model_is_recognized(fresh, family, tok, requests, settings, tmp_path, at):
    editor = fresh(settings(), tmp_path / "state")
    if at == "unedited":
        editor.model.save_pretrained(tmp_path / "model")
    editor.edit(requests[:2])
    if at == "earlier":
        editor.model.save_pretrained(tmp_path / "model")
    editor.edit(requests[2:])
    if at == "now":
        editor.model.save_pretrained(tmp_path / "model")
    editor.close()
    model = type(editor.model).from_pretrained(tmp_path / "model")
    assert same_state(RLSEditor(model, tok, settings(), state_dir=tmp_path / "state"), editor)


def test_another_model_or_other_settings_are_refused_with_every_difference(
    fresh, family, tok, requests, settings, tmp_path
):
    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests[:1])
    before = content(tmp_path)

    def refused(model, hp, **how):
        found = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(StateMismatchError) as caught:
            RLSEditor(model, tok, hp, state_dir=tmp_path, **how)
        assert same(found, dict(model.named_parameters()))
        return str(caught.value)

    said = refused(FAMILIES[family](), settings(lambda_reg=0.3, mu_reg=2.0, **FADING[0.9]))
    for setting in (
        "lambda_reg: the ledger has 0.1, here it is 0.3",
        "mu_reg",
        "solver: the ledger has 'rls'",
    ):
        assert setting in said
    assert "fingerprint" not in said
    assert "edited weights" not in said
    said = refused(FAMILIES[family](), settings(layers=[1]), anchors=["An anchor"])
    assert "layers: the ledger has [1, 2], here it is [1]" in said
    assert "anchors: the ledger has 'moments', here it is 'prompts" in said
    other = FAMILIES[family]()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)
        RLSEditor(other, tok, settings()).layout.edited[2].parameter.mul_(1.01)
    said = refused(other, settings(mom2_update_weight=3.0))
    for text in (
        "fingerprint of the weights that are not edited",
        "edited weights of layers [2]: neither",
        "mom2_update_weight",
    ):
        assert text in said
    said = refused(FAMILIES[family]().to(torch.bfloat16), settings())
    assert "dtype: the ledger has 'float32', here it is 'bfloat16'" in said
    stranger = next(name for name in FAMILIES if name != family)
    said = refused(FAMILIES[stranger](), tiny_settings(stranger))
    assert "architecture" in said
    assert "widths" in said or "parameters" in said
    assert content(tmp_path) == before
    assert same_state(
        fresh(settings(stats_dir="elsewhere", v_lr=0.1), tmp_path), editor
    )  # what doesn't define the objective may change


def test_a_second_writer_is_refused(fresh, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"held by another editor.*close\(\)"):
            fresh(settings(), tmp_path)
        editor.edit(requests)
    editor.close()
    for act in (
        lambda: editor.edit(requests),
        editor.reset,
        editor.adopt_weights,
        lambda: editor.retract(1),
        editor.rollback,
    ):
        with pytest.raises(LedgerError, match="was closed"):
            act()
    editor.close()
    assert fresh(settings(), tmp_path).n_edits == 4


def test_a_deep_copy_goes_its_own_way(fresh, tok, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests[:1])
    before = content(tmp_path)
    state = copy.deepcopy(editor.state)
    twin = RLSEditor(copy.deepcopy(editor.model), tok, settings(), state=state)
    twin.edit(requests[1:])
    twin.retract(1)
    assert content(tmp_path) == before
    assert editor.n_edits == 1
    with pytest.raises(StateMismatchError, match="not in the ledger"):
        RLSEditor(twin.model, tok, settings(), state=state, state_dir=tmp_path / "other")


def test_resetting_begins_a_new_journal(fresh, tok, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests[:2])
    editor.reset()
    editor.state.ledger.close()
    editor = RLSEditor(
        editor.model, tok, settings(), state_dir=tmp_path
    )  # the reset is on disk: nothing comes back
    assert editor.n_edits == 0
    base = copy.deepcopy(editor.model)
    editor.edit(requests[2:])
    editor.close()
    assert len(journals(tmp_path)) == 2
    assert same_state(RLSEditor(base, tok, settings(), state_dir=tmp_path), editor)


def test_settings_that_came_later_are_at_their_defaults_in_older_ledgers(fresh, requests, settings, tmp_path):
    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests[:1])
    manifest = read_manifest(latest(tmp_path))
    older = json.loads(manifest.encode())
    for name in ("keys", "nullspace_weight", "nullspace_threshold"):
        del older["objective"][name]
    read = Manifest.decode(json.dumps(older).encode(), "manifest.json")
    assert read.differences(manifest) == []
    del older["objective"]["mu_reg"]  # there from the first
    assert Manifest.decode(json.dumps(older).encode(), "manifest.json").differences(manifest) == [
        f"mu_reg: the ledger has None, here it is {settings().mu_reg!r}"
    ]


def test_anchors_with_values_of_their_own_come_back(fresh, tok, requests, settings, tmp_path):
    hp = settings()
    pairs = anchor_pairs(fresh(hp).model, tok, hp, ["Bread needs"])
    values = {
        layer: torch.randn(len(K_0), 32, generator=torch.Generator().manual_seed(layer))
        for layer, K_0 in pairs.keys.items()
    }
    anchors = AnchorPairs(pairs.keys, values)
    with fresh(hp, tmp_path, anchors=anchors) as editor:
        editor.edit(requests[:2])
    assert same_state(fresh(hp, tmp_path, anchors=anchors), editor)
    prior = read_prior(latest(tmp_path), 1)
    assert not torch.equal(prior.unedited, prior.solution.weight)
    assert prior.anchor_energy == pytest.approx(float(values[1].double().square().sum()))
    with pytest.raises(StateMismatchError, match="anchors: the ledger has 'pairs"):
        fresh(hp, tmp_path)


def test_entries_say_what_they_are(fresh, requests, settings, tmp_path):
    """A journal file explains itself: safetensors with the requests' text,
    time and version in its metadata.
    """
    from safetensors import safe_open

    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests[3:])
        editor.edit(requests[:2])
    journal = latest(tmp_path)
    offset, stamp = journal.lines[2].record
    (tmp_path / "record").write_bytes(
        (journal.folder / "entries.bin").read_bytes()[offset : offset + stamp.n_bytes]
    )
    with safe_open(tmp_path / "record", "pt") as stored:
        entry = json.loads(stored.metadata()["entry"])
        assert {"importance", "K.1", "V.1", "K.2", "V.2"} == set(stored.keys())
        assert stored.get_tensor("K.1").shape == (2, editor.layout.edited[1].shape[0])
    assert [(edit["id"], edit["subject"], edit["target"]) for edit in entry["edits"]] == [
        (2, "Oder", "people"),
        (3, "Anna Maria Keller", "water"),
    ]
    assert entry["version"]
    assert entry["time"].startswith("20")
