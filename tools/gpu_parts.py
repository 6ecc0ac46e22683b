"""The parts of `make gpu`: which cases run, in which order, within how many seconds."""

from dataclasses import dataclass
from math import inf

SECONDS = 450.0  # of a part, its build included
QUARTER_HOUR = 540.0  # of `first`: leaves time to start the machine and to repeat a few cases
PATIENCE = 120.0  # for a case, its compilations included

CACHED = "tests/kernels/test_cached_attention_sm90.py"
CACHED_E4M3 = "tests/kernels/test_cached_attention_e4m3.py"
TRAINING = "tests/kernels/test_block_causal_attention_sm90.py"
CONV = "tests/kernels/test_causal_conv3d_sm90.py"
APPEND = "tests/kernels/test_kv_append_sm90.py"
APPEND_E4M3 = "tests/kernels/test_kv_append_e4m3.py"
TRITON = "tests/kernels/test_triton_kernels.py"
TRITON_CONV = "tests/kernels/test_causal_conv3d_triton.py"
TRITON_FUSED = "tests/kernels/test_triton_fused.py"
E4M3 = (APPEND_E4M3, CACHED_E4M3, "tests/kernels/test_past_dtype.py")
E4M3 += ("tests/kernels/test_self_check.py",)
SHIFTED_SLABS = "tests/kernels/test_shifted_slabs.py"
GRAPHS = "tests/aapt/vae/test_stream.py::test_graphs_on_a_device"
STEP_GRAPH = "tests/aapt/streaming/test_memory.py::test_a_step_on_a_device_is_one_graph"
CHUNK_GRAPHS = "tests/aapt/streaming/test_memory.py::test_a_chunk_on_a_device_is_one_graph"


@dataclass(frozen=True)
class Group:
    """Cases that share a pytest process, until one of them hangs or loses the device.

    cases: beginnings of case ids, in the order to run; a file's name alone takes all its cases.
    seconds: the group's deadline. patience: seconds until a case counts as hung, unless its marker
    `patience` allows more. options: further arguments of pytest. turns: run one case of every test
    function, then the second of every function, and so on.
    """

    name: str
    cases: tuple[str, ...]
    seconds: float = inf
    patience: float = PATIENCE
    options: tuple[str, ...] = ()
    turns: bool = False

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(case.split("::")[0] for case in self.cases))


@dataclass(frozen=True)
class Part:
    what: str
    groups: tuple[Group, ...]
    modules: tuple[str, ...] = ()  # to import, besides those of every part
    seconds: float = SECONDS


STREAM_MODULES = ("einops", "safetensors", "PIL")
BENCH_STREAM = "benchmarks/bench_stream.py"


def quick(name: str, *cases: str, seconds: float, **options) -> Group:
    """A group of `first`: a hang costs 20 seconds."""
    return Group(name, cases, seconds, patience=20, **options)


FIRST = (
    quick(
        "descriptors and fragments",
        "benchmarks/bench_calibration.py::test_the_kernels_compile",
        "benchmarks/bench_calibration.py::test_descriptors_of_a_halo_tile",
        "benchmarks/bench_calibration.py::test_descriptors",
        "benchmarks/bench_calibration.py::test_fragments",
        "benchmarks/bench_calibration.py",
        seconds=60,
    ),
    quick(
        "one case per kernel",
        f"{APPEND}::test_writes_the_frame_and_nothing_else[cuda-2-7-3-128-weight_dtype0-",
        f"{APPEND_E4M3}::test_writes_the_frame_and_nothing_else[cuda-2-7-3-128-False-True]",
        f"{APPEND}::test_a_captured_step_follows_the_counter",
        f"{CACHED}::test_frame_lengths[cuda-129-128]",
        f"{CACHED}::test_pinned_rotation[cuda-1-128]",
        f"{CONV}::test_sizes[cuda-one pixel tile]",
        f"{CONV}::test_sizes[cuda-shared pixels]",
        f"{CONV}::test_sizes[cuda-few channels]",
        f"{CONV}::test_upsampling_folds_into_the_weights[cuda-both]",
        f"{CONV}::test_next_norm[cuda-shared pixels-False]",
        f"{CONV}::test_a_graph_replays_with_changed_weights[cuda-",
        f"{TRAINING}::test_forward[cuda-odd-False-128]",
        f"{TRAINING}::test_backward[cuda-odd-False-128-False]",
        f"{TRAINING}::test_backward[cuda-odd-False-128-True]",
        f"{TRAINING}::test_deterministic_means_bit_for_bit[cuda",
        f"{TRITON}::test_norm_and_rotation[dtype0-per head-2-",
        f"{TRITON}::test_append_writes_the_frame_and_nothing_else[dtype0-per head-2-",
        f"{TRITON}::test_attention[dtype0-(2, 32, 60, 4, (4, 4), 1, False, [0, 3, 5])-None]",
        f"{TRITON}::test_training_attention[dtype0-(FrameLayout(text_tokens=5, ",
        f"{TRITON_CONV}::test_error_is_at_most_twice_plain_pytorch[chunk-channels last-dtype0]",
        f"{TRITON_FUSED}::test_modulated_norm[dtype0-2-6-192-2-gated update]",
        f"{TRITON_FUSED}::test_bias_gelu[dtype0-shape0]",
        f"{CACHED_E4M3}::test_ring_cold_filling_and_wrapped[cuda-True-9]",
        seconds=60,
    ),
    quick("graphs of a stream", f"{GRAPHS}[light-dtype0]", STEP_GRAPH, GRAPHS, seconds=45),
    quick("ceilings", "benchmarks/bench_machine.py", seconds=45, options=("--quick",)),
    quick(
        "attention against peers",
        "benchmarks/bench_cached_attention.py::test_cached_attention[1196 q x 32 frames, 24 heads-",
        "benchmarks/bench_cached_attention.py::test_cached_attention[1196 q x 32 frames, 3 heads-",
        "benchmarks/bench_cached_attention.py::test_cached_attention[3600 q x 17 frames, 24 heads-",
        "benchmarks/bench_block_causal_attention.py::test_block_causal_attention[31 x 1196, ",
        seconds=60,
        options=("--quick",),
    ),
    quick(
        "the other kernels against peers",
        "benchmarks/bench_kv_append.py::test_kv_append[1196 q x 32 frames, 24 heads-",
        "benchmarks/bench_kv_append.py::test_kv_append[1196 q x 32 frames, 3 heads-",
        "benchmarks/bench_vae_decoder.py::test_steady_step_of_the_light_decoder",
        "benchmarks/bench_vae_decoder.py::test_convolution",
        "benchmarks/bench_qk_norm_rope.py::test_qk_norm_rope[1196 q x 32 frames, 24 heads-",
        seconds=60,
        options=("--quick",),
    ),
    quick("a step of aapt-8b", f"{BENCH_STREAM}::test_aapt_8b[416-736]", seconds=60),
    quick("the bundled model", f"{BENCH_STREAM}::test_bundled_model", seconds=45),
    quick(
        "the other quick tests",
        *(CACHED, CONV, APPEND, *E4M3, TRAINING),
        seconds=150,
        options=("-m", "not slow"),
        turns=True,
    ),
    quick(
        "the other quick tests of Triton",
        *(TRITON, TRITON_FUSED, TRITON_CONV),
        seconds=inf,
        options=("-m", "not slow"),
        turns=True,
    ),
)

WORLDS_SECONDS = 540.0  # stages resume, so a rented machine can be given back in between
BENCH_WORLDS = "benchmarks/bench_worlds.py"

PARTS = {
    "first": Part(
        "all of it in small, for a quarter of an hour on a machine with little installed",
        FIRST,
        modules=STREAM_MODULES,
        seconds=QUARTER_HOUR,
    ),
    "worlds": Part(
        "the whole recipe of the bundled world in larger batches, one stage after the other",
        (Group("stages", (f"{BENCH_WORLDS}::test_stage",), patience=WORLDS_SECONDS),),
        modules=(*STREAM_MODULES, "rich"),
        seconds=WORLDS_SECONDS,
    ),
    "calibrate": Part(
        "descriptors and fragments on the chip; the chip's own ceilings",
        (
            Group("ceilings", ("benchmarks/bench_machine.py",)),
            Group("descriptors and fragments", ("benchmarks/bench_calibration.py",)),
        ),
    ),
    "test": Part(
        "the tests that need the GPU, full sweeps included",
        (
            Group(
                "kernels",
                (CACHED, CONV, APPEND, TRAINING, *E4M3, TRITON, TRITON_FUSED, TRITON_CONV),
                turns=True,
            ),
            # In a process of its own: it sets the environment for the extension
            Group("the convolution's plan B", (SHIFTED_SLABS,)),
            Group("graphs of a stream", (GRAPHS, STEP_GRAPH, CHUNK_GRAPHS)),
        ),
        modules=("einops", "safetensors"),
    ),
    "kernels": Part(
        "every microbenchmark against its peers",
        (
            Group(
                "kernels against peers",
                (
                    "benchmarks/bench_cached_attention.py",
                    "benchmarks/bench_kv_append.py",
                    "benchmarks/bench_qk_norm_rope.py",
                    "benchmarks/bench_modulated_norm.py",
                    "benchmarks/bench_vae_decoder.py",
                ),
            ),
        ),
        modules=("einops", "safetensors"),
    ),
    # A process for each: a case that fails keeps its tensors, 16 GB of weights among them.
    "stream": Part(
        "whole steps: the bundled model, and aapt-8b with random weights",
        tuple(
            Group(name, (f"{BENCH_STREAM}::{case}",))
            for name, case in (
                ("the bundled model", "test_bundled_model"),
                ("aapt-8b at 736x416", "test_aapt_8b[416-736]"),
                ("aapt-8b at 1280x720", "test_aapt_8b[720-1280]"),
            )
        ),
        modules=STREAM_MODULES,
    ),
}
