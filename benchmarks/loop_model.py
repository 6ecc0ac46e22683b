"""Predicts the rate of the main loops of the Hopper attention kernels from their machine code.

    python -m benchmarks.loop_model

Two or three warpgroups alternate: one multiplies while the others compute weights. The tensor
cores take products in order. The code that `python tools/sm90_gate.py LIBRARY` counts says which
part of the softmax may run during a warpgroup's own second product (`before`) and which waits for
it (`after`).
Rates follow from what FlashAttention-3 was measured to reach with its own split of the softmax, on
tiles of the same size: no figure here was measured on these kernels.
"""

from dataclasses import dataclass

PRODUCT = 512  # cycles of one product of 64 x 128 x 128, as 8 wgmma of 64 cycles
LATENCY = 100  # cycles from a product's end to its first use: assumed
TURN = 60  # cycles of a barrier between warpgroups: assumed
LEAD = 200  # cycles that wgmma are issued ahead of the tensor cores: assumed

# Cycles per warp instruction and scheduler: 16 exponentials per cycle and multiprocessor, 64
# comparisons and conversions, 128 additions and multiplications.
EXPONENTIAL, COMPARISON, CONVERSION, ADDITION = 8, 2, 2, 1
SHUFFLES = 120  # cycles of two dependent exchanges for each of two rows, overlapped: assumed

# FlashAttention-3, head_dim 128, H100. Forward with tiles of 128 x 128 (causal and local), and of
# 128 x 176 in clusters of 2 (full attention); backward with 64 query rows per tile, and with 80.
FA3_FORWARD, FA3_FORWARD_WIDE = (600e12, 650e12), (660e12, 740e12)
FA3_BACKWARD, FA3_BACKWARD_WIDE = (470e12, 530e12), (500e12, 560e12)


@dataclass(frozen=True)
class Softmax:
    """Cycles of one warpgroup's softmax of a tile, by what they wait for."""

    before: float  # the scores alone
    after: float  # the second product

    @property
    def cycles(self) -> float:
        return self.before + self.after

    def stretched(self, factor: float) -> "Softmax":
        return Softmax(self.before * factor, self.after * factor)


def softmax_of(
    *, exponentials: int, total: int = 66, columns: int = 64, head_dim: int = 128
) -> Softmax:
    """The softmax of a tile whose code has `exponentials` of `total` before the second wait.

    The maximum comes first; additions hide behind exponentials. Rescaling and conversion always
    wait for the second product.
    """
    maximum = (columns + 4) * COMPARISON + SHUFFLES if exponentials else 4 * COMPARISON
    late_maximum = 0 if exponentials else columns * COMPARISON + SHUFFLES
    tail = head_dim // 2 * ADDITION + columns // 2 * CONVERSION
    return Softmax(
        maximum + exponentials * EXPONENTIAL,
        late_maximum + (total - exponentials) * EXPONENTIAL + tail,
    )


def tensor_busy(
    softmax: Softmax, product: float = PRODUCT, tiles: int = 400, groups: int = 2
) -> float:
    """The share of time that the tensor cores multiply, with two products per tile of each of
    `groups` warpgroups. It does not count that warpgroups share the exponential units."""
    tensor, turn_free, ready = 0.0, 0.0, [0.0] * groups
    for tile in range(groups * tiles):
        group = tile % groups
        begin = max(ready[group], turn_free) + TURN
        scores = max(tensor, begin) + product
        tensor = scores + product
        turn_free = max(begin, tensor - LEAD)
        weights = scores + LATENCY + softmax.before
        ready[group] = max(weights, tensor + LATENCY) + softmax.after
    return 2 * product * groups * tiles / tensor


def narrow_busy(groups: int, stretch: float = 1.0) -> float:
    """The share of time that the tensor cores multiply at head_dim 64, tiles of 128 keys."""
    softmax = softmax_of(exponentials=66, head_dim=64)
    exponentials_alone = PRODUCT / (66 * EXPONENTIAL)  # both products of a tile: 512 cycles
    return min(
        tensor_busy(softmax.stretched(stretch), PRODUCT / 2, groups=groups), exponentials_alone
    )


# Other warps' instructions, bank conflicts and masks stretch the softmax by an unknown factor.
STRETCHES = (1.0, 1.15, 1.3)
HOISTED = softmax_of(exponentials=0)
FA3_LOOP = softmax_of(exponentials=13)
SETTLED = softmax_of(exponentials=66)
# Products of E4M3 take half the time. The maximum is found during the second product; promotion,
# exponentials and conversions of two values each come after it.
FP8_PRODUCT = PRODUCT / 2
FP8 = Softmax((64 + 4) * COMPARISON + SHUFFLES, 64 * ADDITION + 66 * EXPONENTIAL + 32 * CONVERSION)
SETTLED_WIDE = softmax_of(exponentials=90, total=90, columns=88)  # 176 keys


def forward_rates(softmax: Softmax = SETTLED) -> tuple[float, float]:
    """FLOP/s of a loop with tiles of 128 x 128, lowest and highest over STRETCHES."""
    ratios = [
        tensor_busy(softmax.stretched(x)) / tensor_busy(FA3_LOOP.stretched(x)) for x in STRETCHES
    ]
    return FA3_FORWARD[0] * min(ratios), FA3_FORWARD[1] * max(ratios)


def fp8_busy(stretch: float = 1.0) -> float:
    """The share of time that the tensor cores multiply E4M3, head_dim 128, tiles of 128 keys."""
    exponentials_alone = 2 * FP8_PRODUCT / (66 * EXPONENTIAL)
    return min(tensor_busy(FP8.stretched(stretch), FP8_PRODUCT), exponentials_alone)


def fp8_rates() -> tuple[float, float]:
    """FLOP/s of the loop in E4M3, lowest and highest over STRETCHES."""
    ratios = [2 * fp8_busy(x) / tensor_busy(FA3_LOOP.stretched(x)) for x in STRETCHES]
    return FA3_FORWARD[0] * min(ratios), FA3_FORWARD[1] * max(ratios)


@dataclass(frozen=True)
class BackwardTile:
    """Cycles of one query tile of `rows` rows against 128 keys, head_dim 128."""

    rows: int

    @property
    def tensor(self) -> float:
        return 5 * 2 * self.rows * 128 * 128 / 4096  # 4096 FLOP per cycle and multiprocessor

    @property
    def shared(self) -> float:
        """Shared memory at 128 bytes per cycle. Per warpgroup and 16 elements of depth, wgmma reads
        its left factor (64 rows; none if in registers) and its right factor."""
        left = 64 * 16 * 2
        scores = 2 * 2 * 8 * (left + self.rows * 16 * 2)  # two products, warpgroups, steps
        gradients = 2 * 2 * (self.rows / 16) * (128 * 16 * 2)
        if self.rows == 64:  # dq: 64 columns per warpgroup
            queries = 2 * 8 * (left + 64 * 16 * 2)
        else:  # dq transposed: 64 rows of head_dim per warpgroup
            queries = 2 * 8 * (left + self.rows * 16 * 2)
        arriving = 2 * self.rows * 128 * 2
        exchanged = self.rows * 128 * 2
        sums = 2 * self.rows * 128 * 4  # written, then read by the reduction
        return (scores + gradients + queries + arriving + exchanged + sums) / 128

    @property
    def cycles(self) -> float:
        return max(self.tensor, self.shared)

    @property
    def per_row(self) -> float:
        return self.cycles / self.rows


# Cycles of a query tile of 64 rows in which the tensor cores had nothing to do: dq came last, its
# store, fence and barrier after it, then some 15 dependent uniform instructions for the address of
# the reduction; loop bounds were read from shared memory twice; exponentials waited for dp.
TAIL_OF_DQ, BOUNDS, LATE_WEIGHTS = 350, 60, 32 * EXPONENTIAL


def backward_rates(rows: int = 80, exposed: float = 0.0) -> tuple[float, float]:
    """FLOP/s with `rows` query rows per tile, 64 or 80, and `exposed` cycles in every tile that
    nothing hides."""
    cycles = BackwardTile(rows).cycles
    low, high = FA3_BACKWARD_WIDE if rows == 80 else FA3_BACKWARD
    return low * cycles / (cycles + exposed), high * cycles / (cycles + exposed)


def table() -> str:
    def rates(pair: tuple[float, float]) -> str:
        return " to ".join(f"{rate / 1e12:.0f}" for rate in pair)

    rows = [
        "PREDICTION, nothing here was measured on these kernels: head_dim 128, TFLOP/s",
        "",
        "| softmax of a tile | cycles before / after the second wait | tensor cores busy, softmax "
        + ", ".join(f"x {x}" for x in STRETCHES)
        + " | head_dim 64 | forward |",
        "|---|---|---|---|---|",
    ]
    for name, loop in (
        ("wait hoisted above it", HOISTED),
        ("FlashAttention-3, 13 of 66 exponentials before", FA3_LOOP),
        ("settled", SETTLED),
    ):
        busy = ", ".join(f"{tensor_busy(loop.stretched(x)):.3f}" for x in STRETCHES)
        narrow = tensor_busy(loop, PRODUCT / 2)
        rows.append(
            f"| {name} | {loop.before:.0f} / {loop.after:.0f} | {busy} | {narrow:.3f} "
            f"| {rates(forward_rates(loop))} |"
        )
    busy = (tensor_busy(SETTLED_WIDE.stretched(x), PRODUCT * 176 / 128) for x in STRETCHES)
    rows += [
        f"| settled, tiles of 128 x 176 (not built) "
        f"| {SETTLED_WIDE.before:.0f} / {SETTLED_WIDE.after:.0f} "
        f"| {', '.join(f'{share:.3f}' for share in busy)} | | |",
        f"| settled, E4M3 | {FP8.before:.0f} / {FP8.after:.0f} "
        f"| {', '.join(f'{fp8_busy(x):.3f}' for x in STRETCHES)} | | {rates(fp8_rates())} |",
        f"| FlashAttention-3 itself, 128 x 176, clusters of 2 | | | | {rates(FA3_FORWARD_WIDE)} |",
        "",
        "| head_dim 64, warpgroups that multiply | tensor cores busy, softmax "
        + ", ".join(f"x {x}" for x in STRETCHES)
        + " |",
        "|---|---|",
    ]
    for groups, note in ((2, ""), (3, " (built)")):
        busy = ", ".join(f"{narrow_busy(groups, x):.3f}" for x in STRETCHES)
        rows.append(f"| {groups}{note} | {busy} |")
    wide = BackwardTile(80)
    narrow = BackwardTile(64)
    before = TAIL_OF_DQ + BOUNDS + LATE_WEIGHTS
    rows += [
        "",
        "| backward, query rows per tile | tensor / shared memory cycles | per row | TFLOP/s |",
        "|---|---|---|---|",
        f"| 64, dq last | {narrow.tensor:.0f} / {narrow.shared:.0f} + {before} exposed "
        f"| {(narrow.cycles + before) / 64:.1f} | {rates(backward_rates(64, before))} |",
        f"| 64, dq before dk | {narrow.tensor:.0f} / {narrow.shared:.0f} | {narrow.per_row:.1f} "
        f"| {rates(backward_rates(64))} |",
        f"| 80 | {wide.tensor:.0f} / {wide.shared:.0f} | {wide.per_row:.1f} "
        f"| {rates(backward_rates())} |",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
