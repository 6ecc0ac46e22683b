"""Choosing a backend: what auto takes, what a name refuses, and that nobody falls back."""

import re

import pytest
import torch

from aapt_kernels import _library, backends, qk_norm_rope, use_backend
from aapt_kernels.backend import BackendError, no_sim, obstacle, resolve
from aapt_kernels.kv_append import cpu as kv_append_cpu
from aapt_kernels.qk_norm_rope import cpu, ref

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
X = torch.zeros(1, 1, 1, 2)


def test_auto_is_cpu_on_cpu_tensors():
    assert resolve("qk_norm_rope", X) is cpu.forward


def test_a_name_holds_until_the_context_ends():
    with use_backend("reference"):
        assert resolve("qk_norm_rope", X) is ref.reference_forward
        with use_backend("cpu"):
            assert resolve("qk_norm_rope", X) is cpu.forward
        assert resolve("qk_norm_rope", X) is ref.reference_forward
    assert resolve("qk_norm_rope", X) is cpu.forward


def test_a_plain_call_holds_until_the_next():
    use_backend("reference")
    assert resolve("qk_norm_rope", X) is ref.reference_forward
    use_backend("auto")
    assert resolve("qk_norm_rope", X) is cpu.forward


def test_one_object_holds_in_every_context():
    chosen = use_backend("reference")
    for _ in range(2):
        with chosen:
            assert resolve("qk_norm_rope", X) is ref.reference_forward
            with use_backend("cpu"), chosen, chosen:
                assert resolve("qk_norm_rope", X) is ref.reference_forward
            assert resolve("qk_norm_rope", X) is ref.reference_forward
        assert resolve("qk_norm_rope", X) is cpu.forward


def test_the_context_that_is_entered_holds_and_not_the_object_made_last():
    first, second = use_backend("cpu"), use_backend("reference")
    with first:
        assert resolve("qk_norm_rope", X) is cpu.forward
        with second:
            assert resolve("qk_norm_rope", X) is ref.reference_forward
        assert resolve("qk_norm_rope", X) is cpu.forward
    assert resolve("qk_norm_rope", X) is ref.reference_forward
    use_backend("auto")


def test_an_unknown_name_is_refused():
    words = "backend: expected one of auto, cuda, triton, cpu, reference, sim, got 'fast'"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        use_backend("fast")
    assert resolve("qk_norm_rope", X) is cpu.forward


@WITHOUT_CUDA
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_needs_a_device_says_so(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    words = f"backend '{name}' cannot run: no CUDA device"
    with pytest.raises(BackendError, match=f"^{words}$"):
        use_backend(name)
    assert obstacle("qk_norm_rope", name, "cuda") == "no CUDA device"


def test_a_forced_backend_that_cannot_run_the_op_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("aapt_kernels.backend._forced", "triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    words = "backend 'triton' cannot run qk_norm_rope on a cpu tensor: it takes CUDA tensors"
    with pytest.raises(BackendError, match=f"^{words}$"):
        qk_norm_rope(X, X, None, None, None, None)
    assert obstacle("causal_conv3d_backward", "triton", "cuda") == "no kernel for this op yet"


def test_interpreted_triton_takes_cpu_tensors_and_only_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("aapt_kernels.backend._implementations", {"op": {"triton": abs}})
    monkeypatch.setattr("aapt_kernels.backend._limits", {"op": {}})
    with use_backend("triton"):
        assert resolve("op", X) is abs
    assert obstacle("op", "triton", "cuda") == "it takes CPU tensors"
    with pytest.raises(BackendError, match="backend 'reference' cannot run op on a cpu tensor"):
        resolve("op", X)


WITH_SIMULATOR = pytest.mark.skipif(bool(no_sim()), reason=str(no_sim()))


@WITH_SIMULATOR
def test_the_simulator_runs_the_kernel_and_only_by_name():
    q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    assert resolve("kv_append", q) is kv_append_cpu.forward
    with use_backend("sim"):
        assert resolve("kv_append", q) is torch.ops.aapt_sim.kv_append
    assert obstacle("kv_append", "sim", "cuda") == "it takes CPU tensors"
    assert obstacle("qk_norm_rope", "sim", "cpu") == "no kernel for this op yet"


@WITH_SIMULATOR
def test_the_simulator_has_the_limits_of_the_kernel():
    words = "backend 'sim' cannot run kv_append on a cpu tensor: it takes bfloat16"
    with use_backend("sim"), pytest.raises(BackendError, match=f"^{words}"):
        resolve("kv_append", X)


def test_a_build_without_the_simulator_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("aapt_kernels._library.FOLDER", tmp_path)
    monkeypatch.setattr("aapt_kernels._library.no_simulator", _library.no_simulator.__wrapped__)
    words = "^backend 'sim' cannot run: this build has no simulator: `make build`"
    with pytest.raises(BackendError, match=words):
        use_backend("sim")


def test_the_fast_cpu_code_is_for_cpu_tensors_only():
    assert obstacle("qk_norm_rope", "cpu", "cuda") == "it takes CPU tensors"
    assert obstacle("qk_norm_rope", "reference", "cuda") is None


def test_the_sm90_kernel_is_for_other_devices_no_option(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert obstacle("kv_append", "cuda", "cuda") == "the device is not sm_90 but (8, 0)"


def test_a_limit_of_a_kernel_makes_auto_go_on_and_a_name_fail(monkeypatch):
    limits = {"qk_norm_rope": {"cpu": lambda q: "not this one"}}
    monkeypatch.setattr("aapt_kernels.backend._limits", limits)
    assert resolve("qk_norm_rope", X) is ref.reference_forward
    words = "backend 'cpu' cannot run qk_norm_rope on a cpu tensor: not this one"
    with use_backend("cpu"), pytest.raises(BackendError, match=f"^{words}$"):
        resolve("qk_norm_rope", X)


def test_backends_lists_every_op():
    rows = {(row.op, row.device): row for row in backends()}
    for op in ("block_causal_attention", "cached_attention", "causal_conv3d", "kv_append"):
        assert rows[op, "cpu"].backend == "cpu"
