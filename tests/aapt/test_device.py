"""Devices and precisions that can be used, and the words for others."""

import pytest
import torch

from aapt import device
from aapt.device import mixed_precision, multiplies_bfloat16, usable_device, usable_dtype

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


@pytest.mark.parametrize(
    "machine, avx512_bf16, mkldnn, expected",
    [
        ("x86_64", True, True, True),
        ("AMD64", False, True, False),  # AVX-512 without bfloat16: emulated
        ("x86_64", False, False, False),
        ("aarch64", False, True, True),
        ("arm64", False, False, False),
    ],
)
def test_a_cpu_multiplies_bfloat16_with_instructions_for_it(
    monkeypatch, machine, avx512_bf16, mkldnn, expected
):
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: mkldnn)
    assert multiplies_bfloat16(torch.device("cpu")) is expected
    assert multiplies_bfloat16(CUDA)


@pytest.mark.parametrize("able, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_products_are_mixed_where_that_is_fast(monkeypatch, able, dtype):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: able)
    x = torch.randn(3, 4)
    with mixed_precision(x.device):
        assert (x @ x.T).dtype == dtype


def test_slow_bfloat16_is_said(monkeypatch, recwarn):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: True)
    usable_dtype(torch.bfloat16, torch.device("cpu"))
    assert not recwarn
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: False)
    with pytest.warns(UserWarning, match="^dtype: this CPU has no instructions for bfloat16"):
        assert usable_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
