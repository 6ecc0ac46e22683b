"""The backends of the autoencoder's convolutions on an sm_90 device, as `auto` chooses them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from aapt.vae import CausalVAE, light, original, wan
from aapt_kernels import backend

CONFIGS = {"light": light(), "original": original(), "wan": wan()}
STRIDE = 8  # its place among the operator's arguments


class Convolutions(TorchDispatchMode):
    """The arguments of every `causal_conv3d` that runs in this mode."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aapt.causal_conv3d.default:
            self.calls.append(args)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def sm90(monkeypatch):
    """bfloat16 tensors without numbers; backends are chosen as on a device with all kernels."""
    monkeypatch.setitem(backend.PREFERENCE, "cpu", backend.PREFERENCE["cuda"])
    monkeypatch.setattr(backend, "unavailable", lambda name: None)
    monkeypatch.setattr(backend, "takes", lambda name, device: "cpu")
    monkeypatch.setattr(backend, "implementation", lambda op, name: name)
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode():
        yield
    torch.set_default_dtype(torch.float32)


def backends(run):
    """(arguments, backend) of every convolution of `run`."""
    with Convolutions() as convolutions, torch.no_grad():
        run()
    return [(call, backend.resolve("causal_conv3d", *call)) for call in convolutions.calls]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_strides_and_reads_colours_in_triton(sm90, name, batch):
    vae = CausalVAE(CONFIGS[name])
    video = torch.empty(batch, 3, 9, 32, 48)
    chosen = backends(lambda: vae.encode(video))
    for index, (call, name) in enumerate(chosen):
        elsewhere = index == 0 or max(call[STRIDE]) > 1
        assert name == ("triton" if elsewhere else "cuda"), f"convolution {index}: {name}"
    assert sum(max(call[STRIDE]) > 1 for call, _ in chosen) >= 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_never_leaves_the_kernel(sm90, name, batch):
    vae = CausalVAE(CONFIGS[name])
    latent = torch.empty(batch, 16, 1, 4, 6)

    def run():
        _, state = vae.decode_frame(latent, pixels=True)
        vae.decode_frame(latent, state, pixels=True)

    chosen = backends(run)
    assert len(chosen) >= 60 and {name for _, name in chosen} == {"cuda"}


def test_without_triton_pytorch_strides(sm90, monkeypatch):
    missing = {"triton": "Triton is not installed"}
    monkeypatch.setattr(backend, "unavailable", missing.get)
    vae = CausalVAE(wan())
    video = torch.empty(1, 3, 5, 16, 16)
    names = [name for _, name in backends(lambda: vae.encode(video))]
    assert set(names) == {"reference", "cuda"} and names[0] == "reference"
