"""The looks of the tiny world: palettes, shapes and the sentences that name them."""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """One look. Colours are sRGB bytes; angles are radians of heading.

    Attributes:
        name: Short name.
        prompts: ASCII sentences of at most 24 bytes, the canonical one first.
        sky: Colours at the horizon, half way up, and at the top of the view.
        sun, sun_heading, sun_height, sun_radius: The disc in the sky; height and radius are
            tangents of the elevation.
        cloud: Colour of the clouds, None for a clear sky.
        far, near: Colours of the two silhouettes on the horizon.
        skyline: Shape of the silhouettes: ``hills``, ``mesas``, ``towers`` or ``peaks``.
        ground: The two colours of the ground pattern.
        pattern: ``checker``, ``dunes``, ``grid``, ``ripples`` or ``diamonds``.
        block, block_trim: Colour of the walls and of the band on their top.
        round, round_trim: Colours of the round objects and of their upper part.
        trunk: Colour of the stem, if the shape has a stem.
        shape: Round objects: ``tree``, ``cactus``, ``column``, ``pine`` or ``lollipop``.
        shadow: Colour of shadows, on the ground and on shaded sides.
        shade: Share of `shadow` in the side away from the sun, 0 to 1.
        panels: Contrast of the upright panels on the walls, 0 to 1.
    """

    name: str
    prompts: tuple[str, ...]
    sky: tuple[Colour, Colour, Colour]
    sun: Colour
    sun_heading: float
    sun_height: float
    sun_radius: float
    cloud: Colour | None
    far: Colour
    near: Colour
    skyline: str
    ground: tuple[Colour, Colour]
    pattern: str
    block: Colour
    block_trim: Colour
    round: Colour
    round_trim: Colour
    shape: str
    shadow: Colour
    trunk: Colour = (122, 78, 54)
    shade: float = 0.5
    panels: float = 0.16


THEMES: tuple[Theme, ...] = (
    Theme(
        name="meadow",
        prompts=(
            "green meadow at noon",
            "a sunny green meadow",
            "meadow with trees",
            "grass field, blue sky",
            "spring meadow, clouds",
            "farmland on a clear day",
        ),
        sky=((206, 238, 255), (120, 190, 250), (58, 128, 226)),
        sun=(255, 250, 214),
        sun_heading=0.7,
        sun_height=0.40,
        sun_radius=0.085,
        cloud=(255, 255, 255),
        far=(128, 190, 190),
        near=(74, 158, 104),
        skyline="hills",
        ground=((146, 212, 78), (96, 176, 62)),
        pattern="checker",
        block=(250, 232, 200),
        block_trim=(226, 84, 60),
        round=(255, 150, 66),
        round_trim=(255, 150, 66),
        shape="tree",
        shadow=(92, 76, 104),
    ),
    Theme(
        name="desert",
        prompts=(
            "desert dunes at sunset",
            "a desert at sunset",
            "sand dunes, evening sun",
            "red canyon at dusk",
            "dusty desert, low sun",
            "cactus desert, sunset",
        ),
        sky=((255, 214, 128), (250, 134, 92), (112, 62, 138)),
        sun=(255, 246, 200),
        sun_heading=2.6,
        sun_height=0.20,
        sun_radius=0.15,
        cloud=None,
        far=(214, 104, 92),
        near=(150, 62, 84),
        skyline="mesas",
        ground=((250, 182, 104), (218, 132, 78)),
        pattern="dunes",
        block=(196, 76, 58),
        block_trim=(255, 202, 120),
        round=(30, 150, 122),
        round_trim=(30, 150, 122),
        shape="cactus",
        shadow=(92, 24, 66),
    ),
    Theme(
        name="neon",
        prompts=(
            "neon city at night",
            "night city, neon lights",
            "a glowing neon grid",
            "retro city after dark",
            "cyberpunk street, night",
            "neon towers, big moon",
        ),
        sky=((236, 64, 160), (84, 26, 120), (12, 8, 44)),
        sun=(255, 214, 120),
        sun_heading=4.4,
        sun_height=0.24,
        sun_radius=0.16,
        cloud=None,
        far=(98, 34, 128),
        near=(34, 16, 72),
        skyline="towers",
        ground=((26, 14, 62), (44, 214, 236)),
        pattern="grid",
        block=(74, 52, 168),
        block_trim=(255, 62, 186),
        round=(24, 226, 226),
        round_trim=(255, 240, 120),
        shape="column",
        shadow=(40, 6, 96),
        shade=0.4,
        panels=0.26,
    ),
    Theme(
        name="snow",
        prompts=(
            "snowy peaks in winter",
            "a snow field in winter",
            "winter land, icy blocks",
            "pine trees in the snow",
            "white snow, cold sky",
            "arctic morning, snow",
        ),
        sky=((236, 246, 252), (164, 208, 240), (76, 142, 214)),
        sun=(255, 252, 236),
        sun_heading=5.6,
        sun_height=0.34,
        sun_radius=0.075,
        cloud=(248, 252, 255),
        far=(150, 182, 218),
        near=(96, 136, 188),
        skyline="peaks",
        ground=((248, 252, 255), (208, 225, 243)),
        pattern="checker",
        block=(84, 156, 224),
        block_trim=(250, 253, 255),
        round=(18, 104, 96),
        round_trim=(240, 250, 252),
        shape="pine",
        shadow=(30, 70, 140),
    ),
    Theme(
        name="lagoon",
        prompts=(
            "coral temple in a lagoon",
            "a turquoise lagoon",
            "temple of coral columns",
            "marble ruins, blue water",
            "temple in shallow water",
            "tropical lagoon, ruins",
        ),
        sky=((178, 246, 226), (52, 190, 204), (8, 96, 150)),
        sun=(250, 255, 240),
        sun_heading=1.7,
        sun_height=0.42,
        sun_radius=0.10,
        cloud=None,
        far=(70, 178, 184),
        near=(14, 116, 140),
        skyline="mesas",
        ground=((128, 240, 218), (28, 172, 188)),
        pattern="ripples",
        block=(246, 242, 226),
        block_trim=(240, 190, 74),
        round=(255, 104, 96),
        round_trim=(255, 214, 196),
        shape="column",
        shadow=(8, 84, 124),
    ),
    Theme(
        name="candy",
        prompts=(
            "pink candy land",
            "a candy land of sweets",
            "lollipops and pink sky",
            "sweet world, mint cubes",
            "candy field, soft clouds",
            "sugar land in pastel",
        ),
        sky=((255, 222, 232), (244, 168, 222), (150, 112, 226)),
        sun=(255, 252, 210),
        sun_heading=3.5,
        sun_height=0.36,
        sun_radius=0.10,
        cloud=(255, 246, 250),
        far=(220, 160, 228),
        near=(168, 110, 208),
        skyline="hills",
        ground=((255, 240, 232), (255, 152, 190)),
        pattern="diamonds",
        block=(64, 226, 190),
        block_trim=(255, 252, 246),
        round=(236, 44, 92),
        round_trim=(236, 44, 92),
        shape="lollipop",
        shadow=(96, 70, 190),
        trunk=(255, 250, 240),
    ),
)
