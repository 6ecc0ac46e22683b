"""Predicts what clusters of two CTAs with multicast keys would gain in cached_attention; nothing is
measured.

    python -m benchmarks.cluster_model

The two CTAs of a cluster take two query tiles of one head and read the same keys: each loads one
half of them into both, and L2 gives half the bytes. The work is then dealt in pairs of tiles to 66
clusters, so the last pair of a head may be emptier than its last tile was (schedule_model.py). The
main loop runs at its own rate (loop_model.py) unless L2 gives too few bytes. Barriers between the
two CTAs are not counted: every gain is an upper bound.
"""

from dataclasses import dataclass, replace

from .loop_model import forward_rates
from .schedule_model import (
    MULTIPROCESSORS,
    TILE,
    Shape,
    fixup_bytes,
    pieces,
    shapes,
    wave_efficiency,
)

# Bytes per second that L2 gives to all multiprocessors. NVIDIA names 5,120 bytes per clock for an
# A100 and nothing for an H100; on an A100, 3,840 were measured. At 1.6 GHz: 8.2 and 6.1 TB/s, which
# an H100 is assumed to reach. It gives at least 4.7 to 5.1, because FlashAttention-3 reaches 600 to
# 650 TFLOP/s with tiles of 128 x 128 and no clusters.
L2_RATES = (6.1e12, 8.2e12)
# FLOP/s of the main loop: the middle of the prediction, and what 700e12 takes in all at 24 heads.
LOOP_RATES = (sum(forward_rates()) / 2, 730e12)
WORTH = 1.02  # the least gain for which clusters would be built


@dataclass(frozen=True)
class Deal:
    """A shape, dealt to `units`: CTAs, or clusters that share what they read."""

    shape: Shape
    units: int

    @property
    def l2_bytes(self) -> int:
        """Bytes that L2 gives in one call: queries, keys and values, parts of query tiles."""
        shape = self.shape
        queries = 2 * shape.batch * shape.heads * shape.queries * shape.head_dim
        tile = 2 * 2 * TILE * shape.head_dim
        return queries + sum(
            fixup_bytes(piece, shape) + tile * piece.key_tiles(shape)
            for share in pieces(shape, self.units)
            for piece in share
        )

    @property
    def useful(self) -> float:
        """The share of all steps of all units that is neither padding nor idle."""
        return wave_efficiency(self.shape, pieces(self.shape, self.units), self.units)

    def rate(self, loop: float, l2: float) -> float:
        """FLOP/s of a call, without the overheads of its pieces."""
        return min(loop * self.useful, l2 * self.shape.flops / self.l2_bytes)


def deals(shape: Shape) -> tuple[Deal, Deal]:
    """The shape as CTAs take it, and as clusters of two would."""
    pairs = replace(shape, warpgroups=2 * shape.warpgroups)
    return Deal(shape, MULTIPROCESSORS), Deal(pairs, MULTIPROCESSORS // 2)


def table() -> str:
    rows = [
        "PREDICTION, nothing here was measured: clusters of 2 for cached_attention, head_dim 128",
        "",
        "| queries x keys x heads | GB from L2: alone | in clusters | TB/s at "
        + " / ".join(f"{loop / 1e12:.0f}" for loop in LOOP_RATES)
        + " TFLOP/s in the loop | useful: alone | in clusters | gain at L2 of "
        + " and ".join(f"{l2 / 1e12:.1f}" for l2 in L2_RATES)
        + f" TB/s | L2 rate below which {100 * (WORTH - 1):.0f} % are gained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes():
        alone, paired = deals(shape)
        read = alone.l2_bytes / shape.flops  # bytes per FLOP
        gains = [
            "/".join(
                f"{100 * (paired.rate(loop, l2) / alone.rate(loop, l2) - 1):+.1f}"
                for loop in LOOP_RATES
            )
            for l2 in L2_RATES
        ]
        rows.append(
            f"| {shape.queries} x {shape.keys} x {shape.heads} | {alone.l2_bytes / 1e9:.2f} "
            f"| {paired.l2_bytes / 1e9:.2f} "
            f"| {' / '.join(f'{read * loop * alone.useful / 1e12:.1f}' for loop in LOOP_RATES)} "
            f"| {alone.useful:.3f} | {paired.useful:.3f} | {' and '.join(gains)} % "
            f"| {' / '.join(f'{below(alone, paired, loop) / 1e12:.1f}' for loop in LOOP_RATES)} |"
        )
    return "\n".join(rows)


def below(alone: Deal, paired: Deal, loop: float) -> float:
    """The rate of L2 below which clusters gain what makes them worth building, while they are not
    themselves bound by L2."""
    return alone.l2_bytes / alone.shape.flops * loop * paired.useful / WORTH


if __name__ == "__main__":
    print(table())
