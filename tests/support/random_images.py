"""Random networks on images: layers, views, writes in place and branches in any order."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int, int]

LAYERS = (
    "conv",
    "conv",
    "conv",
    "conv",
    "frozen_conv",
    "max_pool",
    "avg_pool",
    "adaptive_pool",
    "norm",
    "norm",
    "relu_",
)
STEPS = (
    *(
        "relu",
        "gelu",
        "gate",
        "squeeze",
        "add",
        "iadd",
        "cat",
        "view",
        "write_through_view",
        "write",
        "slice",
        "pixels",
    ),
    *("power", "clamp", "softmax", "shift", "identity"),
)


class RandomImageNetwork(nn.Module):
    """Made from a seed; prints as its steps.

    Values are numbered in order, the input first; each step reads one of them, often the last, sometimes two.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = Random(seed)
        self.channels, self.size = random.choice([1, 2, 3]), random.choice([5, 6, 8])
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, int, int]] = []
        sizes: list[Size] = [(self.channels, self.size, self.size)]
        # torch's own norms, which the expected gradients come from, err on images with their channels last
        moves_pixels = random.random() < 0.3
        for _ in range(random.randint(3, 12)):
            read = random.randrange(len(sizes)) if random.random() < 0.4 else len(sizes) - 1
            step = random.choice(LAYERS if random.random() < 0.6 else STEPS)
            if step == ("norm" if moves_pixels else "pixels"):
                continue
            found = self._layer(random, step, sizes[read]) if step in LAYERS else self._step(random, step, read, sizes)
            if found is not None:
                second, size = found
                self.steps.append((step, read, second))
                sizes.append(size)
        channels, height, width = sizes[-1]
        self.ending = random.choice(["flat", "mean", "image"])
        inputs = channels * height * width if self.ending == "flat" else channels
        self.head = nn.Conv2d(channels, 2, 1) if self.ending == "image" else nn.Linear(inputs, 3)
        self.shift = nn.Parameter(torch.randn(1))

    def _layer(self, random: Random, step: str, size: Size) -> tuple[int, Size] | None:
        """Adds a layer. Returns: its number and the size of its result; None where it does not fit."""
        channels = size[0]
        if step == "relu_":
            layer: nn.Module = nn.ReLU(inplace=True)
        elif step == "norm":
            layer = random.choice(
                [nn.GroupNorm(1, channels), nn.GroupNorm(channels, channels), nn.BatchNorm2d(channels)]
            )
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
                nn.init.uniform_(layer.running_mean)  # pyright: ignore[reportArgumentType]
            elif random.random() < 0.3:
                layer = nn.InstanceNorm2d(channels, affine=random.random() < 0.5)
            layer.requires_grad_(random.random() < 0.7)
        elif step.endswith("pool"):
            layer = {"max_pool": nn.MaxPool2d(2), "avg_pool": nn.AvgPool2d(2, 1)}.get(step, nn.AdaptiveAvgPool2d(2))
        else:
            groups = random.choice([1, 1, channels])
            out, kernel = groups * random.choice([1, 2, 3]), random.choice([1, 2, 3, 3])
            how = {"stride": random.choice([1, 1, 2]), "padding": random.choice([0, 1]), "groups": groups}
            layer = nn.Conv2d(channels, out, kernel, **how, bias=random.random() < 0.7)
            layer.requires_grad_(step == "conv")
        try:
            with torch.no_grad():
                _, *after = layer(torch.zeros(2, *size)).shape
                layer(torch.zeros(1, *size))
        except (RuntimeError, ValueError):  # too small for it
            return None
        if min(after) == 0:
            return None
        self.layers.append(layer)
        return len(self.layers) - 1, (after[0], after[1], after[2])

    @staticmethod
    def _step(random: Random, step: str, read: int, sizes: list[Size]) -> tuple[int, Size] | None:
        """The second value read, and the size of the result."""
        size = sizes[read]
        channels, *area = size
        if step in ("add", "iadd"):
            return random.choice([at for at, other in enumerate(sizes) if other == size]), size
        if step == "cat":
            second = random.choice([at for at, other in enumerate(sizes) if list(other[1:]) == area])
            return second, (channels + sizes[second][0], area[0], area[1])
        if step == "slice":
            return None if channels == 1 else (0, (channels - 1, area[0], area[1]))
        return 0, size

    def forward(self, x: Tensor) -> Tensor:
        """Images to `[B, 3]`, or to images."""
        values = [x]
        for step, read, second in self.steps:
            values.append(self._run(step, values[read], second, values))
        y = values[-1]
        if self.ending == "flat":
            y = y.flatten(1)
        elif self.ending == "mean":
            y = y.mean((2, 3))
        return self.head(y)

    def _run(self, step: str, y: Tensor, second: int, values: list[Tensor]) -> Tensor:
        if step in LAYERS:
            return self.layers[second](y)
        if step == "iadd":
            z = y * 1.5
            z += values[second]
            return z
        if step == "write_through_view":
            z = y + 1
            z.view(z.size(0), -1).mul_(0.7)
            return z
        steps = {
            "relu": lambda: F.relu(y),
            "gelu": lambda: F.gelu(y),
            "gate": lambda: y * torch.sigmoid(y),
            "squeeze": lambda: y * torch.sigmoid(y.mean((2, 3), keepdim=True)),
            "add": lambda: y + values[second],
            "cat": lambda: torch.cat([y, values[second]], 1),
            "view": lambda: y.view(y.size(0), -1).mul(2).view(y.shape),
            "write": lambda: (y + 1).mul_(0.5),
            "slice": lambda: y[:, 1:],
            "pixels": lambda: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
            "power": lambda: y**2,
            "clamp": lambda: y.clamp(-1, 1),
            "softmax": lambda: y.softmax(1),
            "shift": lambda: y + self.shift,
            "identity": lambda: y,
        }
        return steps[step]()

    def extra_repr(self) -> str:
        """Its steps."""
        return f"{self.steps}, {self.ending}"
