"""Which device a command works on."""

import pytest
import torch

from easyedit_rls._base.device import choose_device
from easyedit_rls.errors import ModelError


def test_unasked_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(None) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == "cuda"
    assert [choose_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize(("asked", "message"), [
    ("cuda:2", r"PyTorch sees 2 GPUs, so not cuda:2\."),
    ("gpu", r"'gpu' is none that PyTorch knows\. Take cpu, cuda, or one of several: cuda:1\."),
])  # fmt: skip
def test_a_device_that_is_not_there_is_told(asked, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match=message):
        choose_device(asked)


def test_without_a_gpu_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"PyTorch sees no GPU, so not cuda\. Take device cpu"):
        choose_device("cuda")
