"""Data and a grid that are trained on in no time."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

from grid import Grid

GRID = """
rates: [0.001, 0.01, 0.1, 1.0]
seeds: 2
warmup: 0.05
contenders:
  SGD-M: &sgd {base: sgd, options: {momentum: 0.9}, rescaled: true}
  EC-SGD (units): {<<: *sgd, ec: {rule: unit}, plain: SGD-M, default_rate: 0.3}
tasks:
  images:
    network: {name: mlp, inputs: 16, hidden: 1, width: 8, bias: true, init: default}
    data: {dataset: mnist, size: 4, num_train: 200, num_validation: 100}
    batch_size: 10
    epochs: 6
  text:
    network: {name: decoder, width: 8, depth: 1, heads: 2, context: 8, positions: rotary, init: gpt2}
    data: {text: alphabet, context: 8}
    batch_size: 8
    steps: 60
"""


def written(path: Path, text: str) -> Grid:
    """The grid of a text, by way of a file."""
    path.write_text(text)
    return Grid.read(path)


class ImagesAndText:
    """``mnist.npz``, ten classes of 8 x 8 images that a small network tells apart, and a text that repeats itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(0)
        centres = generator.uniform(0, 255, (10, 4, 4)).repeat(2, 1).repeat(2, 2)
        arrays = {}
        for split, count in (("train", 400), ("test", 100)):
            labels = generator.integers(0, 10, count)
            images = centres[labels] + generator.normal(0, 20, (count, 8, 8))
            arrays[f"x_{split}"] = np.clip(images, 0, 255).astype("uint8")
            arrays[f"y_{split}"] = labels.astype("uint8")
        np.savez(folder / "mnist.npz", **arrays)
        (folder / "alphabet.txt").write_text(500 * "abcd")
