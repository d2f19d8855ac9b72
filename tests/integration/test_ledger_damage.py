"""A ledger with flipped or cut bytes: every one is found, by name of the file, and nothing damaged is ever
loaded.
"""

import random
import shutil

import pytest
import torch

from easyedit_rls import LedgerError, RLSEditor
from easyedit_rls.ledger.inspect import check_files
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_moment
from tests.conftest import tiny_llama, tiny_settings


@pytest.fixture
def whole(tok, requests, tmp_path):
    """A ledger with superseded, retracted and rolled-back edits, a forgotten journal, and entries behind its
    checkpoint.
    """
    hp = tiny_settings("llama", checkpoint_every=3, v_num_grad_steps=2)
    editor = RLSEditor(tiny_llama(), tok, hp, state_dir=tmp_path / "whole")
    editor.edit(requests[:2])
    editor.rollback()
    editor.reset()
    for request in requests:
        editor.edit(request)
    editor.edit({**requests[0], "target_new": "water"})
    editor.retract(2)
    editor.edit({**requests[1], "target_new": "bread"})
    editor.rollback()
    editor.state.ledger.close()
    return tmp_path / "whole"


def weights(folder):
    return {layer: solution.weight for layer, solution in read_moment(latest(folder)).solutions.items()}


def test_a_thousand_damages_are_found_and_none_is_loaded(whole, tmp_path):
    sound = weights(whole)
    journal = latest(whole)
    last_checkpoint = max(i for i, line in enumerate(journal.lines) if line.kind == "checkpoint")
    first_needed = min(
        line.record[0] for line in journal.lines[last_checkpoint:] if line.kind == "entry" and line.record
    )
    needed = {f"checkpoint-{last_checkpoint:06d}-layer-{layer}.safetensors" for layer in (1, 2)}
    needed |= {"ledger.json", "index.jsonl", "head.json", "manifest.json", "entries.bin"}
    needed |= {f"unedited-layer-{layer}.safetensors" for layer in (1, 2)}
    assert all(problem is None for _, problem in check_files(whole))
    known = {path for path, _ in check_files(whole)}
    paths = sorted(path for path in whole.rglob("*") if path in known)
    assert len(paths) > 15
    chance, hit = random.Random(0), set()
    for i in range(1000):
        path = chance.choice(paths)
        content = path.read_bytes()
        at = chance.randrange(len(content))
        damaged = bytearray(content)
        if i % 4 == 0:
            del damaged[at:]
        elif i % 4 == 1:
            del damaged[at : at + chance.randint(1, 9)]
        else:
            damaged[at] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        hit.add(path)
        said = [problem for _, problem in check_files(whole) if problem is not None]
        assert any(path.name in problem for problem in said), (path, at)
        is_needed = path.parent.name != "journal-0001" and path.name in needed
        is_needed &= path.name != "entries.bin" or i % 4 < 2 or at >= first_needed
        if is_needed:
            with pytest.raises(LedgerError, match=path.name):
                weights(whole)
        else:
            loaded = weights(whole)
            assert all(torch.equal(loaded[layer], W) for layer, W in sound.items())
        path.write_bytes(content)
    assert hit == set(paths)
    assert all(problem is None for _, problem in check_files(whole))


def test_a_missing_file_is_named(whole):
    for path in [
        path for path, _ in check_files(whole) if path.name != "ledger.json"
    ]:  # without it the highest number counts
        hidden = path.rename(path.with_suffix(".away"))
        assert any(path.name in problem for _, problem in check_files(whole) if problem is not None)
        hidden.rename(path)
    assert all(problem is None for _, problem in check_files(whole))


def test_an_editor_refuses_a_damaged_ledger_and_changes_nothing(whole, tok, tmp_path):
    checkpoint = next(latest(whole).folder.glob("checkpoint*"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):  # the lock is let go each time
        with pytest.raises(LedgerError, match=rf"{checkpoint.name} is damaged.*state verify"):
            RLSEditor(
                model, tok, tiny_settings("llama", checkpoint_every=3, v_num_grad_steps=2), state_dir=whole
            )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_an_interrupted_writer_left_is_ignored_and_set_aside(whole, tok, requests):
    folder = latest(whole).folder
    with open(folder / "index.jsonl", "ab") as index:
        index.write(b'{"kind":"entry","ti')
    (folder / "entry-000099.safetensors").write_bytes(b"half")
    (folder / "entry-000099.safetensors.partial").write_bytes(b"")
    shutil.copytree(folder, whole / "journal-0003.partial")
    assert all(problem is None for _, problem in check_files(whole))
    with RLSEditor(
        tiny_llama(), tok, tiny_settings("llama", checkpoint_every=3, v_num_grad_steps=2), state_dir=whole
    ) as editor:
        editor.edit(requests[1])
    assert not list(whole.rglob("*.partial"))  # what was torn is gone, all else is kept aside
    aside = {path.name: path for path in (whole / "set-aside").rglob("*") if path.is_file()}
    assert aside["entry-000099.safetensors"].read_bytes() == b"half"
    assert (
        next(path for name, path in aside.items() if name.startswith("index.jsonl")).read_bytes()
        == b'{"kind":"entry","ti'
    )
    assert all(problem is None for _, problem in check_files(whole))
