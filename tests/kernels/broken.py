"""Block-causal attention on inputs of which a part holds NaN or infinity."""

import torch

from aapt_kernels import block_causal_attention

from .oracles import spec_mask


def normal(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def make_tensors(layout, dtype, clamped, size=(2, 2, 16), device="cpu"):
    """Return random inputs by name, and the gradients of out and lse. size: batch, heads and
    head_dim."""
    batch, heads, head_dim = size
    q, k, v = (
        normal(batch, length, heads, head_dim, dtype=dtype).to(device)
        for length in (layout.query_length, layout.key_length, layout.key_length)
    )
    tensors = {"q": q, "k": k, "v": v}
    if clamped:
        frame_rows = layout.query_length - layout.text_tokens
        tensors["q_sink"] = normal(batch, frame_rows, heads, head_dim, dtype=dtype).to(device)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = normal(batch, heads, layout.query_length, dtype=precise).to(device)
    return tensors, torch.randn_like(q), dlse


def differentiate(tensors, layout, text_lens, dout, dlse):
    """Return out, lse, dq, dk, dv and dq_sink; rows that see nothing have no gradient of their
    lse."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    options = dict(layout=layout, text_lens=text_lens, return_lse=True)
    out, lse = block_causal_attention(**leaves, **options)
    dlse = torch.where(lse == -torch.inf, 0, dlse)
    return out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))


def check_broken_frame(layout, tensors, dout, dlse, names, bad):
    """Break frame 2 of the query in the named tensors. Rows that do not see it keep output and
    gradient, and so do keys that no broken row sees. Return the results."""
    tokens = layout.tokens_per_frame
    query = slice(layout.text_tokens + 2 * tokens, layout.text_tokens + 3 * tokens)
    start = layout.key_length - layout.query_length
    key = slice(query.start + start, query.stop + start)
    results = []
    for value in (0.0, bad):
        for name in names:
            rows = key if name in ("k", "v") else query
            (dout if name == "dout" else tensors[name])[:, rows] = value
        results.append(differentiate(tensors, layout, None, dout, dlse))

    mask = spec_mask(layout)[0]
    broken_rows = torch.zeros(layout.query_length, dtype=torch.bool)
    broken_rows[query] = "q" in names or "dout" in names
    if "k" in names or "v" in names:
        broken_rows |= mask[:, key].any(1)
    broken_keys = mask[broken_rows].any(0)
    assert broken_rows.any() and not broken_rows.all()
    out_rows = torch.zeros_like(broken_rows) if names == ("dout",) else broken_rows
    sound = {"out": ~out_rows, "q": ~broken_rows, "k": ~broken_keys, "v": ~broken_keys}
    sound["q_sink"] = ~broken_rows[layout.text_tokens :]
    (out, lse, *gradients), (clean_out, clean_lse, *clean_gradients) = results[1], results[0]
    torch.testing.assert_close(lse[:, :, sound["out"]], clean_lse[:, :, sound["out"]])
    torch.testing.assert_close(out[:, sound["out"]], clean_out[:, sound["out"]])
    for name, ours, expected in zip(tensors, gradients, clean_gradients, strict=True):
        rows = sound[name]
        assert expected[:, rows].isfinite().all()
        torch.testing.assert_close(
            ours[:, rows], expected[:, rows], msg=lambda m, n=name: f"d{n}: {m}"
        )
    if bad != bad and names != ("dout",):  # what is seen is not swept away
        assert out[:, out_rows].isnan().any(-1).all()
    return results[1]
