"""Use the operators without the model: one layer, trained in parallel and streamed frame by frame.

Both ways give the same output, also after the ring of the cache has wrapped; the script prints the
largest difference: `python examples/kernels_alone.py`.
"""

import torch

from aapt_kernels import (
    FrameLayout,
    KVCache,
    block_causal_attention,
    cached_attention,
    kv_append,
    qk_norm_rope,
)

HEADS, HEAD_DIM, TEXT, TOKENS, FRAMES, WINDOW = 6, 32, 24, 40, 20, 6


def main() -> None:
    torch.manual_seed(0)
    layout = FrameLayout(TEXT, TOKENS, FRAMES, WINDOW)
    q, k, v = torch.randn(3, 1, layout.query_length, HEADS, HEAD_DIM)
    norm = torch.rand(HEAD_DIM) + 0.5
    angles = torch.rand(layout.query_length, HEAD_DIM // 2) * 6
    angles[:TEXT] = 0  # text has no position
    cos, sin = angles.cos(), angles.sin()

    q_all, k_all = qk_norm_rope(q, k, norm, norm, cos, sin)
    parallel = block_causal_attention(q_all, k_all, v, layout)[:, TEXT:]

    cache = KVCache(
        1, 1, HEADS, HEAD_DIM, text_tokens=TEXT, tokens_per_frame=TOKENS, window_frames=WINDOW
    )
    cache.write_text(0, k_all[:, :TEXT], v[:, :TEXT])
    streamed = []
    for frame in range(FRAMES):
        rows = slice(TEXT + frame * TOKENS, TEXT + (frame + 1) * TOKENS)
        new = (x[:, rows] for x in (q, k, v))
        q_frame = kv_append(*new, cache, 0, norm, norm, cos[rows], sin[rows])
        streamed.append(cached_attention(q_frame, cache, 0))
        cache.advance()
    difference = (torch.cat(streamed, dim=1) - parallel).abs().max()
    print(f"{FRAMES} frames, window {WINDOW}: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
