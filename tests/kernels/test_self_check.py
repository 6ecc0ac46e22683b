"""The check of what a float8 cache has stored: it sees planted faults, and says what to do. The
check of attention is in test_cached_attention_e4m3.py."""

import re

import pytest
import torch

from aapt_kernels import KVCache, SelfCheckError, kv_append, use_backend
from aapt_kernels.backend import _implementations
from aapt_kernels.kv_append import ref

E4M3 = torch.float8_e4m3fn
TEXT, TOKENS, HEADS, HEAD_DIM, LAYER = 6, 20, 3, 32, 1


class Stream:
    """A cache whose scales fit, and random frames."""

    def __init__(self, device="cpu", head_dim=HEAD_DIM, **options):
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.head_dim = device, head_dim
        self.cache = KVCache(
            *(1, 2, HEADS, head_dim),
            **dict(text_tokens=TEXT, tokens_per_frame=TOKENS, window_frames=2),
            **dict(dtype=E4M3, use_hadamard=True, device=device) | options,
        )
        self.cache.k_scale[:] = torch.tensor([0.02, 0.03, 0.05])
        self.cache.v_scale[:] = torch.tensor([0.05, 0.03, 0.02])
        self.weights = (self.normal(2, head_dim).abs() + 0.5).float().unbind()
        angles = self.normal(TOKENS, head_dim // 2).float()
        self.tables = angles.cos(), angles.sin()

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator).bfloat16().to(self.device)

    def frame(self):
        return [self.normal(1, TOKENS, HEADS, self.head_dim) for _ in range(3)]

    def append(self, *frame):
        frame = frame or self.frame()
        kv_append(*frame, self.cache, LAYER, *self.weights, *self.tables)


def planted(**changes):
    """Return an implementation of kv_append that changes its arguments, by name, before it calls
    the reference."""
    names = "q k v k_cache v_cache step q_weight k_weight cos sin cos_sink sin_sink eps text_tokens"
    names += " tokens_per_frame window_frames sink_frames k_scale v_scale use_hadamard"

    def forward(*arguments):
        given = dict(zip(names.split(), arguments, strict=True))
        given |= {name: change(given[name]) for name, change in changes.items()}
        return ref.forward(*given.values())

    return forward


def exchanged(x):
    """Exchange neighbouring tokens of x (B, L, H, D)."""
    return x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


FAULTS = {
    "keys by the first head's scale": ("k", dict(k_scale=lambda x: x[:1].expand(HEADS))),
    "values by the first head's scale": ("v", dict(v_scale=lambda x: x[:1].expand(HEADS))),
    "keys times their scale": ("k", dict(k_scale=lambda x: 1 / x)),
    "keys without the Hadamard matrix": ("k", dict(use_hadamard=lambda x: False)),
    "keys turned by the angle of another token": ("k", dict(cos=lambda x: x.roll(1, 0))),
    "keys turned the other way": ("k", dict(sin=lambda x: -x)),
    "keys without the weight of their norm": ("k", dict(k_weight=torch.ones_like)),
    "keys in the order of other tokens": ("k", dict(k=exchanged)),
    "values in the order of other tokens": ("v", dict(v=exchanged)),
    "values with channels and tokens exchanged": (
        "v",
        dict(v=lambda x: x.permute(0, 2, 3, 1).reshape(1, HEADS, TOKENS, -1).transpose(1, 2)),
    ),
    "heads exchanged": ("k", dict(k=lambda x: x.flip(2))),
    "the slot of the frame before": ("k", dict(step=lambda x: x - 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(monkeypatch, fault):
    name, changes = FAULTS[fault]
    monkeypatch.setitem(_implementations["kv_append"], "reference", planted(**changes))
    stream = Stream()
    stream.cache.step.fill_(3)
    words = (
        rf"kv_append: expected {name} as stored to be within 6 % of what was given, got .* % in "
        rf"head . of layer 1; rounding loses ..?\.. %, so the fault is in kv_append; run it under "
        rf'use_backend\("reference"\), and report it'
    )
    with use_backend("reference"), pytest.raises(SelfCheckError, match=words) as caught:
        stream.append()
    assert caught.value.loss.endswith("so the fault is in kv_append")  # not in the model


@pytest.mark.parametrize("use_hadamard", [False, True])
def test_what_is_right_passes(backend, use_hadamard):
    stream = Stream(use_hadamard=use_hadamard)
    cache = stream.cache
    cache.write_text(LAYER, *(x[:, :4] for x in stream.frame()[1:]))
    for _ in range(4):
        stream.append()
        cache.advance()
    cache.load_prefix(LAYER, *cache.prefix(LAYER), 4)
    calls = {("write_text", LAYER, 4), ("kv_append", LAYER, TOKENS), ("load_prefix", LAYER, 60)}
    assert cache.checked == calls


def test_keys_that_change_the_scores_too_much_are_refused(backend):
    """Outliers lose no more of a key than others, but more of a score."""
    weight = torch.ones(128)
    weight[::32] = 8
    streams = [Stream(head_dim=128, use_hadamard=use) for use in (True, False)]
    for stream in streams:
        stream.weights = [weight, weight]
        stream.cache.k_scale.fill_(0.1)
    streams[0].append()
    words = (
        "^kv_append: expected rounded keys to change scores by at most 0.15, got 0.[23]. in head 0 "
        "of layer 1; make the cache with use_hadamard=True or with dtype=torch.bfloat16$"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            streams[1].append()


def test_nothing_is_known_of_zeros_and_of_nan():
    """The next call is checked too."""
    stream = Stream()
    for value in (0.0, torch.nan):
        q, k, v = stream.frame()
        v[:, :, 1] = value
        stream.append(q, k, v)
        assert not stream.cache.checked
    stream.append()
    assert stream.cache.checked


@pytest.mark.parametrize(
    ("call", "scale", "factor", "lost"),
    [
        ("write_text", "k_scale", 1e-3, "9.*"),  # cut at 448
        ("write_text", "v_scale", 1e6, "100.0"),  # below the smallest
        ("load_prefix", "v_scale", 1e-3, "9.*"),
    ],
)
def test_a_scale_that_does_not_fit_is_named(call, scale, factor, lost):
    stream = Stream()
    cache = stream.cache
    getattr(cache, scale)[LAYER, 1] *= factor
    words = (
        f"^{call}: expected {scale[0]} as stored to be within 6 % of what was given, got {lost} % "
        f"in head 1 of layer 1; set {scale}[1, 1] of the cache to the largest number of the head "
        f"/ 448, or make the cache with dtype=torch.bfloat16$"
    )
    k, v = stream.frame()[1:]
    with pytest.raises(RuntimeError, match=words.replace("[1, 1]", r"\[1, 1\]")):
        if call == "write_text":
            cache.write_text(LAYER, k[:, :TEXT], v[:, :TEXT])
        else:
            cache.load_prefix(LAYER, k, v, 1)
    getattr(cache, scale)[LAYER, 1] /= factor
    stream.append()


def test_the_first_call_of_a_kernel_is_checked(kernel, schedule):
    schedule(multiprocessors=2, seed=1)
    stream = Stream(kernel, head_dim=128)
    stream.tables = [x.to(kernel) for x in stream.tables]
    stream.weights = [x.to(kernel) for x in stream.weights]
    stream.append()
    assert stream.cache.checked == {("kv_append", LAYER, TOKENS)}
    stream.cache.k_scale[LAYER, 2] = 1e-3
    stream.append()  # has been checked
    stream.cache.recheck()
    words = re.escape(
        "in head 2 of layer 1; set k_scale[1, 2] of the cache to the largest number of the head / "
        "448, or make the cache with dtype=torch.bfloat16"
    )
    with pytest.raises(RuntimeError, match=words):
        stream.append()
    stream.cache.self_check = False
    stream.append()
