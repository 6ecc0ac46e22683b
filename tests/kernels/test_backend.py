"""Choosing a backend: what auto takes, what a name refuses, and that nobody falls back."""

import re
from types import SimpleNamespace

import pytest
import torch

from aapt_kernels import _library, backend, backends, qk_norm_rope, use_backend
from aapt_kernels.backend import BackendError, choose, no_sim, obstacle, resolve
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
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
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


class OnDevice:
    """A tensor of a CUDA device of this machine, as far as the choice of a backend looks at it."""

    def __init__(self, index):
        self.device = torch.device("cuda", index)


def test_auto_asks_the_device_of_the_tensor_and_not_the_current_one(monkeypatch):
    """An H100 is current; beside it are a device of sm_80 and one of sm_75."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    capabilities = {None: (9, 0), 0: (9, 0), 1: (8, 0), 2: (7, 5)}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.get_device_capability", lambda d=None: capabilities[d and d.index]
    )
    monkeypatch.setattr("aapt_kernels.backend._old_driver", lambda: None)
    monkeypatch.setattr("aapt_kernels.backend.implementation", lambda op, name: abs)
    monkeypatch.setattr("aapt_kernels.backend._limits", {"kv_append": {}})
    monkeypatch.setattr("aapt_kernels._library.load", lambda: None)
    assert [choose("kv_append", OnDevice(i)) for i in range(3)] == ["cuda", "triton", "reference"]
    words = "it takes a device of sm_80 or later, not of (7, 5)"
    assert obstacle("kv_append", "triton", "cuda:2") == words
    assert obstacle("kv_append", "cuda", "cuda:1") == "the device is not sm_90 but (8, 0)"


def test_a_driver_older_than_the_runtime_is_a_reason(monkeypatch):
    versions = [13000, 12040]
    operators = SimpleNamespace(cuda_versions=lambda: tuple(versions))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(torch.ops, "aapt_sm90", operators)
    monkeypatch.setattr("aapt_kernels._library.load", lambda: None)
    monkeypatch.setattr("aapt_kernels.backend._old_driver", backend._old_driver.__wrapped__)
    words = "the kernels are built with CUDA 13 and the driver is for CUDA 12; install driver 580"
    assert obstacle("kv_append", "cuda", "cuda:0") == f"{words} or later"
    versions[1] = 13020
    assert backend.no_sm90() is None
    monkeypatch.setattr("aapt_kernels._library.load", lambda: "it is not built")
    assert backend.no_sm90() == "it is not built"


def test_the_library_says_which_cuda_it_is_built_with():
    if not hasattr(torch.ops.aapt_sm90, "cuda_versions"):
        pytest.skip("this build has no sm_90a kernels")
    runtime, driver = torch.ops.aapt_sm90.cuda_versions()
    assert runtime >= 12000 and (driver > 0) == torch.cuda.is_available()


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


def test_backends_of_a_device_and_precision_say_why_not_better(monkeypatch):
    rows = {row.op: row for row in backends("cpu", torch.bfloat16, 64)}
    assert {row.backend for row in rows.values()} == {"cpu"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = {row.op: row for row in backends("cuda", torch.bfloat16, 64)}
    assert rows["kv_append"].backend is None
    assert "cuda: no CUDA device" in rows["kv_append"].reason
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr("aapt_kernels.backend.no_sm90", lambda device=None: None)
    monkeypatch.setattr("aapt_kernels.backend.implementation", lambda op, name: abs)
    rows = {row.op: row for row in backends("cuda", torch.bfloat16, 64)}
    assert {row.backend for row in rows.values()} == {"cuda"}
    rows = {row.op: row for row in backends("cuda", torch.float32, 128)}
    assert rows["causal_conv3d"].reason == "cuda: it takes bfloat16, got torch.float32"
    attention = rows["block_causal_attention"]
    assert attention.backend == "reference"
    assert re.fullmatch(
        "cuda: it takes bfloat16 .*; triton: it takes .* up to 64.*", attention.reason
    )
