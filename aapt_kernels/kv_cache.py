"""KVCache: pinned text, pinned first frame and a ring of frames, in fixed memory
(docs/method.md#5).

cache = KVCache(1, layers, heads, head_dim, text_tokens=24, tokens_per_frame=40,
                window_frames=6, dtype=torch.bfloat16)
for layer in range(layers):
    cache.write_text(layer, text_k[layer], text_v[layer])
while playing:
    for layer in range(layers):
        q = kv_append(q, k, v, cache, layer, q_weight, k_weight, cos, sin)
        out = cached_attention(q, cache, layer)
    cache.advance()

A step may append n frames at once, which see each other: q, k and v then have the tokens of n
frames, and cache.advance(n) ends the step.
"""

import copy

import torch
from torch import Tensor

from .backend import deferred, kernels_of, may_run_kernels, obstacle
from .checks import FLOATS, check_dense_rows, check_device, check_dtype, check_integer, check_shape
from .precision import as_bits, dequantise, hadamard, quantise
from .schemas import ops
from .self_check import check_stored, is_due

QUANTISED = (torch.float8_e4m3fn,)
KEY_GROUP = 16  # keys of a float8 cache in 16 bytes


class KVCache:
    """Keys and values of every layer: k and v (layers, batch, capacity, heads, head_dim), views
    of a head-major buffer. A float8 cache stores v with the keys of a column side by side, as FP8
    products need, in rows of a multiple of 16 bytes.

    capacity: `[text | sink | ring of window_frames + 1]`, in tokens. step: () int64 on the device,
    number of frames that the finished steps have appended, so the index of the frame now being
    made. text_lens: (batch,) int64, number of the text slot's last rows that are text.

    Frame i < sink_frames is stored in its pinned slot, every later frame in ring slot
    (i - sink_frames) mod (window_frames + 1). Nothing is ever shifted, and no step reads the
    counter on the host.

    dtype: of k and v in memory. compute_dtype: of the keys and values that the cache takes and
    returns, and of q: that of k and v, or for float8_e4m3fn any of the others, bfloat16 unless
    given. k_scale, v_scale: of a float8 cache, (layers, heads) float32, 1 until the caller writes
    others into them, before the first key; a cache stores k / k_scale and v / v_scale. None for any
    other dtype. use_hadamard: of a float8 cache whose head_dim is a power of two, False unless
    given. The cache then stores keys times the Hadamard matrix over sqrt(head_dim), and `kv_append`
    returns queries times this matrix. Scores stay as they are, and large channels are spread over
    all of a head.

    self_check: whether a float8 cache is checked at its first use, True unless given. The first
    call for a layer and a number of tokens of `kv_append`, `write_text` and `load_prefix` compares
    a sample of keys and values, as they are stored, with those given; the first call of
    `cached_attention` with a kernel that rounds queries and weights to float8 compares a sample of
    rows with float32. `SelfCheckError` names the head that loses too much, and what to do. A check
    waits for the device. It is left out in a captured or compiled step, so call each step once
    before. `recheck` asks for another check.

    past_dtype: float8_e4m3fn to store the frames of the past in it, while text, sink and the newest
    frame stay in `dtype`; None unless given. `past` is then the cache of these frames, with their
    scales and `use_hadamard`, k and v are `[text | sink | newest]`, and a step appends one frame,
    which `advance` rounds as it ends the step.

    workspace: memory that the kernels of cached_attention reuse in every call, int32 for sm_90a,
    float32 for Triton, where a step of one frame fits in it; None where neither runs, and in a
    clone before its first call. So all calls on one cache belong on one stream of the device.

    A cache serves inside and outside of inference mode, wherever it was made. Sizes are integers
    of any kind; TypeError or ValueError, by name, for another.
    """

    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    workspace: Tensor | None = None
    use_hadamard: bool = False
    self_check: bool = True
    past: "PastFrames | None" = None
    _compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        batch: int,
        layers: int,
        heads: int,
        head_dim: int,
        *,
        text_tokens: int,
        tokens_per_frame: int,
        window_frames: int,
        sink_frames: int = 1,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        use_hadamard: bool = False,
        self_check: bool = True,
        past_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ):
        sizes = {}
        for name, value, least in (
            ("batch", batch, 1),
            ("layers", layers, 1),
            ("heads", heads, 1),
            ("head_dim", head_dim, 1),
            ("text_tokens", text_tokens, 0),
            ("tokens_per_frame", tokens_per_frame, 1),
            ("window_frames", window_frames, 0),
            ("sink_frames", sink_frames, 0),
        ):
            sizes[name] = check_integer(name, value, least)
        batch, layers, heads, head_dim = list(sizes.values())[:4]
        self.text_tokens = sizes["text_tokens"]
        self.tokens_per_frame = sizes["tokens_per_frame"]
        self.window_frames = sizes["window_frames"]
        self.sink_frames = sizes["sink_frames"]
        self._choose_dtypes(dtype, compute_dtype)
        if past_dtype is None:
            self._choose_hadamard(use_hadamard, dtype, head_dim)
        else:
            self._check_past(dtype, past_dtype)
            self.past = PastFrames(
                *(batch, layers, heads, head_dim),
                text_tokens=0,
                tokens_per_frame=self.tokens_per_frame,
                window_frames=self.window_frames,
                sink_frames=0,
                dtype=past_dtype,
                compute_dtype=dtype,
                use_hadamard=use_hadamard,
                self_check=self_check,
                device=device,
            )
        self.self_check = bool(self_check)
        self.checked: set[tuple[str, int, int]] = set()  # op, layer and number of tokens
        # Head-major in memory, because every attention reads the keys of one head in one piece
        outer = (layers, batch, heads)
        options = dict(dtype=dtype, device=device)
        # A tensor of inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            if dtype in QUANTISED:
                keys = -(-self.capacity // KEY_GROUP) * KEY_GROUP
                k = torch.zeros(*outer, keys, head_dim, **options)
                v = torch.zeros(*outer, head_dim, keys, **options).transpose(3, 4)
            else:
                k, v = (torch.zeros(*outer, self.capacity, head_dim, **options) for _ in range(2))
            self.k, self.v = (x[:, :, :, : self.capacity].transpose(2, 3) for x in (k, v))
            self.step = torch.zeros((), dtype=torch.int64, device=device)
            self.text_lens = torch.zeros(batch, dtype=torch.int64, device=device)
            if dtype in QUANTISED:
                self.k_scale, self.v_scale = torch.ones(2, layers, heads, device=device).unbind()
            self.workspace = self._new_workspace()

    def _choose_dtypes(self, dtype: torch.dtype, compute_dtype: torch.dtype | None) -> None:
        if dtype not in (*FLOATS, *QUANTISED):
            names = ", ".join(str(x) for x in (*FLOATS, *QUANTISED))
            raise TypeError(f"dtype: expected one of {names}, got {dtype}")
        if compute_dtype is None:
            compute_dtype = torch.bfloat16 if dtype in QUANTISED else dtype
        allowed = FLOATS if dtype in QUANTISED else (dtype,)
        if compute_dtype not in allowed:
            names = " or ".join(str(x) for x in allowed)
            raise TypeError(
                f"compute_dtype: expected {names} for a cache of {dtype}, got {compute_dtype}"
            )
        self._compute_dtype = compute_dtype

    def _check_past(self, dtype: torch.dtype, past_dtype: torch.dtype) -> None:
        if past_dtype not in QUANTISED or dtype in QUANTISED:
            names = " or ".join(str(x) for x in QUANTISED)
            raise TypeError(
                f"past_dtype: expected {names} beside a wider dtype, got {past_dtype} beside "
                f"{dtype}"
            )
        if self.window_frames < 1:
            raise ValueError(
                f"window_frames: expected at least 1 with past_dtype, got {self.window_frames}"
            )

    def _choose_hadamard(self, use_hadamard: bool, dtype: torch.dtype, head_dim: int) -> None:
        if use_hadamard and dtype not in QUANTISED:
            raise ValueError(f"use_hadamard: expected False for a cache of {dtype}, got True")
        if use_hadamard and head_dim & (head_dim - 1):
            raise ValueError(
                f"use_hadamard: expected False for a head_dim of {head_dim}, which is no power of "
                f"two, got True"
            )
        self.use_hadamard = bool(use_hadamard)

    def _new_workspace(self) -> Tensor | None:
        sizes = [self.tokens_per_frame]
        kernels = kernels_of(self.k.device)
        head_dims = (128,) if self.k.dtype in QUANTISED else (64, 128)
        fits = self.compute_dtype == torch.bfloat16 and self.k.shape[-1] in head_dims
        if kernels is not None and fits:
            make = kernels.cached_attention_workspace
            sizes.append(self.ring_frames - 1)
        elif obstacle("cached_attention", "triton", self.k.device):
            return None
        else:
            make = deferred(f"{__package__}.cached_attention", "workspace")
        with torch.inference_mode(False), torch.no_grad():
            return make(self.k[0], *sizes)

    def ready_workspace(self) -> Tensor | None:
        """Return `workspace`, made now if a clone has none yet and a kernel may ask for it."""
        if self.workspace is not None or not may_run_kernels(self.k.device):
            return self.workspace
        if not torch.compiler.is_compiling():
            self.workspace = self._new_workspace()
        return self.workspace

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the queries, keys and values that the cache takes and returns."""
        return self._compute_dtype or self.k.dtype

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Scales of one layer's keys and values, (heads,) each, None for none, as the ops take
        them."""
        if self.k_scale is None:
            return None, None
        return self.k_scale[layer], self.v_scale[layer]

    def _stored(self, call: str, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of `compute_dtype` as the memory keeps them. call: who asks."""
        k_scale, v_scale = self.scales(layer)
        turned = hadamard(k) if self.use_hadamard else k
        stored = quantise(turned, k_scale, self.k.dtype), quantise(v, v_scale, self.v.dtype)
        if is_due(self, call, layer, k):
            check_stored(self, call, layer, k.shape[1], stored, (k, v))
        return stored

    @property
    def ring_frames(self) -> int:
        """Slots of the ring: window and newest frame, or the newest frame alone if `past` has the
        window. A step appends at most as many frames."""
        return self.window_frames + 1 if self.past is None else 1

    @property
    def capacity(self) -> int:
        """Tokens of one layer: those of text, sink and ring."""
        frames = self.sink_frames + self.ring_frames
        return self.text_tokens + frames * self.tokens_per_frame

    @property
    def integers(self) -> tuple[int, int, int, int]:
        """text_tokens, tokens_per_frame, frames of the ring besides the newest, and sink_frames, as
        the ops take them."""
        return self.text_tokens, self.tokens_per_frame, self.ring_frames - 1, self.sink_frames

    def write_text(self, layer: int, k: Tensor, v: Tensor, text_lens: Tensor | None = None) -> None:
        """Replace one layer's text by k and v (batch, length <= text_tokens, heads, head_dim).

        text_lens (batch,): number of first rows that are text, all unless given; it is one for all
        layers. Text is stored at the end of its slot, next to the frames, so that a frame sees one
        piece of memory. The rest of the slot is zero: padding, NaN included, is forgotten. Frames
        already in the cache stay as they were made. A float8 cache stores k / k_scale and
        v / v_scale, k times the Hadamard matrix with `use_hadamard`.

        Raises IndexError, ValueError or TypeError if an argument does not fit the cache.
        """
        self.check_layer(layer)
        _, batch, _, heads, head_dim = self.k.shape
        length = check_shape("k", k, (batch, "length", heads, head_dim), "this cache")[1]
        check_shape("v", v, tuple(k.shape))
        if length > self.text_tokens:
            raise ValueError(
                f"k: expected at most {self.text_tokens} text tokens, the slot of this cache, "
                f"got {length}"
            )
        self._check_dtype({"k": k, "v": v})
        check_device({"cache": self.k, "k": k, "v": v})
        if text_lens is not None:
            check_shape("text_lens", text_lens, (batch,))
            check_dtype({"text_lens": text_lens}, (torch.int32, torch.int64))
        with torch.no_grad():
            if text_lens is None:
                self.text_lens.fill_(length)
            else:
                self.text_lens.copy_(text_lens).clamp_(0, length)
            shift = length - self.text_lens[:, None]  # rows of padding, moved to the front
            row = torch.arange(length, device=k.device) - shift
            source = row.clamp(min=0)[..., None, None].expand_as(k)
            texts = (x.gather(1, source).masked_fill_(row[..., None, None] < 0, 0) for x in (k, v))
            stored = self._stored("write_text", layer, *texts)
            for cached, text in zip((self.k, self.v), stored, strict=True):
                cached[layer, :, : self.text_tokens - length].zero_()
                cached[layer, :, self.text_tokens - length : self.text_tokens].copy_(text)

    def advance(self, frames: int = 1) -> None:
        """Finish a step: the frames that every layer has appended are now part of the past, and
        rounded to `past_dtype`, if any.

        frames: number of frames that each layer appended in this step, at most window_frames + 1,
        1 with `past_dtype`. TypeError or ValueError for another, RuntimeError if a check fails.
        """
        frames = check_integer("frames", frames, 1)
        if frames > self.ring_frames:
            raise ValueError(
                f"frames: expected at most {self.ring_frames}, the ring of this cache, got {frames}"
            )
        self.step.add_(frames)
        if self.past is not None:
            newest = [x[:, :, -self.tokens_per_frame :] for x in (self.k, self.v)]
            for layer, frame in enumerate(zip(*newest, strict=True)):
                self.past.append(layer, *frame)
            # After a sink frame the newest slot is an old one: what it fills is not seen until the
            # next frame fills it again
            self.past.step.copy_((self.step - self.sink_frames).clamp(min=0))

    def reset(self) -> None:
        """Forget every frame, and NaN with it: their keys and values become zero. Text stays."""
        self.step.zero_()
        with torch.no_grad():
            self.k[:, :, self.text_tokens :].zero_()
            self.v[:, :, self.text_tokens :].zero_()
        if self.past is not None:
            self.past.reset()

    def recheck(self) -> None:
        """Check every layer again in its next calls, if `self_check` is on: after new weights or
        scales, or now and then in a long stream."""
        self.checked.clear()
        if self.past is not None:
            self.past.recheck()

    def clone(self) -> "KVCache":
        """Return an independent copy, to branch a stream or to keep its state for training.

        The copy holds the state alone; a copy that streams on gets a workspace of its own.
        """
        with torch.inference_mode(False), torch.no_grad():
            twin = copy.copy(self)
            for name in self.tensors().keys() & vars(self).keys():
                # With the strides of a float8 cache
                setattr(twin, name, copy.deepcopy(getattr(self, name)))
        if self.past is not None:
            twin.past = self.past.clone()
        twin.workspace = None
        twin.checked = set(self.checked)
        return twin

    def __getstate__(self) -> tuple[dict, torch.dtype]:
        # As bytes, because PyTorch writes float8 into a pickle and cannot read it. Memory for the
        # kernels and what was checked are this device's.
        bits = {"k": as_bits(self.k), "v": as_bits(self.v)}
        return vars(self) | bits | {"workspace": None, "checked": set()}, self.k.dtype

    def __setstate__(self, state: tuple[dict, torch.dtype]) -> None:
        values, dtype = state
        vars(self).update(values)
        if dtype in QUANTISED:
            self.k, self.v = self.k.view(dtype), self.v.view(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state by name, not copied: k, v, step, text_lens, for a float8
        cache k_scale and v_scale, and those of `past` as past.k, ..."""
        names = ("k", "v", "step", "text_lens")
        names = names if self.k_scale is None else (*names, "k_scale", "v_scale")
        tensors = {name: getattr(self, name) for name in names}
        if self.past is not None:
            tensors |= {f"past.{name}": x for name, x in self.past.tensors().items()}
        return tensors

    def check_twin(self, other: "KVCache") -> None:
        """Raise ValueError unless the other cache has the sizes, dtypes, use of the Hadamard matrix
        and device of this one."""
        forms = [
            (
                *(cache.integers, *cache.k.shape, cache.k.dtype, cache.compute_dtype),
                *(cache.use_hadamard, cache.k.device),
                None if cache.past is None else cache.past.k.dtype,
            )
            for cache in (self, other)
        ]
        if forms[0] != forms[1]:
            raise ValueError(f"cache: expected one of {forms[0]}, got {forms[1]}")
        if self.past is not None:
            self.past.check_twin(other.past)

    def load(self, other: "KVCache") -> None:
        """Copy the state of a cache of the same shape, scales included, into the memory of this
        one, so that a captured step stays valid. ValueError as `check_twin`."""
        self.check_twin(other)
        theirs = other.tensors()
        for name, ours in self.tensors().items():
            ours.copy_(theirs[name])

    @property
    def bytes(self) -> int:
        """Memory of the state: keys, values, scales and counters, without `workspace`."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def past_frames(self) -> int:
        """Number of frames that `prefix` returns besides the sink. Waits for the device."""
        return min(self.window_frames, max(0, int(self.step) - self.sink_frames))

    def prefix(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return copies of one layer's `[sink | past]` keys and values, oldest first, with which
        FrameLayout(past_frames=cache.past_frames) continues the sequence in parallel:
        (batch, (sink_frames + past_frames) * tokens_per_frame, heads, head_dim) in `compute_dtype`.

        Call it between steps; it waits for the device. RuntimeError before the sink is complete.
        """
        self.check_layer(layer)
        step = int(self.step)
        if step < self.sink_frames:
            raise RuntimeError(
                f"prefix: expected at least {self.sink_frames} finished steps, got {step}"
            )
        index = torch.arange(self.sink_frames, device=self.k.device)
        if self.past is not None:
            sink, past = self._frames(layer, index), self.past.prefix(layer)
            return tuple(torch.cat(x, dim=1) for x in zip(sink, past, strict=True))
        past = torch.arange(-self.past_frames, 0, device=self.k.device) + step - self.sink_frames
        return self._frames(layer, torch.cat([index, self.sink_frames + past % self.ring_frames]))

    def _frames(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the keys and values of slots, in `compute_dtype`."""
        frames = (-1, self.tokens_per_frame)

        def take(x: Tensor, scale: Tensor | None) -> Tensor:
            slots = as_bits(x)[layer, :, self.text_tokens :].unflatten(1, frames)
            taken = slots.index_select(1, index).flatten(1, 2).view(x.dtype)
            return dequantise(taken, scale, self.compute_dtype)

        k_scale, v_scale = self.scales(layer)
        k, v = take(self.k, k_scale), take(self.v, v_scale)
        return hadamard(k) if self.use_hadamard else k, v

    def load_prefix(self, layer: int, k: Tensor, v: Tensor, step: int) -> None:
        """Fill one layer with the frames before frame `step` that were made elsewhere, in place of
        all that it had: the inverse of `prefix`, for frames that were computed in parallel or anew.

        k, v: `[sink | past]`, oldest first and rotated, as `prefix` returns them at `step`. `step`
        becomes that of the cache: give one for all layers. Text stays. Raises IndexError,
        ValueError or TypeError if an argument does not fit the cache.
        """
        self.check_layer(layer)
        step = check_integer("step", step, 0)
        _, batch, _, heads, head_dim = self.k.shape
        sink = min(step, self.sink_frames)
        past = min(step - sink, self.window_frames)
        shape = (batch, (sink + past) * self.tokens_per_frame, heads, head_dim)
        why = f"{sink} sink and {past} past frames before frame {step}"
        check_shape("k", k, shape, why)
        check_shape("v", v, shape, why)
        self._check_dtype({"k": k, "v": v})
        check_device({"cache": self.k, "k": k, "v": v})
        if self.past is not None:
            split = sink * self.tokens_per_frame
            self.past.load_prefix(layer, k[:, split:], v[:, split:], step - sink)
            k, v, past = k[:, :split], v[:, :split], 0
        order = torch.arange(step - past, step, device=self.k.device) - sink
        index = torch.cat(
            [
                torch.arange(sink, device=self.k.device),
                self.sink_frames + order % self.ring_frames,
            ]
        )
        with torch.no_grad():
            stored = self._stored("load_prefix", layer, k, v)
            for cached, given in zip((self.k, self.v), stored, strict=True):
                slots = as_bits(cached)[layer, :, self.text_tokens :]
                slots = slots.unflatten(1, (-1, self.tokens_per_frame)).zero_()
                frames = as_bits(given).unflatten(1, (-1, self.tokens_per_frame))
                slots.index_copy_(1, index, frames)
            self.step.fill_(step)

    def check_layer(self, layer: int) -> None:
        """Raise IndexError, or TypeError for another type, unless the cache has this layer."""
        if not isinstance(layer, (int, torch.SymInt)) and not hasattr(layer, "__index__"):
            raise TypeError(f"layer: expected an integer, got {layer!r}")
        if not 0 <= layer < self.k.shape[0]:
            raise IndexError(f"layer: expected 0 ... {self.k.shape[0] - 1}, got {layer}")

    def check_frames(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Raise IndexError, ValueError or TypeError unless all tensors are n frames for this cache,
        (batch, n * tokens_per_frame, heads, head_dim), with one n from 1 to window_frames + 1."""
        self.check_layer(layer)
        _, batch, _, heads, head_dim = self.k.shape
        length = None
        for name, tensor in tensors.items():
            if length is None:  # the first one gives the number of frames
                expected = (batch, "n * tokens_per_frame", heads, head_dim)
                length = check_shape(name, tensor, expected, "this cache")[1]
                frames, rest = length // self.tokens_per_frame, length % self.tokens_per_frame
                if rest != 0 or not 1 <= frames <= self.ring_frames:
                    raise ValueError(
                        f"{name}: expected {self.tokens_per_frame} tokens for each of 1 to "
                        f"{self.ring_frames} frames, the ring of this cache, got {length}"
                    )
            check_shape(name, tensor, (batch, length, heads, head_dim), "this cache")
        check_dense_rows(tensors)
        self._check_dtype(tensors)
        check_device({"cache": self.k, **tensors})

    def _check_dtype(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype != self.compute_dtype:
                raise TypeError(
                    f"{name}: expected {self.compute_dtype} like cache, got {tensor.dtype}"
                )


class PastFrames(KVCache):
    """The past of a cache with `past_dtype`: a ring of window_frames frames and no other, in which
    `step` counts the finished frames besides the sink.

    signs: those of the Hadamard matrix, (head_dim, head_dim) in `compute_dtype`, None without
    `use_hadamard`; queries leave `kv_append` without it, because the newest frame has none.
    """

    signs: Tensor | None = None

    def __init__(self, *sizes: int, **options):
        super().__init__(*sizes, **options)
        if self.use_hadamard:
            with torch.inference_mode(False), torch.no_grad():
                matrix = hadamard(torch.eye(self.k.shape[-1], device=self.k.device))
                self.signs = matrix.sign().to(self.compute_dtype)

    @property
    def ring_frames(self) -> int:
        """Slots of the ring: the window."""
        return self.window_frames

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the frame `step`, k and v (batch, tokens_per_frame, heads, head_dim), normalised
        and rotated. RuntimeError if a check fails, see `KVCache`."""
        caches = self.k[layer], self.v[layer], self.step
        options = (*self.integers, *self.scales(layer), self.use_hadamard)
        ops.kv_append.default(k, k, v, *caches, *[None] * 6, 0.0, *options)
        if is_due(self, "advance", layer, k):
            slot = self.step % self.ring_frames * self.tokens_per_frame
            rows = slot + torch.arange(self.tokens_per_frame, device=k.device)
            stored = [as_bits(x)[:, rows].view(x.dtype) for x in caches[:2]]
            check_stored(self, "advance", layer, k.shape[1], stored, (k, v))
