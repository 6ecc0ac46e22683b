"""Published speeds of other systems, and what each figure leaves out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        figure: As its makers or the named tester give it.
        leaves_out: Work that a player waits for and the figure does not contain, or a condition
            that is not stated.
        source: Repository, thread or paper in which both can be read.
    """

    system: str
    figure: str
    leaves_out: str
    source: str


PUBLISHED = (
    Published(
        "AAPT",
        "8B, 736x416, one H100: 24.8 fps",
        "which parts of a step are timed is not said",
        "arXiv 2506.09350, Table 4",
    ),
    Published(
        "Self-Forcing with TAEHV",
        "1.3B, 832x480, one H100: 12 frames in 344 ms, 34.9 fps",
        "the refresh pass is a figure of its own, 35 to 40 ms on a GB200",
        "NVIDIA/flashdreams, benchmarks page",
    ),
    Published(
        "LongLive 2",
        "5B, 1280x704: 24.8 fps",
        "the GPU is not stated; others measure 18.6 fps on an H100, 14.1 with the decoder",
        "NVlabs/LongLive#103",
    ),
    Published(
        "OmniDreams",
        "2B, 1280x704, GB300: 8 frames in 118 ms, 68 fps",
        "the update of the cache, 42 ms: 50 fps if nothing overlaps it",
        "NVIDIA/flashdreams, docs/source/models/omnidreams.md",
    ),
    Published(
        "Krea realtime",
        "14B, 832x480, one B200: 11 fps",
        "others measure 3.6 to 4.3 fps on an H100",
        "daydreamlive/scope#55",
    ),
    Published(
        "Waypoint-1.5",
        "1.2B, 1280x720, one RTX 5090: 56 fps in BF16, 72 in 8 bits",
        "a tester's 68.8 ms per 4 frames is at 1024x512, on an RTX PRO 6000",
        "NVIDIA/flashdreams, docs/source/models/waypoint.md",
    ),
    Published(
        "Matrix-Game 3",
        "5B, 1280x704: 40 fps",
        "the number of GPUs is not stated; several, and a decoder beside, are recommended",
        "SkyworkAI/Matrix-Game, Matrix-Game-3/README.md",
    ),
    Published(
        "LingBot-World 2",
        "14B, 1280x720: 60 fps",
        "the code of that deployment; others reach about 5 fps",
        "vllm-project/vllm-omni#6672",
    ),
    Published(
        "Helios",
        "14B, 640x384, one H100: 19.5 fps",
        "users dispute it",
        "PKU-YuanGroup/Helios#73",
    ),
    Published(
        "cuDNN attention in FP8",
        "1024 queries, 62208 keys, 9 heads, H200: 581 TFLOP/s",
        "the quantisation of queries, keys and values",
        "NVIDIA/cudnn-frontend, benchmark results",
    ),
)
