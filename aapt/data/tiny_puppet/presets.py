"""Writes the pose scripts that come with the package, see `aapt.streaming.poses`.

Run `python -m aapt.data.tiny_puppet.presets --out FOLDER`.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from .motions import MOTIONS, Body, keypoints, sample_joints

FPS = 12.0  # of a file; points between are interpolated
LENGTHS = {"show": 10.0, **{name: 4.0 for name in MOTIONS if name != "free"}}  # seconds
SEEDS = {"show": 12}  # others have seed 5


def preset(name: str) -> list[list[list[float]]]:
    """Return the points of a preset, [x, y] each, rounded to a hundredth of a pixel. "show" is all
    motions in turn."""
    rng = np.random.default_rng(SEEDS.get(name, 5))
    seconds = np.arange(round(LENGTHS[name] * FPS) + 1) / FPS
    joints = sample_joints(seconds, rng, None if name == "show" else name)
    return keypoints(joints, Body(), aspect=1.0).round(4).tolist()


def write_presets(folder: Path) -> None:
    """Write a JSON file for each preset."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LENGTHS:
        script = {"fps": FPS, "keypoints": preset(name)}
        (folder / f"{name}.json").write_text(json.dumps(script, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the pose scripts of the package.")
    parser.add_argument("--out", type=Path, required=True)
    write_presets(parser.parse_args().out)
