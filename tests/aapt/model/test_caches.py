"""Caches by name: what each stores, who can have it, and the scales of float8."""

import dataclasses

import pytest
import torch

from aapt.model.caches import (
    CACHES,
    CacheChoice,
    CacheError,
    check_cache,
    key_scale,
    loss_is_said,
    name_of,
    value_scale,
)
from aapt.model.float8 import quantise_blocks
from aapt.model.ulysses import Ulysses
from aapt_kernels import SelfCheckError

from ..helpers import CONFIG, SIZE, tiny_model, wan_transformer

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
WIDE = {"width": 64, "head_dim": 32, "rope_axes": (8, 12, 12)}


def families():
    return [tiny_model(**WIDE).transformer, wan_transformer(**WIDE)]


def chosen(transformer, name, dtype=BF16):
    transformer.cache_choice = CacheChoice(name)
    return transformer.new_cache(2, SIZE, dtype=dtype)


def test_what_a_name_stores():
    for transformer in families():
        found = {}
        for name in CACHES:
            cache = chosen(transformer, name)
            past = cache.past and cache.past.k.dtype
            found[name] = (cache.k.dtype, past, cache.compute_dtype, name_of(cache) == name)
        assert found == {
            "model": (BF16, None, BF16, True),
            "float8": (E4M3, None, BF16, True),
            "float8-past": (BF16, E4M3, BF16, True),
        }


@pytest.mark.parametrize("name", ["float8", "float8-past"])
@pytest.mark.parametrize(("change", "whole"), [(WIDE, True), ({}, False)])
def test_the_hadamard_matrix_is_for_powers_of_two_that_kernels_take(name, change, whole):
    cache = chosen(tiny_model(**change).transformer, name)
    assert (cache.past or cache).use_hadamard == whole


def test_a_cache_on_another_device_takes_no_memory():
    transformer = families()[0]
    own = chosen(transformer, "float8-past")
    paper = transformer.new_cache(2, SIZE, dtype=BF16, device=torch.device("meta"))
    assert paper.k.is_meta and paper.bytes == own.bytes


def test_a_name_that_means_nothing_is_refused():
    config, cpu = CONFIG, torch.device("cpu")
    expected = "^cache: expected one of model, float8, float8-past, got 'fp8'$"
    with pytest.raises(CacheError, match=expected):
        check_cache("fp8", config, 2, cpu)
    with pytest.raises(
        CacheError, match="^cache: .* a model whose steps make 3 latent frames, got"
    ):
        check_cache("float8-past", config, 2, cpu, step_frames=3)
    check_cache("float8", config, 2, cpu, step_frames=3)
    with pytest.raises(
        CacheError, match="^cache: expected model for a rolling model, .* got float8"
    ):
        check_cache("float8", config, 2, cpu, rolling=True)
    with pytest.raises(
        CacheError, match="^cache: .* a window of no frames, got float8-past, which"
    ):
        check_cache("float8-past", config, 0, cpu)


@pytest.mark.parametrize("name", ["float8", "float8-past"])
def test_a_device_without_float8_is_refused(monkeypatch, name):
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    expected = "^cache: expected model on cuda:0, which is sm_86 and has no float8, got "
    with pytest.raises(CacheError, match=expected + name + "; take a device of sm_89 or later"):
        check_cache(name, CONFIG, 2, device)
    check_cache("model", CONFIG, 2, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_cache(name, CONFIG, 2, device)
    large = dataclasses.replace(CONFIG, width=512, head_dim=256, rope_axes=(64, 96, 96))
    with pytest.raises(CacheError, match="^cache: .* a head_dim above 128, here 256, for which no"):
        check_cache(name, large, 2, device)


def test_no_key_is_cut_and_values_are_in_the_middle():
    for transformer in families():
        torch.manual_seed(0)
        for parameter in transformer.parameters():
            parameter.data.mul_(30 * torch.rand(()) + 0.01)  # sizes that a scale of 1 would not fit
        stream = transformer.blocks[1].video
        x = torch.randn(4000, CONFIG.width * 2, dtype=torch.float64)
        q, k, v = stream.project(x).unbind(-3)  # (rows, heads, head_dim)
        each = k if stream.k_norm.dim() == 1 else k.flatten(-2)
        normed = each / each.square().mean(-1, keepdim=True).sqrt()
        k = normed.view_as(k) * stream.k_norm
        stored = k / key_scale(stream)[:, None]
        assert stored.norm(dim=-1).max() <= 448 * 1.001 and stored.norm(dim=-1).mean() > 20
        stored = v / value_scale(stream)[:, None]
        assert torch.allclose(stored.square().mean((0, 2)).sqrt(), torch.tensor(4.0).double(), 0.1)


def test_scales_are_those_of_the_layer_and_of_rounded_weights():
    transformer = families()[0]
    transformer.blocks[2].video.k_norm.data.mul_(8)
    text = transformer.blocks[1].text
    text.qkv.weight.data[-CONFIG.width * 2 :].mul_(50)  # its values are larger than video's
    exact = chosen(transformer, "float8", torch.float64)
    ratio = exact.k_scale[2] / exact.k_scale[0]
    assert torch.allclose(ratio, torch.tensor(8.0)) and exact.k_scale.dtype == torch.float32
    assert torch.allclose(exact.v_scale[1], value_scale(text).float())
    quantise_blocks(transformer)
    rounded = chosen(transformer, "float8", torch.float64)
    assert torch.allclose(rounded.v_scale, exact.v_scale, rtol=0.02)
    assert not torch.equal(rounded.v_scale, exact.v_scale)


@pytest.mark.parametrize("name", ["float8", "float8-past"])
def test_a_rank_has_the_scales_of_its_heads(name):
    for transformer in families():
        for layer, block in enumerate(transformer.blocks):
            heads = block.video.qkv.weight.data.view(3, 2, 32, -1)
            heads[2, 1].mul_(3 + layer)
        whole = chosen(transformer, name, torch.float64)
        second = Ulysses()
        second.rank, second.size = 1, 2
        transformer.context = second
        half = chosen(transformer, name, torch.float64)
        whole, half = (cache if cache.past is None else cache.past for cache in (whole, half))
        assert torch.equal(half.k_scale, whole.k_scale[:, 1:])
        assert torch.equal(half.v_scale, whole.v_scale[:, 1:])


def test_weights_of_zero_give_a_scale():
    transformer = families()[0]
    for parameter in transformer.parameters():
        parameter.data.zero_()
    cache = chosen(transformer, "float8-past")
    assert (cache.past.k_scale == 1).all() and (cache.past.v_scale == 1).all()


def test_a_failed_check_says_what_a_user_can_do():
    with pytest.raises(CacheError) as caught, loss_is_said():
        raise SelfCheckError("kv_append: expected a, got b", "make the cache with c")
    assert str(caught.value) == (
        "cache: this model loses too much in float8; choose the cache model: "
        "kv_append: expected a, got b"
    )
