"""Devices and precisions that can be used, and the words for others."""

import pytest
import torch

from aapt.device import usable_device, usable_dtype

CUDA = torch.device("cuda", 0)


def test_the_cpu_is_always_usable():
    assert usable_device("cpu") == torch.device("cpu")
    assert usable_dtype(None, torch.device("cpu")) == torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert usable_dtype(dtype, torch.device("cpu")) == dtype


@pytest.mark.parametrize("name", ["disk", "cuda:x", "gpu"])
def test_a_name_of_no_device_is_said(name):
    with pytest.raises(ValueError, match=f"^device: expected cpu, cuda or cuda:N, got {name}$"):
        usable_device(name)


def test_each_reason_why_there_is_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="^device: cannot use cuda: PyTorch .* without CUDA; ins"):
        usable_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="cuda: no CUDA device is visible; see what nvidia-smi"):
        usable_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="cannot use cuda:2: expected a number below 2"):
        usable_device("cuda:2")


def test_what_else_pytorch_cannot_use_keeps_its_words():
    with pytest.raises(ValueError, match="^device: cannot use xpu: .*; cpu always works$"):
        usable_device("xpu")


@pytest.mark.parametrize(
    "capability, default", [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), None)]
)
def test_precision_follows_the_device(monkeypatch, capability, default):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert usable_dtype(None, CUDA) == (default or torch.bfloat16)
    assert usable_dtype(torch.float16, CUDA) == torch.float16
    if capability < (8, 0):
        words = "^dtype: expected float16 or float32 on cuda:0, which is sm_75 and does not multi"
        with pytest.raises(ValueError, match=words):
            usable_dtype(torch.bfloat16, CUDA)
    else:
        assert usable_dtype(torch.bfloat16, CUDA) == torch.bfloat16


def test_networks_have_floating_point_precision():
    with pytest.raises(TypeError, match="^dtype: expected one of float32, .*, got torch.int8$"):
        usable_dtype(torch.int8, torch.device("cpu"))
