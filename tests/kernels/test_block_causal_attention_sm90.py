"""The sm_90a kernels of block_causal_attention: simulated everywhere, and on a device if there is
one. Both run the same sources through the same host code. The oracle is the reference in float64.
"""

import itertools

import pytest
import torch

from aapt_kernels import FrameLayout, block_causal_attention
from aapt_kernels.block_causal_attention import ref
from aapt_kernels.block_causal_attention.cases import LAYOUTS
from aapt_kernels.testing import assert_error_ratio

LSE_TOLERANCE = 2e-5  # one key too many or too few costs more
OPS = torch.ops.aapt
NAMES = ("dq", "dk", "dv", "dq_sink")


class Case:
    """Random inputs of both directions, strided as a model makes them."""

    def __init__(
        self,
        device,
        layout,
        *,
        batch=1,
        heads=2,
        head_dim=64,
        text_lens=None,
        pinned=False,
        prefix_grad=True,
        scale=None,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(length, parts=1):
            x = torch.randn(batch, length, parts, heads, head_dim, generator=generator)
            return x.bfloat16().to(device).unbind(2)

        self.layout = layout
        query, key, text = layout.query_length, layout.key_length, layout.text_tokens
        self.q, _ = normal(query, 2)
        self.k, self.v, _ = normal(key, 3)
        (self.dout,) = normal(query)
        self.dlse = torch.randn(batch, heads, query, generator=generator).to(device)
        self.q_sink = normal(query - text, 2)[1] if pinned else None
        self.text_lens = None
        if text_lens is not None:
            self.text_lens = torch.tensor(text_lens).clamp(max=text).to(device)
        scale = head_dim**-0.5 if scale is None else scale
        self.arguments = (*layout.integers, scale, prefix_grad)

    def inputs(self, dtype):
        tensors = (self.q, self.k, self.v, self.text_lens, self.q_sink)
        return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]

    def forward(self):
        return OPS.block_causal_attention(*self.inputs(torch.bfloat16), *self.arguments)

    def check_forward(self):
        out, lse = self.forward()
        oracle, oracle_lse = ref.forward(*self.inputs(torch.float64), *self.arguments)
        baseline, _ = ref.forward(*self.inputs(torch.bfloat16), *self.arguments)
        assert_error_ratio(out, oracle, baseline)
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=0, atol=LSE_TOLERANCE)

    def backward(self, out, lse, dlse=True, deterministic=False):
        dlse = torch.where(lse.isfinite(), self.dlse, 0) if dlse else None
        return OPS.block_causal_attention_backward(
            self.dout,
            dlse,
            self.q,
            self.k,
            self.v,
            out,
            lse,
            self.text_lens,
            self.q_sink,
            *self.arguments,
            deterministic,
        )

    def check_backward(self, **options):
        out, lse = self.forward()
        gradients = self.backward(out, lse, **options)
        dlse = torch.where(lse.isfinite(), self.dlse, 0) if options.get("dlse", True) else None

        def plain(dtype):
            q, k, v, text_lens, q_sink = self.inputs(dtype)
            exact = ref.forward(q, k, v, text_lens, q_sink, *self.arguments)
            wide = dlse if dlse is None else dlse.to(exact[1].dtype)
            tensors = (self.dout.to(dtype), wide, q, k, v, *exact, text_lens, q_sink)
            return ref.backward(*tensors, *self.arguments, False)

        triples = zip(NAMES, gradients, plain(torch.float64), plain(torch.bfloat16), strict=True)
        for name, ours, oracle, baseline in triples:
            assert_error_ratio(ours, oracle, baseline, name)
        return gradients


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_forward(kernel, schedule, name, pinned, head_dim):
    schedule(multiprocessors=3, seed=len(name))
    heads = 1 if name == "large-frames" else 2
    Case(kernel, LAYOUTS[name], heads=heads, head_dim=head_dim, pinned=pinned).check_forward()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_backward(kernel, schedule, name, pinned, head_dim, deterministic):
    schedule(multiprocessors=3, seed=len(name))
    heads = 1 if name == "large-frames" else 2
    case = Case(kernel, LAYOUTS[name], heads=heads, head_dim=head_dim, pinned=pinned)
    case.check_backward(deterministic=deterministic)
