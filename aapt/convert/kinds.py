"""Kinds of checkpoints: everything about a model that its tensors do not say."""

from dataclasses import dataclass
from typing import Literal

from ..model.config import FewStepConfig, SamplingConfig


def shifted(steps: tuple[float, ...], shift: float) -> tuple[float, ...]:
    """Return the times of steps in thousandths, u = step / 1000, under a timestep shift:
    shift u / (1 + (shift - 1) u), which their configurations call warped."""
    units = [step / 1000 for step in steps]
    return tuple(shift * unit / (1 + (shift - 1) * unit) for unit in units)


def unipc_times(count: int, shift: float) -> tuple[float, ...]:
    """Return the times of Wan's UniPC: `count` equal steps that begin at 999, shifted."""
    return shifted(tuple(999 * (1 - k / count) for k in range(count)), shift)


FOUR_STEPS = shifted((1000, 750, 500, 250), 5.0)
# Wan's own: bright colours, overexposed, static, blurred details, subtitles, paintings, ugly, ...
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，"
    "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
APACHE = "Apache-2.0"
ACADEMIC = "License Terms of RollingForcing: academic use alone, no commercial or production use"
NON_COMMERCIAL = "CC-BY-NC-SA-4.0: no commercial use, and what is made from them stays so"


@dataclass(frozen=True)
class Kind:
    """Sampling of one kind of checkpoints, and the past that they see.

    Attributes:
        weights: The public repository and its files.
        source: The project's configuration from which the values below were read.
        licence: Licence of the weights.
        sampling: A `SamplingConfig` for weights that only start training.
        chunk, window_frames, sink_frames, sink_distance: See `ModelConfig`; frames are latent.
        entries: See `find_tensors`.
        lora_alpha: Alpha of a low-rank adaptation whose file has none; the rank unless given.
    """

    weights: str
    source: str
    licence: str
    sampling: FewStepConfig | SamplingConfig
    chunk: int = 1
    window_frames: int = 20  # with the newest one the 21 frames that Wan 2.1 is trained on
    sink_frames: int = 0
    sink_distance: Literal["absolute", "clamped"] = "absolute"
    entries: tuple[str, ...] = ("generator", "generator_ema", "model")
    height: int = 480
    width: int = 832
    fps: int = 16
    lora_alpha: float | None = None


DIFFUSION_UNIPC = FewStepConfig(
    unipc_times(50, 5.0), solver="unipc", guidance=3.0, negative_prompt=NEGATIVE_PROMPT
)
AVERAGED_FIRST = ("generator_ema", "generator", "model")
CAUSAL_FORCING = "github.com/thu-ml/Causal-Forcing at 1fc7bbc, configs/"

KINDS = {
    "wan2.1-t2v": Kind(
        "Wan-AI/Wan2.1-T2V-1.3B, -14B, and their -Diffusers",
        "github.com/Wan-Video/Wan2.1, README.md: 50 steps, shift 8, guidance 6 for 1.3B",
        APACHE,
        SamplingConfig(steps=50, shift=8.0, guidance=6.0),
    ),
    "wan2.2-ti2v-5b": Kind(
        "Wan-AI/Wan2.2-TI2V-5B and its -Diffusers",
        "github.com/Wan-Video/Wan2.2, wan/configs/wan_ti2v_5B.py: 50 steps, shift 5, guidance 5",
        APACHE,
        SamplingConfig(steps=50, shift=5.0, guidance=5.0),
        window_frames=30,
        height=704,
        width=1280,
        fps=24,
    ),
    "causal-forcing-framewise": Kind(
        "zhuhz22/Causal-Forcing framewise/causal_forcing.pt, causal_ode.pt, causal_cd.pt",
        CAUSAL_FORCING + "causal_forcing_dmd_framewise.yaml",
        APACHE,
        FewStepConfig(FOUR_STEPS),
        entries=AVERAGED_FIRST,
    ),
    "causal-forcing-framewise-2step": Kind(
        "zhuhz22/Causal-Forcing causal-forcing++/framewise-2step.pt",
        CAUSAL_FORCING + "causal_forcing_dmd_framewise_2step.yaml",
        APACHE,
        FewStepConfig(shifted((1000, 500), 5.0), first_times=FOUR_STEPS),
        entries=AVERAGED_FIRST,
    ),
    "causal-forcing-framewise-1step": Kind(
        "zhuhz22/Causal-Forcing causal-forcing++/framewise-1step.pt",
        CAUSAL_FORCING + "causal_forcing_dmd_framewise_1step.yaml",
        APACHE,
        FewStepConfig((1.0,), first_times=FOUR_STEPS),
        entries=AVERAGED_FIRST,
    ),
    "causal-forcing-chunkwise": Kind(
        "zhuhz22/Causal-Forcing chunkwise/causal_forcing.pt, causal_ode.pt, causal_cd.pt",
        CAUSAL_FORCING + "causal_forcing_dmd_chunkwise.yaml",
        APACHE,
        FewStepConfig(FOUR_STEPS),
        chunk=3,
    ),
    "causal-forcing-framewise-diffusion": Kind(
        "zhuhz22/Causal-Forcing framewise/ar_diffusion.pt",
        CAUSAL_FORCING + "ar_diffusion_tf_framewise.yaml; 50 steps of UniPC in its pipeline",
        APACHE,
        DIFFUSION_UNIPC,
    ),
    "causal-forcing-chunkwise-diffusion": Kind(
        "zhuhz22/Causal-Forcing chunkwise/ar_diffusion.pt",
        CAUSAL_FORCING + "ar_diffusion_tf_chunkwise.yaml; 50 steps of UniPC in its pipeline",
        APACHE,
        DIFFUSION_UNIPC,
        chunk=3,
    ),
    "causal-forcing-longvideo": Kind(
        "zhuhz22/Causal-Forcing chunkwise/longvideo.pt",
        "github.com/thu-ml/Causal-Forcing at 1fc7bbc, long_video/configs/rolling_forcing_dmd.yaml",
        APACHE,
        FewStepConfig(FOUR_STEPS, rolling=True),
        chunk=3,
        window_frames=17,  # 21 frames with the sink and the newest one
        sink_frames=3,
        sink_distance="clamped",
        entries=AVERAGED_FIRST,
    ),
    "rolling-forcing": Kind(
        "TencentARC/RollingForcing checkpoints/rolling_forcing_dmd.pt",
        "github.com/TencentARC/RollingForcing at a1477d0, configs/rolling_forcing_dmd.yaml",
        ACADEMIC,
        FewStepConfig(shifted((1000, 800, 600, 400, 200), 5.0), rolling=True),
        chunk=3,
        window_frames=17,
        sink_frames=3,
        sink_distance="clamped",
        entries=AVERAGED_FIRST,
    ),
    "one-forcing": Kind(
        "JiaqiFeng/OneForcing checkpoints/one_forcing.pt",
        "github.com/Aurora-edu/One-Forcing at ca345b3, config.yaml",
        f"{APACHE} is that of their repository; read the card of the weights",
        FewStepConfig((1.0,)),
    ),
    "self-forcing": Kind(
        "gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt",
        "github.com/guandeh17/Self-Forcing at 33593df, configs/self_forcing_dmd.yaml, README.md",
        NON_COMMERCIAL,
        FewStepConfig(FOUR_STEPS),
        chunk=3,
        entries=AVERAGED_FIRST,
    ),
    "causvid": Kind(
        "tianweiy/CausVid autoregressive_checkpoint/model.pt",
        "github.com/tianweiy/CausVid at ca21150, configs/wan_causal_dmd.yaml: times not warped",
        NON_COMMERCIAL,
        FewStepConfig((1.0, 0.757, 0.522)),
        chunk=3,
    ),
    "longlive-1.3b": Kind(
        "Efficient-Large-Model/LongLive-1.3B models/longlive_base.pt with --lora models/lora.pt",
        "github.com/NVlabs/LongLive, branch v1.0, configs/longlive_inference.yaml",
        f"{APACHE} since November 2025",
        FewStepConfig(FOUR_STEPS),
        chunk=3,
        window_frames=8,  # 12 frames with the sink and the newest one
        sink_frames=3,
        lora_alpha=256,
    ),
    "longlive-2-5b": Kind(
        "Efficient-Large-Model/LongLive-2.0-5B model_bf16.pt",
        "github.com/NVlabs/LongLive at 7860ad9, configs/inference.yaml, inference_i2v.yaml",
        APACHE,
        FewStepConfig(unipc_times(4, 5.0), solver="unipc", picture_in_chunk=True),
        chunk=8,
        window_frames=23,  # 32 frames with the sink and the newest one
        sink_frames=8,
        height=704,
        width=1280,
        fps=24,
        lora_alpha=128,
    ),
}
