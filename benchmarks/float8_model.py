"""Predict the time of linear layers in BF16 and in 8 bits, the rounding of inputs included.

    python -m benchmarks.float8_model

Rates are those of `aapt bench stream --predict`: the larger of arithmetic and of moving each tensor
once. The norm or the GELU before a layer rounds in its own launch and writes less than in BF16.
What attention returns, the input of `out`, is rounded by a launch of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from aapt.evaluate.breakdown import GPUS, Gpu

# Outputs and inputs in widths, and whether the operator before the layer rounds
LAYERS = {
    "qkv": (3, 1, True),
    "out": (1, 1, False),
    "up": (4, 1, True),
    "down": (1, 4, True),
}


@dataclass(frozen=True)
class Shape:
    """A product of `rows` tokens: (rows, inputs) x (inputs, outputs); fused: the operator before it
    rounds its inputs."""

    rows: int
    outputs: int
    inputs: int
    fused: bool

    def seconds(self, gpu: Gpu) -> float:
        """Return the time in BF16."""
        return self._product(gpu.products, gpu.memory, 2)

    def float8_seconds(self, gpu: Gpu) -> float:
        """Return the time in e4m3, with what rounding the input costs, or saves its operator."""
        numbers, rounded = self.rows * self.inputs, 1 + 4 / 128  # bytes of a number and its scale
        if self.fused:
            rounding = numbers * (rounded - 2) / gpu.memory
        else:
            rounding = numbers * (2 + rounded) / gpu.memory + gpu.gap
        return self._product(gpu.float8_products, gpu.memory, 1) + rounding

    def _product(self, rate: float, memory: float, size: int) -> float:
        """size: bytes of a weight or input; the result is BF16."""
        moved = size * self.inputs * (self.rows + self.outputs) + 2 * self.rows * self.outputs
        return max(2 * self.rows * self.outputs * self.inputs / rate, moved / memory)


MODELS = {  # tokens of a step, width
    "aapt-8b, 1280x720": (3600, 3072),
    "aapt-8b, 736x416": (1196, 3072),
    "aapt-8b, 1280x720 on 8 GPUs": (450, 3072),
    "aapt-2b, 1280x720": (3600, 2048),
    "aapt-2b, 736x416": (1196, 2048),
    "Wan 1.3B, 832x480": (1560, 1536),
    "tiny-world": (40, 192),
}


def rows(gpu: Gpu) -> Iterator[tuple[str, str, float, float]]:
    """Yield model, layer, and microseconds of one layer in BF16 and in e4m3."""
    for model, (tokens, width) in MODELS.items():
        for layer, (outputs, inputs, fused) in LAYERS.items():
            shape = Shape(tokens, outputs * width, inputs * width, fused)
            yield model, layer, 1e6 * shape.seconds(gpu), 1e6 * shape.float8_seconds(gpu)


def main() -> None:
    for name, gpu in GPUS.items():
        print(f"{name}, microseconds: BF16, e4m3 with rounding, ratio")
        for model, layer, plain, rounded in rows(gpu):
            ratio = plain / rounded
            print(f"  {model:<28} {layer:<5} {plain:8.1f} {rounded:8.1f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
