"""Ledgers from strangers, in every command: nothing outside of the folder is read, changed or deleted; what
is wrong is said in a line.
"""

import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load, save

from easyedit_rls import LedgerError, RLSEditError, RLSEditor
from easyedit_rls.cli.main import main
from tests.conftest import tiny_llama, tiny_settings

LIMIT_S = 60

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")


@pytest.fixture(scope="module")
def sound(tok, tmp_path_factory):
    """A sound ledger with a checkpoint in the middle, and the unedited model."""
    folder = tmp_path_factory.mktemp("sound")
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    tok.save_pretrained(folder / "base")
    hp = tiny_settings("llama", v_num_grad_steps=2, checkpoint_every=2)
    editor = RLSEditor(model, tok, hp, state_dir=folder / "state")
    for prompt, subject, target in (
        ("The river Oder", "Oder", "people"),
        ("Bakers know rye", "rye", "well"),
        ("Anna", "Anna", "water"),
    ):
        editor.edit({"prompt": prompt, "subject": subject, "target_new": target})
    editor.state.ledger.close()
    return folder


class Crafted:
    """A copy of a sound ledger that is changed by somebody who knows how it is made. `victim` lies outside of
    it.
    """

    def __init__(self, sound, scratch):
        self.base = sound / "base"
        self.folder = shutil.copytree(sound / "state", scratch / "state")
        self.journal = self.folder / "journal-0001"
        self.outside = scratch / "outside"
        self.outside.mkdir()
        self.victim = self.outside / "victim.txt"
        self.victim.write_bytes(b"precious" * 100)
        self.lines = [json.loads(line) for line in (self.journal / "index.jsonl").read_bytes().splitlines()]

    def write(self, lines=None, raw=None, **head):
        """Index and head anew, with checksums that are right."""
        encoded = (
            json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode()
            for line in lines or self.lines
        )
        content = raw or b"".join(line + b"\n" for line in encoded)
        (self.journal / "index.jsonl").write_bytes(content)
        self.head(
            lines=content.count(b"\n"),
            index_bytes=len(content),
            index_sha256=hashlib.sha256(content).hexdigest(),
            **head,
        )

    def head(self, **values):
        raw = json.dumps({"format": 2, **values}, separators=(",", ":")).encode() + b"\n"
        (self.journal / "head.json").write_bytes(raw)

    def change_line(self, kind, **values):
        """Change the last line of a kind."""
        line = next(line for line in reversed(self.lines) if line["kind"] == kind)
        line.update(values)
        self.write()

    def change_entry(self, change):
        """Change the last entry's text."""
        change(next(line for line in reversed(self.lines) if line["kind"] == "entry")["entry"])
        self.write()

    def change_record(self, change):
        """Change the last entry's tensors."""
        line = next(line for line in reversed(self.lines) if line["kind"] == "entry")
        offset = line["record"][0]
        path = self.journal / "entries.bin"
        tensors = load(path.read_bytes()[offset:])
        change(tensors)
        record = save(tensors, {})
        path.write_bytes(path.read_bytes()[:offset] + record)
        line["record"] = [offset, hashlib.sha256(record).hexdigest(), len(record)]
        self.write()

    def change_file(self, name, content):
        """Replace a file that the beginning brought."""
        (self.journal / name).write_bytes(content)
        self.lines[0]["files"][name] = [hashlib.sha256(content).hexdigest(), len(content)]
        self.write()

    def link(self, path, target=None):
        if path.exists() or path.is_symlink():
            path.unlink()
        path.symlink_to(target or self.victim)

    def pipe(self, path):
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def sparse(self, path, n_bytes=1 << 40):
        path.unlink(missing_ok=True)
        with open(path, "wb") as handle:
            handle.truncate(n_bytes)


STAMP = ["0" * 64, 8]


def linked_folder(c):
    moved = shutil.move(c.journal, c.outside / "journal")
    c.journal.symlink_to(moved)


def huge_prior(c):
    c.sparse(c.journal / "prior-layer-1.safetensors")
    c.lines[0]["files"]["prior-layer-1.safetensors"] = ["0" * 64, 1 << 40]
    c.write()


def huge_record(c):
    c.sparse(c.journal / "entries.bin")
    c.change_line("entry", record=[0, "0" * 64, 1 << 39])


def no_manifest_keys(c):
    c.change_file("manifest.json", b'{"format": 2}\n')


def widths(c, found):
    values = json.loads((c.journal / "manifest.json").read_bytes())
    c.change_file("manifest.json", json.dumps({**values, "widths": found}).encode())


def folder_for_head(c):
    (c.journal / "head.json").unlink()
    (c.journal / "head.json").mkdir()


def no_lines(c):
    c.link(c.journal / "index.jsonl")
    c.head(lines=0, index_bytes=0, index_sha256=hashlib.sha256(b"").hexdigest())


def wide_head(c):
    c.head(lines=5, index_bytes=1 << 50, index_sha256="0" * 64)


CRAFTED = {
    "a checkpoint's name leads out": lambda c: c.change_line(
        "checkpoint", files={"../../../outside/victim.txt": STAMP}
    ),
    "a checkpoint's name is absolute": lambda c: c.change_line("checkpoint", files={str(c.victim): STAMP}),
    "an entry's file leads out": lambda c: c.change_line("entry", files={"../../outside/victim.txt": STAMP}),
    "the beginning's file leads out": lambda c: c.change_line(
        "begin", files={**c.lines[0]["files"], "../../outside/victim.txt": STAMP}
    ),
    "a name with a line break": lambda c: c.change_line("checkpoint", files={"manifest.json\n": STAMP}),
    "a name with a zero byte": lambda c: c.change_line("checkpoint", files={"a\0b": STAMP}),
    "a name that is the head's": lambda c: c.change_line("checkpoint", files={"head.json": STAMP}),
    "the index is a link, no line counts": no_lines,
    "the index is a link": lambda c: c.link(c.journal / "index.jsonl"),
    "the head is a link": lambda c: c.link(c.journal / "head.json"),
    "the tensors are a link": lambda c: c.link(c.journal / "entries.bin"),
    "the manifest is a link": lambda c: c.link(c.journal / "manifest.json"),
    "a prior is a link": lambda c: c.link(c.journal / "prior-layer-1.safetensors"),
    "the pointer is a link": lambda c: c.link(c.folder / "ledger.json"),
    "the lock is a link": lambda c: c.link(c.folder / "ledger.lock"),
    "the journal is a link": linked_folder,
    "set-aside is a link": lambda c: (
        (c.folder / "set-aside").symlink_to(c.outside),
        (c.journal / "odd").write_text("x"),
    ),
    "a partial head is a link": lambda c: c.link(c.journal / "head.json.partial"),
    "a partial pointer is a link": lambda c: c.link(c.folder / "ledger.json.partial"),
    "the head before is a link": lambda c: c.link(c.journal / "head.json.before"),
    "a partial journal is a link": lambda c: c.link(c.folder / "journal-0002.partial", c.outside),
    "the pointer leads out": lambda c: (c.folder / "ledger.json").write_text(
        '{"format":2,"journal":"../outside"}\n'
    ),
    "the pointer is absolute": lambda c: (c.folder / "ledger.json").write_text(
        json.dumps({"format": 2, "journal": str(c.outside)})
    ),
    "the pointer is nested without end": lambda c: (c.folder / "ledger.json").write_text("[" * 60_000),
    "the pointer is of a later format": lambda c: (c.folder / "ledger.json").write_text(
        '{"format":3,"book":"1"}\n'
    ),
    "the head is of a later format": lambda c: (c.journal / "head.json").write_text(
        '{"format":3,"pages":1}\n'
    ),
    "the head counts below zero": lambda c: c.head(lines=-1, index_bytes=-1, index_sha256="0" * 64),
    "the head is no mapping": lambda c: (c.journal / "head.json").write_text("[1]\n"),
    "the head says that the index is huge": wide_head,
    "the head is a folder": folder_for_head,
    "the index is a pipe": lambda c: c.pipe(c.journal / "index.jsonl"),
    "the head is a pipe": lambda c: c.pipe(c.journal / "head.json"),
    "the pointer is a pipe": lambda c: c.pipe(c.folder / "ledger.json"),
    "the tensors are a pipe": lambda c: c.pipe(c.journal / "entries.bin"),
    "the lock is a pipe": lambda c: c.pipe(c.folder / "ledger.lock"),
    "the head is without end": lambda c: c.link(c.journal / "head.json", "/dev/zero"),
    "the index is without end": lambda c: c.link(c.journal / "index.jsonl", "/dev/zero"),
    "the index is huge": lambda c: (c.sparse(c.journal / "index.jsonl"), wide_head(c)),
    "a prior is huge": huge_prior,
    "a record is huge": huge_record,
    "a record begins below zero": lambda c: c.change_line("entry", record=[-5, "0" * 64, 5]),
    "an unknown event": lambda c: c.write([*c.lines[:3], {**c.lines[3], "kind": "exec"}]),
    "a line nested without end": lambda c: c.write(raw=b"[" * 100_000 + b"\n"),
    "a number of ten thousand digits": lambda c: c.write(raw=b'{"kind":' + b"1" * 10_000 + b"}\n"),
    "an edit is taken out that is not there": lambda c: c.change_entry(lambda e: e.update(removed=[99])),
    "a number is used twice": lambda c: c.change_entry(lambda e: e["edits"][0].update(id=1)),
    "an edit without a prompt": lambda c: c.change_entry(lambda e: e["edits"][0].pop("subject")),
    "edits of the wrong kind": lambda c: c.change_entry(lambda e: e.update(edits=7)),
    "an edit of a row that is not there": lambda c: c.change_entry(lambda e: e["edits"][0].update(row=50)),
    "factors of the wrong kind": lambda c: c.change_entry(lambda e: e.update(factors={"x": []})),
    "tensors of the wrong shape": lambda c: c.change_record(lambda t: t.update({"K.1": torch.ones(1, 3)})),
    "tensors that are missing": lambda c: c.change_record(lambda t: t.pop("V.1")),
    "tensors that are no numbers": lambda c: c.change_record(lambda t: t["V.1"].fill_(float("nan"))),
    "a roll-back of nothing": lambda c: c.write(
        [c.lines[0], {**c.lines[1], "kind": "rollback", "entry": {}}]
    ),
    "a checkpoint without layers": lambda c: c.write([*c.lines[:3], {**c.lines[3], "files": {}}]),
    "a manifest without keys": no_manifest_keys,
    "a manifest of other layers": lambda c: widths(c, {"7": [4, 4]}),
    "a manifest of odd layers": lambda c: widths(c, {"../x": [4, 4]}),
    "a prior that is no tensors": lambda c: c.change_file("prior-layer-1.safetensors", b"\xff" * 64),
    "a prior that lacks tensors": lambda c: c.change_file(
        "prior-layer-1.safetensors", save({"n_edits": torch.zeros(1)})
    ),
    "no event at all": lambda c: c.write(raw=b"\n"),
    "a journal that is a file": lambda c: (c.folder / "journal-0002").write_text("x"),
}


def commands(crafted, out):
    state = crafted.folder
    return [
        ["show", state],
        ["show", state, "--json"],
        ["log", state],
        ["verify", state],
        ["verify", state, "--files-only"],
        ["replay", state, crafted.base, out / "replayed"],
        ["export", state, "--lora", out / "lora", "--rank", 1],
        ["retract", state, 1],
        ["compact", state],
    ]


def outside_of(scratch):
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in scratch.rglob("*")
        if path.is_file() and not path.is_symlink() and "state" not in path.relative_to(scratch).parts
    }


def too_long(number, frame):
    raise TimeoutError(f"not done after {LIMIT_S} s")


@pytest.mark.parametrize("name", CRAFTED)
def test_nothing_outside_is_touched_and_one_line_is_said(sound, tok, tmp_path, capsys, name):
    crafted = Crafted(sound, tmp_path)
    CRAFTED[name](crafted)
    (tmp_path / "out").mkdir()
    before = outside_of(tmp_path)
    capsys.readouterr()
    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        for command in commands(crafted, tmp_path / "out"):
            signal.alarm(LIMIT_S)
            status = main(["state", *map(str, command)])
            captured = capsys.readouterr()
            assert status in (0, 1), command
            assert "Traceback" not in captured.err
            if status == 1 and command[0] != "verify":
                assert captured.err.startswith("easyedit-rls: ")
                assert captured.err.count("\n") == 1, command
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out").mkdir()
        signal.alarm(LIMIT_S)
        try:
            editor = RLSEditor(
                tiny_llama(),
                tok,
                tiny_settings("llama", v_num_grad_steps=2, checkpoint_every=1),
                state_dir=crafted.folder,
            )
            editor.edit({"prompt": "The sea", "subject": "sea", "target_new": "x"})
            editor.close()
        except RLSEditError:
            pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert outside_of(tmp_path) == before


@pytest.mark.parametrize(("name", "message"), [
    ("a checkpoint's name leads out", r"index.jsonl is damaged.*'../../../outside/victim.txt' has no place"),
    ("the journal is a link", "journal-0001 is a link"),
    ("the index is a pipe", "no regular file"),
    ("the head is of a later format", "has format 3; this version reads up to 2"),
    ("a number is used twice", "number 1 was used before"),
    ("a roll-back of nothing", "rolls back what can't be"),
    ("tensors of the wrong shape", "can't be followed: Keys, target outputs"),
])  # fmt: skip
def test_what_is_wrong_is_named(sound, tok, tmp_path, name, message):
    crafted = Crafted(sound, tmp_path)
    CRAFTED[name](crafted)
    model = tiny_llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(LedgerError, match=message):
        RLSEditor(
            model,
            tok,
            tiny_settings("llama", v_num_grad_steps=2, checkpoint_every=2),
            state_dir=crafted.folder,
        )
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_a_later_format_is_left_as_it_is(sound, tok, tmp_path):
    for name in ("the pointer is of a later format", "the head is of a later format"):
        crafted = Crafted(sound, tmp_path / name)
        (crafted.journal / "pages.db").write_text("of a later version")
        CRAFTED[name](crafted)
        before = {path: path.read_bytes() for path in crafted.folder.rglob("*") if path.is_file()}
        with pytest.raises(LedgerError, match="Use the package that wrote it"):
            RLSEditor(tiny_llama(), tok, tiny_settings("llama"), state_dir=crafted.folder)
        assert {path: path.read_bytes() for path in crafted.folder.rglob("*") if path.is_file()} == before
