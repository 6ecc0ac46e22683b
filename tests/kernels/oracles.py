"""Oracles that share no code with the package."""

import torch


def spec_mask(layout, text_lens=None):
    """Return (batch or 1, query, key) bool, one pair at a time from the words of docs/method.md#3.

    The whole sequence of an integer `past_frames` is sink frames 0 ... S-1, some frames that fell
    out of the window, the past, and the new frames; indices are counted so that the first past
    frame comes right after the sink, which hides nothing: the window is counted backwards.
    """
    text, tokens = layout.text_tokens, layout.tokens_per_frame
    sink = layout.sink_frames
    if layout.past_frames is None:
        query_frames = key_frames = list(range(layout.frames))
    else:
        first_new = sink + layout.past_frames
        query_frames = [first_new + f for f in range(layout.frames)]
        key_frames = list(range(first_new)) + query_frames
    queries = [None] * text + [f for f in query_frames for _ in range(tokens)]
    keys = [None] * text + [f for f in key_frames for _ in range(tokens)]

    def sees(query_frame, key_index, key_frame, length):
        if key_frame is None:
            return key_index < length
        if query_frame is None:
            return False
        if key_frame > query_frame:
            return False
        if key_frame < sink or layout.window_frames is None:
            return True
        return query_frame - key_frame <= layout.window_frames

    lengths = [text] if text_lens is None else text_lens.tolist()
    return torch.tensor(
        [
            [[sees(q, index, k, length) for index, k in enumerate(keys)] for q in queries]
            for length in lengths
        ]
    ).reshape(len(lengths), len(queries), len(keys))


def rotate(x, cos, sin):
    """Half-split rotation in float64; x (B, L, H, D), cos and sin (L, D / 2)."""
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)


def normalize(x, weight, eps):
    """RMSNorm in float64, over head_dim for a weight (D,), over all heads of a token for (H, D)."""
    x = x.double()
    mean = x.square().mean((-1,) if weight.dim() == 1 else (-2, -1), keepdim=True)
    return x * torch.rsqrt(mean + eps) * weight.double()


def attend(q, k, v, seen, scale, *, q_sink=None, sink=None, e4m3=False):
    """Attention in float64: q (B, L, H, D) to k and v (B, K, H, D), of which each sample sees the
    keys seen (B, K). q_sink, if any, meets the keys of the slice `sink`. e4m3: q and the weights
    are rounded as docs/method.md#16 says, the weights at the maximum of all scores. Returns out and
    the log-sum-exp (B, H, L)."""

    def rounded(x):
        return x.float().to(torch.float8_e4m3fn).double()

    def scores_of(q, k):
        q = q.double()
        if e4m3:
            unit = q.norm(dim=-1, keepdim=True).clamp(min=1e-30) / 448
            q = rounded(q / unit) * unit
        return torch.einsum("bqhd,bkhd->bhqk", q, k) * scale

    # A weight of zero would not hide NaN
    k, v = (x.double().masked_fill(~seen[..., None, None], 0) for x in (k, v))
    scores = scores_of(q, k)
    if q_sink is not None:
        scores[..., sink] = scores_of(q_sink, k[:, sink])
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    if e4m3:
        weights = rounded(weights * 256) / 256
    out = torch.einsum("bhqk,bkhd->bqhd", weights / total, v)
    return out, (highest + total.log())[..., 0]


def hadamard_matrix(size):
    """The Hadamard matrix over sqrt(size) in float64, by Sylvester's construction."""
    result = torch.ones(1, 1, dtype=torch.float64)
    while len(result) < size:
        result = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), result)
    return result / size**0.5


def round_to_e4m3(x):
    """Round to 4 significant bits, 2^-9 at the finest and 448 at the most, ties to even."""
    x = x.double().clamp(-448, 448)
    exponent = torch.where(x == 0, torch.ones_like(x), x.abs()).log2().floor().clamp(min=-6)
    unit = torch.exp2(exponent - 3)
    return (x / unit).round() * unit
