"""One training run of the accuracy benchmark."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import peers
import tasks
import torch
from grid import ACCURACY, Contender, Task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_ecopt import EquivalentClassOptimizer, MuonAdamW, scaling_group, set_skeleton_to_one_
from lightning_ecopt.optim.muon import hidden_matrices, marked

POINTS = 20  # of a training curve
LEARNED = 0.995  # of the loss of a guess; a run that is above it after a third of its steps is given up


@dataclass(frozen=True)
class Run:
    """One training run; ``scale`` is the standard deviation of the log-scales of the rescaled start, or 0."""

    task: str
    contender: str
    rate: float
    seed: int
    scale: float = 0.0


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Args:
        run: which.
        validation: accuracy in per cent, or loss in nats. A run that diverges or learns nothing counts as a guess.
        test: likewise.
        loss: mean training loss of the last tenth of the steps.
        curve: mean training loss of each twentieth of the steps; ``None`` where it is no number; shorter where the run
            was given up.
        seconds: of training: of the processor on a CPU, where other processes may be at work, else by the clock.
        state_bytes: memory of the optimizer's state at the end, that of the equivalent-class rule included.
    """

    run: Run
    validation: float
    test: float
    loss: float
    curve: list[float | None]
    seconds: float
    state_bytes: int


Base = Callable[..., torch.optim.Optimizer]


def _of_parameters(kind: Base) -> Base:
    return lambda net, example, **options: kind(net.parameters(), **options)


def _of_module(kind: Base) -> Base:
    return lambda net, example, **options: kind(net, **options)


def _muon(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Hidden matrices by Muon, all else by AdamW, as :func:`lightning_ecopt.ec_muon` divides them."""
    return MuonAdamW(marked(net.parameters(), hidden_matrices(net)), **options)


BASES: dict[str, Base] = {  # of a network, an example of its inputs, and options
    "sgd": _of_parameters(torch.optim.SGD),
    "adamw": _of_parameters(torch.optim.AdamW),
    "muon": _of_module(_muon),
    "path_sgd": peers.PathSGD,
    "lamb": _of_parameters(peers.LAMB),
    "lars": _of_parameters(peers.LARS),
    "nero": _of_parameters(peers.Nero),
    "adam_mini": _of_module(peers.adam_mini),
}


class Method:
    """A contender's optimizer, with what it does around each step."""

    def __init__(self, contender: Contender, net: nn.Module, example: Tensor, rate: float) -> None:
        if contender.path_condition:
            peers.path_condition_(net, example)
        self._parameters = list(net.parameters())
        self._centralized = [p for p in self._parameters if p.ndim > 1] if contender.centralize else []
        self._clip_norm = contender.clip_norm
        self.optimizer = BASES[contender.base](net, example, lr=rate, **contender.options)
        self._after: Callable[[], None] = lambda: None
        if contender.enorm:
            self._after = peers.ENorm(scaling_group(net, example), self.optimizer).step
        self._refresh: Callable[[], None] = lambda: None
        if contender.ec is not None:
            self.optimizer = self._in_class_space(dict(contender.ec), net, example)

    def _in_class_space(self, options: dict[str, Any], net: nn.Module, example: Tensor) -> EquivalentClassOptimizer:
        every_epoch = options.setdefault("refresh_interval", "epoch") == "epoch"
        if every_epoch:
            options["refresh_interval"] = None
        wrapped = EquivalentClassOptimizer(self.optimizer, scaling_group(net, example), **options)
        if every_epoch:
            self._refresh = wrapped.refresh
        if self._clip_norm is not None:
            wrapped.start()  # so that the first clipped gradient is that of the balanced weights
        return wrapped

    def start_epoch(self) -> None:
        """As the callback does."""
        self._refresh()

    def step(self) -> None:
        """After the gradients are there."""
        for p in self._centralized:
            assert p.grad is not None
            p.grad.sub_(p.grad.flatten(1).mean(1).view(-1, *[1] * (p.ndim - 1)))
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self.optimizer.step()
        self._after()

    def state_bytes(self) -> int:
        """Memory of all tensors of the state: the base optimizer's, and what the rule keeps from step to step.

        The state dict also has copies of the former, and what says where the run stands: both are left out.
        """
        kept: list[Any] = [dict(self.optimizer.state)]
        rule = self.optimizer.state_dict().get("equivalent_class") or {}
        kept.append({name: value for name, value in rule.items() if name not in ("moments", "check", "equations")})
        tensors = {id(leaf): leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)}
        return sum(leaf.numel() * leaf.element_size() for leaf in tensors.values())


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine to zero."""
    first = max(1, round(warmup * total))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


def start(run: Run, task: Task, contender: Contender, data: tasks.Data) -> nn.Module:
    """The network of a seed, rescaled by exp(N(0, scale^2)) unit by unit if the run says so."""
    torch.manual_seed(run.seed)
    net = task.net(data.outputs)
    if contender.unit_skeleton:
        set_skeleton_to_one_(scaling_group(net, data.example.cpu()))
    if run.scale:
        group = scaling_group(net, data.example.cpu())
        generator = torch.Generator().manual_seed(1000 + run.seed)
        group.act_(run.scale * torch.randn(group.num_units, generator=generator))
    return net.to(data.example.device)


def cross_entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over labels: of images ``[B]``, of text ``[B, T]``."""
    return F.cross_entropy(net(x).flatten(0, -2), y.flatten())


def batches(data: tasks.Data, batch_size: int, total: int, seed: int, start_epoch: Callable[[], None]) -> Iterator[Any]:
    """The batches of ``total`` steps; ``start_epoch`` is called before the first of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    left = total
    while left > 0:
        start_epoch()
        yield from islice(data.epoch(batch_size, generator), left)
        left -= data.steps_of_epoch(batch_size)


def fit(net: nn.Module, method: Method, run: Run, task: Task, data: tasks.Data, warmup: float) -> tuple[Tensor, bool]:
    """Train; returns the loss of each step, and whether it came to the end.

    It does not where nothing was learned in the first third, or the loss is no number any more.
    """
    total = steps_of(task, data)
    span = math.ceil(total / POINTS)
    losses = torch.zeros(total, device=data.example.device)
    for done, (x, y) in enumerate(batches(data, task.batch_size, total, run.seed, method.start_epoch), 1):
        for options in method.optimizer.param_groups:
            options["lr"] = run.rate * schedule(done - 1, total, warmup)
        method.optimizer.zero_grad()
        with task.precision(x.device):
            loss = cross_entropy(net, x, y)
        loss.backward()
        method.step()
        losses[done - 1] = loss.detach()
        if done % span == 0 or done == total:
            recent = float(losses[done - span : done].mean())
            if not math.isfinite(recent) or (done > total // 3 and recent > LEARNED * math.log(data.outputs)):
                return losses[:done], False
    return losses, True


def steps_of(task: Task, data: tasks.Data) -> int:
    """All steps of a run."""
    return task.steps or task.epochs * data.steps_of_epoch(task.batch_size)


def train(run: Run, task: Task, contender: Contender, warmup: float, folder: str, device: str) -> Result:
    """One run."""
    data = tasks.load(folder, device, **task.data)
    net = start(run, task, contender, data)
    method = Method(contender, net, data.example, run.rate)
    if task.autocast and isinstance(method.optimizer, EquivalentClassOptimizer):
        method.optimizer.follow_precision(lambda: "bf16-mixed")
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    losses, learned = fit(net, method, run, task, data, warmup)
    seconds = round(clock() - began, 2)
    total = steps_of(task, data)
    means = [float(part.mean()) for part in losses.split(math.ceil(total / POINTS))]
    curve = [round(value, 4) if math.isfinite(value) else None for value in means]
    scores = [evaluate(net, task, data, part) if learned else math.nan for part in ("validation", "test")]
    end = float(losses[-max(1, total // 10) :].mean())
    if not all(map(math.isfinite, scores)):
        scores, end = 2 * [chance(task, data)], math.log(data.outputs)
    return Result(run, scores[0], scores[1], end, curve, seconds, method.state_bytes())


def chance(task: Task, data: tasks.Data) -> float:
    """What a guess reaches, with all classes or tokens alike."""
    return 100 / data.outputs if task.metric is ACCURACY else math.log(data.outputs)


@torch.no_grad()
def evaluate(net: nn.Module, task: Task, data: tasks.Data, part: str) -> float:
    """Accuracy in per cent, or loss in nats (of a guess if it is larger), of ``validation`` or ``test``."""
    net.eval()
    total, number = 0.0, 0
    for x, y in data.held_out(part):
        with task.precision(x.device):
            outputs = net(x)
            if task.metric is ACCURACY:
                total += 100 * float((outputs.argmax(1) == y).sum())
            else:
                total += float(F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="sum"))
        number += y.numel()
    value = total / number
    return value if task.metric is ACCURACY or not value > chance(task, data) else chance(task, data)
