"""Train a model through the three stages in small, from rendered clips to a stream.

So few updates per stage show the machinery and teach next to nothing; `aapt train tiny-world` is
the whole recipe. Run it with `python examples/post_training.py`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from aapt import Control, StreamingGenerator
from aapt.runs.run import run
from aapt.training.curriculum import constant
from aapt.training.recipes import tiny_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--updates", type=int, default=20, help="per stage")
    parser.add_argument("--out", type=Path, default=Path("post-training"))
    options = parser.parse_args()

    whole = tiny_world()
    updates = {"steps": options.updates, "batch": 2}
    small = {"height": 48, "width": 64, "latent_frames": 9}  # a third of the model's picture
    clips = replace(whole.data["clips"], clips=options.clips, video_clips=8, **small)
    teaching = constant("clips", frames=8, **updates)  # teacher forcing: frames of the clip
    recipe = replace(
        whole,
        data={"clips": clips},
        decoder=replace(whole.decoder, **updates),
        light_decoder=None,
        stages={
            "diffusion": replace(whole.stages["diffusion"], curriculum=teaching),
            "consistency": replace(whole.stages["consistency"], curriculum=teaching),
            "adversarial": replace(  # student forcing: frames of the generator
                whole.stages["adversarial"],
                clips="clips",
                start="consistency",
                segments=1,
                discriminator_warmup=1,
                **updates,
            ),
        },
    )
    generator = StreamingGenerator.from_pretrained(run(recipe, options.out, workers=1))
    picture = np.asarray(Image.open(generator.sample_image()))
    stream = generator.open(picture, generator.sample_prompt)
    print("frames of a step:", stream.step(Control(forward=1.0)).shape)


if __name__ == "__main__":
    main()
