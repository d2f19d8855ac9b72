"""Durable files: the order of writes, syncs and renames, on which all else stands, and what is refused."""

import os

import pytest
import torch

from easyedit_rls._base import files
from easyedit_rls._base.files import Stamp, write_file
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.errors import LedgerError
from easyedit_rls.ledger import files as ledger_files
from easyedit_rls.ledger import journal, ledger
from easyedit_rls.ledger.files import pack, read_file, unpack
from easyedit_rls.ledger.history import Edit, Entry
from easyedit_rls.ledger.journal import entry_event
from easyedit_rls.ledger.ledger import Ledger, Place
from easyedit_rls.ledger.reading import latest


class RecordingOs:
    """Stands for `os`; notes down what happens to which file."""

    def __init__(self):
        self.log, self.names = [], {}

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "replace", "rename", "close"):
            return real

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            if name == "open":
                self.names[result] = os.path.basename(args[0])
            elif name == "replace":
                self.log.append(f"replace {os.path.basename(args[1])}")
            elif name != "close":
                self.log.append(f"{name} {self.names.get(args[0], os.path.basename(str(args[0])))}")
            return result

        return call


@pytest.fixture
def recorded(monkeypatch):
    recording = RecordingOs()
    for module in (files, journal, ledger, ledger_files):
        monkeypatch.setattr(module, "os", recording)
    return recording.log


def entry(number):
    return Entry("edit", (Edit(number, EditRequest("a ", "b", " c", "d"), 0),), factors={1: 1.0}, weights="0")


DATA = {"importance": torch.ones(1), "K.1": torch.ones(1, 3), "V.1": torch.ones(1, 2)}


def test_a_file_is_synced_before_it_gets_its_name_and_the_name_before_it_counts(tmp_path, recorded):
    stamp = write_file(tmp_path / "a", b"content")
    folder = tmp_path.name
    assert recorded == ["write a.partial", "fsync a.partial", "replace a", f"fsync {folder}"]
    assert read_file(tmp_path / "a", stamp) == b"content"


def test_an_entry_is_committed_by_the_head_and_last(tmp_path, recorded):
    held = Ledger(tmp_path)
    place, _ = held.begin(Place(), {"manifest.json": b"{}"}, {}, [[entry_event(entry(1), DATA)]])
    pointer = (
        "write ledger.json.partial",
        "fsync ledger.json.partial",
        "replace ledger.json",
        f"fsync {tmp_path.name}",
    )
    assert recorded[-6:] == ["rename journal-0001.partial", f"fsync {tmp_path.name}", *pointer]
    assert "fsync head.json.partial" in recorded[:-6]
    recorded.clear()
    place, line = held.record(place, entry_event(entry(2), DATA))
    assert recorded == [
        *("write entries.bin", "fsync entries.bin", "write index.jsonl", "fsync index.jsonl"),
        *("write head.json.partial", "fsync head.json.partial", "replace head.json", "fsync journal-0001"),
    ]
    assert not list(tmp_path.rglob("*.partial"))
    journal_now = latest(tmp_path)
    assert [line.kind for line in journal_now.lines] == ["begin", "entry", "entry"]
    assert journal_now.position.head == place.position.head
    assert torch.equal(journal_now.entries()[1].data()["K.1"], DATA["K.1"])
    assert line == journal_now.lines[2]


def test_what_is_not_as_stamped_is_refused(tmp_path):
    path = tmp_path / "a"
    stamp = write_file(path, b"content")
    path.write_bytes(b"contenT")
    with pytest.raises(LedgerError, match=r"a is damaged: its SHA-256"):
        read_file(path, stamp)
    path.write_bytes(b"conten")
    with pytest.raises(LedgerError, match="has 6 bytes instead of 7"):
        read_file(path, stamp)
    path.unlink()
    with pytest.raises(LedgerError, match=r"a is missing.*state verify"):
        read_file(path, stamp)
    path.mkdir()
    with pytest.raises(LedgerError, match="no regular file"):
        read_file(path, stamp)


def test_tensors_come_back_in_memory_of_their_own(tmp_path):
    transposed = torch.arange(6.0).reshape(2, 3).T
    content = pack({"a": transposed, "b": torch.ones(1, dtype=torch.bfloat16)}, {"entry": "text"})
    back = unpack(tmp_path / "a", content)
    assert torch.equal(back["a"], transposed)
    assert back["a"].is_contiguous()
    assert back["b"].dtype == torch.bfloat16
    assert all(tensor.data_ptr() % 64 == 0 for tensor in back.values())
    with pytest.raises(LedgerError, match="no safetensors file"):
        unpack(tmp_path / "a", content[:-1])


def test_a_later_format_is_refused(tmp_path):
    from easyedit_rls.ledger.manifest import Manifest

    with pytest.raises(LedgerError, match="has format 99; this version reads up to 2"):
        Manifest.decode(b'{"format": 99}', "manifest.json")


def test_a_stamp_is_of_the_content(tmp_path):
    assert write_file(tmp_path / "a", b"") == Stamp(
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", 0
    )


def test_a_disk_that_fails_while_a_file_is_read_is_told(tmp_path, monkeypatch):
    stamp = write_file(tmp_path / "a", b"content")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ledger_files.hashlib, "sha256", fail)
    with pytest.raises(LedgerError, match=r"a can't be read: Input/output error"):
        read_file(tmp_path / "a", stamp)
