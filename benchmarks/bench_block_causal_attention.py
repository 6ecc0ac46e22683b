"""`block_causal_attention` on a CPU against dense-mask SDPA and a loop of SDPA over frames.

Targets: forward and backward of "video" at least 1.5 times as fast as the dense mask and no slower
than the loop. Run with `pytest benchmarks/bench_block_causal_attention.py`.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from aapt_kernels import FrameLayout, block_causal_attention

CASES = {  # layout, batch, heads, head_dim
    "video": (FrameLayout(0, 128, 32, 6), 1, 8, 64),
    "tiny-world training": (FrameLayout(24, 40, 8, 6), 8, 6, 32),
    "tiny-world segment": (FrameLayout(24, 40, 8, 6, past_frames=6), 8, 6, 32),
}


dense_mask = cache(FrameLayout.dense_mask)  # made once, outside the timing


def dense_sdpa(q, k, v, layout):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(layout)).transpose(1, 2)


def sdpa_per_frame(q, k, v, layout):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    text, tokens = layout.text_tokens, layout.tokens_per_frame
    outs = []
    if text:
        outs.append(F.scaled_dot_product_attention(*(x[:, :, :text] for x in (q, k, v))))
    for frame in range(layout.frames):
        start = text + frame * tokens
        seen = [slice(*interval) for interval in layout.intervals(frame)]
        keys, values = (torch.cat([x[:, :, part] for part in seen], dim=2) for x in (k, v))
        outs.append(F.scaled_dot_product_attention(q[:, :, start : start + tokens], keys, values))
    return torch.cat(outs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_block_causal_attention(against, case, dtype, direction):
    layout, batch, heads, head_dim = CASES[case]
    training = direction != "forward"
    lengths = (layout.query_length, layout.key_length, layout.key_length)
    q, k, v = (
        torch.randn(batch, length, heads, head_dim, dtype=dtype, requires_grad=training)
        for length in lengths
    )
    dout = torch.randn_like(q)

    def timed(function):
        def run():
            out = function(q, k, v, layout)
            if training:
                torch.autograd.grad(out, (q, k, v), dout)

        return run

    rivals = {"dense-mask SDPA": timed(dense_sdpa), "SDPA per frame": timed(sdpa_per_frame)}
    against(timed(block_causal_attention), rivals)
