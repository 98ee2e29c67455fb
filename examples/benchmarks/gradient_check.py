"""Does ``check="gradient"`` raise false alarms, what does it find, and what does it cost?

Three tables. *False alarms*: all networks of the tests' zoo that train in a precision are trained on random data, and
looked at in every step. *Detections*: terms that break units are added to the loss of a small network; the units that
the whole loss leaves free are known from a trace of it. *Cost*: time of a look against that of a refresh and a step.
The committed page, ``GRADIENT_CHECK.md``, was made in three minutes by::

    python examples/benchmarks/gradient_check.py --out examples/benchmarks
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[2]))

from pages import conditions, in_words

from lightning_ecopt import EquivalentClassOptimizer, ScalingGroup, scaling_group
from lightning_ecopt.symmetry.derivatives import LAMBDA
from tests.symmetry.helpers import broken_units, directions, draw_, flat_output
from tests.symmetry.zoo import ZOO

SEED = 0


@dataclass(frozen=True)
class Precision:
    """What a network is kept in, and computed in."""

    name: str
    kept: torch.dtype
    autocast: torch.dtype | None = None

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)

    def of(self, value: object) -> object:
        is_real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.kept) if is_real else value


PRECISIONS = [
    Precision("float64", torch.float64),
    Precision("float32", torch.float32),
    Precision("bfloat16 autocast", torch.float32, torch.bfloat16),
    Precision("float16 autocast", torch.float32, torch.float16),
    Precision("bfloat16", torch.bfloat16),
    Precision("float16", torch.float16),
]


# False alarms ---------------------------------------------------------------------------------------------------------


@dataclass
class Alarms:
    """What the networks of the zoo have shown in one precision."""

    networks: int = 0
    units: int = 0
    looks: int = 0
    alarms: int = 0
    largest: float = 0.0
    where: str = ""


def false_alarms(precision: Precision, steps: int) -> tuple[Alarms, list[str]]:
    """Train all networks of the zoo; returns what they have shown, and which do not train in this precision."""
    found, left_out = Alarms(), []
    for case in ZOO:
        generator = torch.Generator().manual_seed(SEED)
        torch.manual_seed(SEED)
        module = case.build().train()
        draw_(module, generator)
        group = scaling_group(module, *case.inputs(generator))
        if not group.num_units:
            continue
        module = module.to(precision.kept)
        optimizer = EquivalentClassOptimizer(
            torch.optim.SGD(module.parameters(), lr=0.01),
            group.of(module),
            refresh_interval=3,
            implementation="wrapped",
        )
        looks = []
        try:
            for _ in range(steps):
                optimizer.zero_grad()
                with precision.computing():
                    output = module(*map(precision.of, case.inputs(generator)))
                output = flat_output(output).float()
                target = torch.randn(output.shape, generator=generator)
                F.mse_loss(output, target * output.detach().std().clamp(min=1e-3)).backward()
                looks.append(sigmas(optimizer.group))
                optimizer.step()
        except (RuntimeError, NotImplementedError):  # an operation does not exist in this precision
            left_out.append(case.name)
            continue
        found.networks, found.units, found.looks = (
            found.networks + 1,
            found.units + group.num_units,
            found.looks + steps,
        )
        found.alarms += group.num_units - optimizer.group.num_units
        if max(looks) > found.largest:
            found.largest, found.where = max(looks), case.name
    return found, left_out


def sigmas(group: ScalingGroup) -> float:
    """The largest |Q| of a unit, in standard deviations of rounding."""
    derivatives = group.derivatives()
    total, _, most, _ = derivatives.evidence(derivatives.mean_size()).sums
    share = torch.where(most > 0, total.abs() / most, 0.0)
    return LAMBDA * float(share.max()) if len(share) else 0.0


# Detections -----------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """An MLP with a loss: cross entropy, and a term that may break units."""

    def __init__(self, term: Callable[[Network, Tensor], Tensor] | None, begins: int = 0) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.features = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        self.term, self.begins, self.count = term, begins, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self(x).float(), y)
        self.count += 1
        return loss if self.term is None or self.count <= self.begins else loss + self.term(self, x)


class Whole(nn.Module):
    """The loss as a module, whose freedoms a trace finds."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.net.count = self.net.begins
        return self.net.loss(x, y)


def hidden(net: Network, x: Tensor) -> Tensor:
    return (net.features(x) - 1).square().mean()


def orthogonality(net: Network, _: Tensor) -> Tensor:
    weight = net.features[2].weight.float()
    return (weight @ weight.t() - torch.eye(16)).square().sum()


KINDS: dict[str, tuple[Callable[[Network, Tensor], Tensor] | None, int]] = {
    "none": (None, 0),
    "L1 of all weights, 0.001": (lambda net, _: 1e-3 * sum(p.float().abs().sum() for p in net.parameters()), 0),
    "L2 of all weights, 0.001": (lambda net, _: 1e-3 * sum(p.float().square().sum() for p in net.parameters()), 0),
    "L1 of one layer, 0.001": (lambda net, _: 1e-3 * net.head[0].weight.float().abs().sum(), 0),
    "orthogonality of one layer, 0.01": (lambda net, x: 0.01 * orthogonality(net, x), 0),
    "loss on hidden values": (hidden, 0),
    "a tenth of it": (lambda net, x: 0.1 * hidden(net, x), 0),
    "a hundredth of it": (lambda net, x: 0.01 * hidden(net, x), 0),
    "on an eighth of the batch": (lambda net, x: hidden(net, x[::8]) / 8, 0),
    "from the 7th step on": (hidden, 6),
    "feature matching": (lambda net, x: F.mse_loss(net.features(x), net.features(x.flip(0) + 1)), 0),
    "a weight used elsewhere": (lambda net, x: F.linear(x, net.features[0].weight).square().mean(), 0),
}


def batches(precision: Precision) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    while True:
        x = torch.randn(32, 8, generator=generator)
        yield x.to(precision.kept), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def detection(kind: str, precision: Precision, steps: int) -> tuple[float, int, int, int]:
    """Returns the largest ratio that was found, how many units break, and how many of these, and others, are held."""
    net = Network(*KINDS[kind])
    data = batches(precision)
    x, y = next(data)
    group = scaling_group(net, x.float())
    free = scaling_group(Whole(copy.deepcopy(net)), x.float(), y)
    broken = broken_units(group, free)
    net = net.to(precision.kept)
    optimizer = EquivalentClassOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.01), group.of(net), refresh_interval=6, implementation="wrapped"
    )
    largest = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = next(data)
        with precision.computing():
            loss = net.loss(x, y)
        loss.backward()
        derivatives = group.of(net).derivatives()
        ratio = derivatives.evidence(derivatives.mean_size()).ratio
        largest = max(largest, float(ratio.max()))
        optimizer.step()
    held = _is_held(group, optimizer.group)
    return largest, int(broken.sum()), int((held & broken).sum()), int((held & ~broken).sum())


def _is_held(group: ScalingGroup, kept: ScalingGroup) -> Tensor:
    """Units of a group that are not in another any more, ``bool[H]``."""
    of_kept = set(map(tuple, directions(kept).t().tolist()))
    return torch.tensor([tuple(column) not in of_kept for column in directions(group).t().tolist()])


# Cost -----------------------------------------------------------------------------------------------------------------


def cost(repeats: int) -> dict[str, float]:
    """Seconds of a look, a balance and a step of a VGG-like network of 3.4 million weights."""
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    for inner, outer in ((3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 256)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2) if outer > 100 else nn.Identity()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    x, y = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    group = scaling_group(net, x)
    optimizer = EquivalentClassOptimizer(torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), group, check=None)
    F.cross_entropy(net(x), y).backward()
    for _ in range(3):
        optimizer.step()

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def refreshed() -> None:
        optimizer.refresh()
        optimizer.step()

    def trained() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    group.derivatives()
    found = {
        "look (Q, A and the bound of every unit)": seconds(group.derivatives),
        "step without a refresh": seconds(optimizer.step),
        "step with a refresh": seconds(refreshed),
    }
    return {**found, "forward, backward and step, batch of 32": seconds(trained)}


# The page -------------------------------------------------------------------------------------------------------------


def page(steps: int, repeats: int) -> str:
    """Make the page."""
    lines = [
        "# False alarms and detections of the gradient check",
        "",
        'What `check="gradient"` (the default) and `check_invariance` find; the docstring of `gradient_check.py` says '
        f"how. Seed {SEED}. Made by",
        "",
        "```sh",
        "python examples/benchmarks/gradient_check.py --out FOLDER",
        "```",
        "",
        f"with {in_words(conditions(torch.device('cpu')))}, one thread of {os.cpu_count()} cores.",
        "",
        "## False alarms",
        "",
        f"Networks of the tests' zoo, {steps} steps each on random data, with a refresh every third. *Held* counts "
        "units that were held fixed although the loss does not break them. *Largest* is the largest \\|Q\\| of a unit "
        f"in standard deviations of rounding, of which {LAMBDA:g} raise the alarm. It is of the rounding that "
        "gradients show, which may be of 32 bits under autocast. As nobody tells the precision here, it is inferred "
        f"from the median of all units, and {LAMBDA:g} relates to the bound that is inferred: so thousands raise no "
        "alarm there. Left out are networks with an operation that torch does not have in the precision.",
        "",
        "| precision | networks | left out | units | looks at a network | held | largest | in |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for precision in PRECISIONS:
        found, left_out = false_alarms(precision, steps)
        lines.append(
            f"| {precision.name} | {found.networks} | {len(left_out)} | {found.units:,} | {found.looks:,} | "
            f"{found.alarms} | {found.largest:.2f} | {found.where} |"
        )
    names = [precision.name for precision in PRECISIONS]
    lines += [
        "",
        "## Detections",
        "",
        "An MLP 8-32-16-16-3 with cross entropy and one term more, 24 steps on random batches of 32, a refresh every "
        "sixth. Each cell has the largest ratio \\|Q\\| / A of a unit, and how many of the units that break were held "
        "fixed. No unit that the whole loss leaves free was held" + "{}.",
        "",
        f"| term | units that break | {' | '.join(names)} |",
        f"|---|---:|{'---|' * len(names)}",
    ]
    place, wrong = len(lines) - 4, 0
    for kind in KINDS:
        cells, broken = [], 0
        for precision in PRECISIONS:
            ratio, broken, right, others = detection(kind, precision, 24)
            wrong += others
            cells.append(f"{ratio:.2g}" + (f": {right}" if broken else ""))
        lines.append(f"| {kind} | {broken} | {' | '.join(cells)} |")
    lines[place] = lines[place].format("" if not wrong else f" but {wrong}")
    lines += ["", "## Cost", "", "| of a network of 3.4 million weights | seconds |", "|---|---:|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in cost(repeats).items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--steps", type=int, default=6, help="steps of each network of the zoo")
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement of time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = page(options.steps, options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "GRADIENT_CHECK.md").write_text(text)


if __name__ == "__main__":
    main()
