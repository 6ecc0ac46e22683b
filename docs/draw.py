"""Writes the drawings of the documents: `python docs/draw.py`.

    ring.svg     the KV cache and one step of the generator
    stages.svg   the three training stages and what each feeds

A drawing is plain SVG text with coordinates in a panel of 960 x 540. Colours follow the reader's
light or dark scheme. The files are checked in; a test holds that they are what this script writes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

WIDTH, HEIGHT = 960, 540
HEAD = 9  # length of an arrow's head

# Class: (light fill, light stroke, dark fill, dark stroke)
BOXES = {
    "panel": ("#f8fafc", "#cbd5e1", "#161b22", "#3d444d"),
    "plain": ("#ffffff", "#94a3b8", "#21262d", "#6e7681"),
    "blue": ("#dbeafe", "#2563eb", "#12294a", "#58a6ff"),
    "green": ("#dcfce7", "#15803d", "#12331f", "#4ac26b"),
    "orange": ("#ffedd5", "#c2410c", "#43240b", "#f0883e"),
    "violet": ("#ede9fe", "#6d28d9", "#2a1d4a", "#b392f0"),
}
# Class: (light, dark)
INKS = {"ink": ("#0f172a", "#f0f6fc"), "muted": ("#475569", "#aeb7c2")}


def style() -> str:
    """CSS of both schemes. Each class of `BOXES` also colours a `line-` and a `head-`."""

    def rules(fill: int, stroke: int, ink: int) -> str:
        out = []
        for name, colours in BOXES.items():
            out.append(f".{name}{{fill:{colours[fill]};stroke:{colours[stroke]}}}")
            out.append(f".line-{name}{{fill:none;stroke:{colours[stroke]}}}")
            out.append(f".head-{name}{{fill:{colours[stroke]}}}")
        out += [f".{name}{{fill:{colours[ink]}}}" for name, colours in INKS.items()]
        return "\n".join(out)

    fonts = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
    return (
        f"text{{font-family:{fonts};font-size:16px}}\n"
        ".title{font-size:23px;font-weight:600}\n"
        ".strong{font-weight:600}\n"
        ".small{font-size:15px}\n"
        f"{rules(0, 1, 0)}\n"
        f"@media (prefers-color-scheme: dark){{\n{rules(2, 3, 1)}\n}}"
    )


class Drawing:
    """Shapes in the order they are painted. Points are (x, y), y grows downwards."""

    def __init__(self, title: str, description: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{title}</title>",
            f"<desc>{description}</desc>",
            f"<style>\n{style()}\n</style>",
        ]
        self.box(1, 1, WIDTH - 2, HEIGHT - 2, "panel", radius=14)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        kind: str,
        *lines: str,
        radius: float = 7,
        thick: float = 1.5,
        dashed: bool = False,
    ) -> None:
        """A rectangle of a class of `BOXES` with centred lines of text, the first one strong."""
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'class="{kind}" stroke-width="{thick:g}"{dash}/>'
        )
        top = y + height / 2 - 10 * (len(lines) - 1) + 5.5
        for index, line in enumerate(lines):
            self.text(x + width / 2, top + 20 * index, line, "small ink" if index else "strong ink")

    def text(self, x: float, y: float, line: str, kind: str = "ink", anchor: str = "middle"):
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{line}</text>'
        )

    def arrow(
        self,
        *points: tuple[float, float],
        kind: str = "plain",
        thick: float = 2,
        dashed: bool = False,
    ) -> None:
        """A line through points, with rounded corners and a head at the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        along = ((x1 - x0) / length, (y1 - y0) / length)
        base = (x1 - HEAD * along[0], y1 - HEAD * along[1])
        self.line(*points[:-1], base, kind=kind, thick=thick, dashed=dashed)
        across = (-0.55 * HEAD * along[1], 0.55 * HEAD * along[0])
        corners = (
            (x1, y1),
            (base[0] + across[0], base[1] + across[1]),
            (base[0] - across[0], base[1] - across[1]),
        )
        shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self.parts.append(f'<polygon points="{shape}" class="head-{kind}"/>')

    def line(
        self,
        *points: tuple[float, float],
        kind: str = "plain",
        thick: float = 2,
        dashed: bool = False,
    ) -> None:
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        shape = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{shape}" class="line-{kind}" stroke-width="{thick:g}" '
            f'stroke-linejoin="round"{dash}/>'
        )

    def dot(self, x: float, y: float, radius: float, kind: str, label: str = "") -> None:
        self.parts.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{kind}" stroke-width="1.5"/>'
        )
        if label:
            self.text(x, y + 5, label, "small ink")

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def ring() -> str:
    """One step of the generator above, the KV cache it reads and writes below."""
    drawing = Drawing(
        "The KV cache and one step",
        "Noise, the recycled frame and the control go through the transformer once. The new frame "
        "is decoded to four video frames and recycled. Its keys and values overwrite the oldest "
        "slot of a ring of N + 1 frames, beside pinned text and a pinned first frame.",
    )
    drawing.text(32, 44, "One step: one forward pass, one new frame", "title ink", "start")

    # The recycled frame's way back, above everything else
    drawing.arrow((697, 122), (697, 78), (135, 78), (135, 108), kind="orange")
    drawing.text(412, 70, "recycled as an input of step n + 1", "small muted")

    inputs = (
        ("recycled frame", "n − 1", "orange"),
        ("noise", "", "plain"),
        ("control", "", "violet"),
    )
    for index, (name, frame, kind) in enumerate(inputs):
        y = 110 + 50 * index
        drawing.box(32, y, 206, 42, kind, f"{name} {frame}".strip())
        drawing.line((238, y + 21), (270, y + 21))
    drawing.line((270, 131), (270, 231))
    drawing.arrow((270, 181), (318, 181))
    drawing.text(135, 277, "joined on channels", "small muted")

    drawing.box(320, 118, 268, 126, "plain", "causal transformer", "one forward pass", thick=2)
    drawing.arrow((588, 181), (640, 181))
    drawing.box(642, 124, 110, 114, "orange", "frame n", "latent")
    drawing.arrow((752, 181), (792, 181))
    for index in (3, 2, 1, 0):
        drawing.box(794 + 11 * index, 138 + 9 * index, 92, 60, "plain", radius=4)
    drawing.text(840, 164, "4 video", "strong ink")
    drawing.text(840, 184, "frames", "strong ink")
    drawing.text(861, 258, "by the decoder", "small muted")

    # The cache: text, first frame, six ring slots (N = 5), step n in the third
    top, height = 366, 68
    drawing.box(32, top, 122, height, "green", "text", "per prompt")
    drawing.box(162, top, 122, height, "green", "step 1", "user's frame")
    labels = ("n − 2", "n − 1", "n", "n − 5", "n − 4", "n − 3")
    for index, label in enumerate(labels):
        x = 310 + 103 * index
        new = label == "n"
        kind = "orange" if new else "blue"
        lines = ("n", "was n − 6") if new else (label,)
        drawing.box(x, top, 97, height, kind, *lines, thick=3 if new else 1.5)
    drawing.text(158, top + height + 27, "pinned", "strong ink")
    drawing.line((32, top + height + 8), (284, top + height + 8), kind="green")
    drawing.text(
        616,
        top + height + 40,
        "ring of N + 1 frames, by step: the oldest is overwritten",
        "strong ink",
    )
    # From the last slot back to the first
    drawing.arrow(
        (873, top + height),
        (873, top + height + 18),
        (358, top + height + 18),
        (358, top + height + 2),
        kind="blue",
    )

    drawing.arrow((372, top - 20), (372, 246), kind="blue")
    drawing.text(360, 296, "attends to all", "muted", "end")
    drawing.text(360, 316, "of the cache", "muted", "end")
    drawing.line((32, top - 8), (32, top - 20), (922, top - 20), (922, top - 8), kind="blue")
    drawing.arrow((564, 244), (564, top - 3), kind="orange")
    drawing.text(580, 296, "keys and values of step n", "muted", "start")
    drawing.text(580, 316, "replace the oldest", "muted", "start")

    drawing.text(
        32,
        516,
        "Fixed memory, and the same cost per step however long the stream: "
        "nothing is shifted or copied.",
        "muted",
        "start",
    )
    return drawing.svg()


def frames(
    drawing: Drawing, x: float, y: float, labels: Sequence[str], kinds: Sequence[str]
) -> list[tuple[float, float]]:
    """A row of small frames, 38 wide, 52 apart; returns their centres."""
    centres = []
    for index, (label, kind) in enumerate(zip(labels, kinds, strict=True)):
        drawing.box(x + 52 * index, y, 38, 34, kind, label, radius=5)
        centres.append((x + 52 * index + 19, y + 17))
    return centres


def stages() -> str:
    """Three cards from left to right, what they start from, and what each one feeds."""
    drawing = Drawing(
        "The three training stages",
        "Diffusion adaptation by teacher forcing feeds consistency distillation, which feeds "
        "adversarial training by student forcing. Diffusion adaptation also starts the "
        "discriminator of the last stage.",
    )
    drawing.text(
        32,
        44,
        "From a pre-trained diffusion model to one pass per frame",
        "title ink",
        "start",
    )
    top, height, width = 76, 326, 280
    lefts = (28, 340, 652)
    heads = (
        ("1. Diffusion adaptation", "teacher forcing"),
        ("2. Consistency distillation", "teacher forcing"),
        ("3. Adversarial training", "student forcing"),
    )
    for left, (name, forcing) in zip(lefts, heads):
        drawing.box(left, top, width, height, "plain", radius=10)
        drawing.text(left + 18, top + 32, name, "strong ink", "start")
        drawing.text(left + 18, top + 55, forcing, "muted", "start")

    _adaptation(drawing, lefts[0])
    _distillation(drawing, lefts[1])
    _adversary(drawing, lefts[2])

    for left in lefts[:2]:
        drawing.arrow((left + width, 244), (left + width + 30, 244), kind="orange", thick=3)
    bottom = top + height
    drawing.arrow(
        (lefts[0] + 140, bottom),
        (lefts[0] + 140, bottom + 42),
        (lefts[2] + 90, bottom + 42),
        (lefts[2] + 90, bottom + 3),
        kind="violet",
        thick=3,
    )
    drawing.text(455, bottom + 65, "starts the discriminator", "ink")
    legend = (("real", "green", 32), ("predicted", "blue", 108), ("generated", "orange", 228))
    for name, kind, x in legend:
        drawing.box(x, 500, 18, 18, kind, radius=4)
        drawing.text(x + 26, 515, name, "muted", "start")
    drawing.text(928, 515, "Then it streams: one pass per frame.", "muted", "end")
    return drawing.svg()


def _adaptation(drawing: Drawing, left: float) -> None:
    """Real frames in, all next frames out in parallel."""
    x = left + 43
    outputs = frames(drawing, x, 158, ("1", "2", "3", "4"), ["blue"] * 4)
    inputs = frames(drawing, x, 254, ("0", "1", "2", "3"), ["green"] * 4)
    for (x0, y0), (x1, y1) in zip(inputs, outputs):
        drawing.arrow((x0, y0 - 18), (x1, y1 + 20))
    drawing.text(left + 18, 316, "Real frames in, every next frame", "small ink", "start")
    drawing.text(left + 18, 336, "out, in parallel, causal mask.", "small ink", "start")
    drawing.text(left + 18, 366, "Loss: mean square of", "small muted", "start")
    drawing.text(left + 18, 386, "v − (noise − data)", "small muted", "start")


def _distillation(drawing: Drawing, left: float) -> None:
    """The path from noise to data: one step of the teacher, two answers of the student."""
    y, data, earlier, later, noise = 216, left + 44, left + 140, left + 192, left + 246
    drawing.line((data, y), (noise, y), thick=3)
    drawing.parts.append(
        f'<path d="M {later} {y - 8} C {later - 20} {y - 62}, {data + 40} {y - 62}, {data + 4} '
        f'{y - 16}" class="line-blue" stroke-width="2"/>'
    )
    drawing.parts.append(
        f'<path d="M {earlier} {y - 8} C {earlier - 14} {y - 34}, {data + 44} {y - 34}, '
        f'{data + 14} {y - 10}" class="line-blue" stroke-width="2" stroke-dasharray="6 4"/>'
    )
    drawing.arrow(
        (later, y + 8), (later, y + 28), (earlier, y + 28), (earlier, y + 9), kind="green"
    )
    for at, kind in ((data, "blue"), (earlier, "plain"), (later, "plain"), (noise, "plain")):
        drawing.dot(at, y, 8, kind)
    drawing.text(data, y + 30, "data", "small ink")
    drawing.text(noise + 2, y + 30, "noise", "small ink")
    drawing.text((earlier + later) / 2, y + 48, "teacher", "small ink")
    drawing.text(left + 140, y - 64, "both answers agree", "small ink")
    drawing.text(left + 18, 316, "One of 32 fixed times per clip;", "small ink", "start")
    drawing.text(left + 18, 336, "the teacher is stage 1, frozen.", "small ink", "start")
    drawing.text(left + 18, 366, "Loss: distance between the", "small muted", "start")
    drawing.text(left + 18, 386, "student's two answers", "small muted", "start")


def _adversary(drawing: Drawing, left: float) -> None:
    """The generator's own frames in; the discriminator gives one logit per frame."""
    made = frames(drawing, left + 17, 254, ("0", "1", "2", "3", "4"), ["green"] + ["orange"] * 4)
    for (x0, y0), (x1, _) in zip(made, made[1:]):
        drawing.arrow((x0 + 19, y0), (x1 - 20, y0), kind="orange")
    drawing.box(made[1][0] - 19, 190, made[4][0] - made[1][0] + 38, 34, "violet", "discriminator")
    for x0, y0 in made[1:]:
        drawing.arrow((x0, y0 - 18), (x0, 226), kind="violet")
        drawing.arrow((x0, 190), (x0, 172), kind="violet")
        drawing.dot(x0, 160, 11, "violet", "±")
    drawing.text(left + 18, 316, "Its own frames in, step by step;", "small ink", "start")
    drawing.text(left + 18, 336, "one logit per frame.", "small ink", "start")
    drawing.text(left + 18, 366, "Loss: relativistic, in pairs with", "small muted", "start")
    drawing.text(left + 18, 386, "real clips; aR1, aR2", "small muted", "start")


DRAWINGS: dict[str, Callable[[], str]] = {"ring.svg": ring, "stages.svg": stages}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (Path(__file__).parent / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
