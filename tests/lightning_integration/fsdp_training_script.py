"""What test_fsdp_training runs in two and in four processes that share the parameters, in a file for each."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ScalingGroup, ec_sgd, scaling_group
from tests.lightning_integration.fsdp_script import shard, whole
from tests.lightning_integration.modules import Batch, Classifier, digits, quiet
from tests.lightning_integration.modules import trainer as training
from tests.optim.bases import BASES

STEPS = 5
STOP = 3  # where a resumed run is taken up
REFRESH = 2
GRADIENTLESS = 1  # the step in which the first parameter has no gradient


# The optimizer --------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Units in products, a weight that is used twice, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.value = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(5, 6, bias=False)
        self.down, self.again, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.down(F.relu(self.gate(x)) * self.value(x))
        return self.head(F.relu(self.again(F.relu(self.again(x)))))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 2, groups=2),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 7),
        nn.PReLU(7),
        nn.Linear(7, 3),
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 6, 2),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv1d(6, 5, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(10, 5),
        nn.LayerNorm(5),
        nn.ReLU(),
        nn.Linear(5, 2),
    )


def perceptron() -> nn.Module:
    """One unit is dormant."""
    net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[0].weight[8], net[0].bias[8] = 0, 0
    return net


@dataclass(frozen=True)
class Case:
    """A network, trained with several bases.

    Args:
        build: the network.
        shape: of its inputs, without the batch.
        bases: names in ``BASES``; of each form of state one.
        outputs: of the network.
        layout: how it is sharded: ``"layers"``, ``"whole"``, ``"beside"`` a plain layer, ``"traced before"``.
        warm: whether the first step has a learning rate of zero.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bases: tuple[str, ...]
    outputs: int
    layout: str = "layers"
    warm: bool = False


CASES = {
    "convolutions": Case(convolutions, (2, 4, 4), ("nesterov", "adamw", "asgd"), 3),
    "norms": Case(norms, (2, 4), ("nesterov",), 2, "traced before", warm=True),
    "products": Case(Gated, (3,), ("asgd",), 2, "whole"),
    "perceptron": Case(perceptron, (3,), ("rmsprop_centered",), 2, "beside"),
}
RUNS = [(case, base) for case in CASES for base in CASES[case].bases]
#: Of these with four processes.
FEW = [("convolutions", "nesterov"), ("perceptron", "rmsprop_centered")]
#: Also taken up from a checkpoint.
TAKEN_UP = [("convolutions", "asgd"), ("norms", "nesterov"), ("perceptron", "rmsprop_centered")]


def start(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """A network away from balance, with 16 examples; the same in every process."""
    torch.manual_seed(1)
    net = case.build().double()
    x, y = torch.randn(16, *case.shape).double(), torch.randn(16, case.outputs).double()
    group = scaling_group(net, x)
    group.act_(torch.randn(group.num_units) / 2)
    return net, x, y


def spread(net: nn.Module, x: Tensor, layout: str, mesh: DeviceMesh | None) -> tuple[ScalingGroup, list[nn.Parameter]]:
    """Shard a network if there is a mesh; its group, and the parameters whose gradients nobody averages."""
    plain: list[nn.Parameter] = []
    before = scaling_group(net, x)
    if mesh is not None:
        if layout == "beside":
            plain = list(net[2].parameters())
            fully_shard(net, mesh=mesh, ignored_params=set(plain))
        elif layout == "whole":
            fully_shard(net, mesh=mesh)
        else:
            shard(net, mesh)
    return before.of(net) if layout == "traced before" else scaling_group(net, x), plain


def take_steps(
    net: nn.Module, optimizer: Any, data: Batch, steps: Iterable[int], warm: bool, plain: list[nn.Parameter]
) -> None:
    for step in steps:
        optimizer.zero_grad()
        F.mse_loss(net(data[0]), data[1]).backward()
        for p in plain:
            distributed.all_reduce(p.grad)
            p.grad /= distributed.get_world_size()
        if step == GRADIENTLESS:
            next(net.parameters()).grad = None
        rates = [options["lr"] for options in optimizer.param_groups]
        for options in optimizer.param_groups:
            options["lr"] *= 0.0 if warm and step == 0 else 0.9**step
        optimizer.step()
        for options, rate in zip(optimizer.param_groups, rates, strict=True):
            options["lr"] = rate


def trained(name: str, base: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Train one case, in one process or in several, each with its share of the examples; and once more, taken up."""
    case = CASES[name]
    rank, size = (mesh.get_local_rank(), mesh.size()) if mesh is not None else (0, 1)

    def begin() -> tuple[nn.Module, EquivalentClassOptimizer, Batch, list[nn.Parameter]]:
        net, x, y = start(case)
        group, plain = spread(net, x, case.layout, mesh)
        # Two groups of parameters, the first with a rate of its own.
        own = list(net.parameters())
        groups = [{"params": own[2:]}, {"params": own[:2]}]
        made = BASES[base].make(groups)
        made.param_groups[0]["lr"] *= 0.7
        optimizer = EquivalentClassOptimizer(made, group, refresh_interval=REFRESH)
        return net, optimizer, (x[rank::size], y[rank::size]), plain

    net, optimizer, data, plain = begin()
    take_steps(net, optimizer, data, range(STOP), case.warm, plain)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    take_steps(net, optimizer, data, range(STOP, STEPS), case.warm, plain)
    found = {
        "weights": whole(dict(net.named_parameters())),
        "rows": optimizer.rule_state(),
        "statistics": vars(optimizer.statistics()),
        "empty": sum(not p.to_local().numel() for p in net.parameters() if isinstance(p, DTensor)),
    }
    if (name, base) not in TAKEN_UP:
        return found
    net, optimizer, data, plain = begin()
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    take_steps(net, optimizer, data, range(STOP, STEPS), case.warm, plain)
    return found | {"resumed": whole(dict(net.named_parameters()))}


def refusal(mesh: DeviceMesh) -> str:
    """What is said of the rule of paths."""
    net, x, _ = start(CASES["perceptron"])
    fully_shard(net, mesh=mesh)
    try:
        EquivalentClassOptimizer(SGD(net.parameters(), lr=0.1), scaling_group(net, x), rule="path")
    except ValueError as error:
        return str(error)
    return ""


class Branched(nn.Module):
    """Takes a tanh more for long sequences, so that its units of the first layer are free for short ones alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = torch.tanh(h) if x.shape[1] > 4 else h
        return self.head(F.relu(self.second(h))).mean(1)


def in_a_loop(mesh: DeviceMesh) -> dict[str, Any]:
    """A plain loop in which ranks see other branches, and then the module is moved."""
    torch.manual_seed(1)
    net = Branched().double()
    fully_shard(net, mesh=mesh)
    optimizer = ec_sgd(net, lr=0.03, momentum=0.9, refresh_interval=REFRESH)
    lengths = (3, 6)[distributed.get_rank() % 2]
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(torch.ones(4, lengths, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    net.to("cpu")  # as a strategy does before each fit and test
    assert optimizer.group is not None
    return {"weights": whole(dict(net.named_parameters())), "units": optimizer.group.num_units}


# Lightning ------------------------------------------------------------------------------------------------------------


EPOCHS = 2
EXAMPLE = torch.zeros(1, 64, dtype=torch.float64)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 10)).double()


def adamw(module: Any) -> Any:
    return AdamW(module.parameters(), lr=0.01)


def scheduled(module: Any) -> Any:
    base = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return {"optimizer": base, "lr_scheduler": {"scheduler": ExponentialLR(base, 0.95), "interval": "step"}}


def own_optimizer(module: Any) -> Any:
    return ec_sgd(module, lr=0.1, momentum=0.9)


def named_optimizer(module: Any) -> Any:
    """In groups, the first of which is not sharded where ``beside`` is set."""
    last, *others = reversed(list(module.parameters()))
    return ECSGD([{"params": [last]}, {"params": others}], lr=0.1, momentum=0.9, refresh_interval=3)


class Share:
    """Every ``world``-th example of each of four batches."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Batch]:
        images, labels = digits()
        for number in range(len(self)):
            rows = range(32 * number + self.rank, 32 * (number + 1), self.world)
            yield images[rows].double(), labels[rows]


class Module(Classifier):
    """Is sharded where there are several processes; all but the last bias if ``beside`` is set."""

    beside = False

    def configure_model(self) -> None:
        if self.device_mesh is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh, ignored_params={self.net[4].bias} if self.beside else None)

    def on_after_backward(self) -> None:
        if self.beside and self.trainer.world_size > 1:
            distributed.all_reduce(self.net[4].bias.grad)
            self.net[4].bias.grad /= self.trainer.world_size

    def train_dataloader(self) -> Share:
        return Share(self.trainer.global_rank, self.trainer.world_size)


def fit(
    *callbacks: Callback,
    configure: Callable[[Any], Any] = scheduled,
    example: Tensor | None = EXAMPLE,
    seed: int = 0,
    processes: int = 1,
    whole_file: bool = False,
    beside: bool = False,
    ckpt: Path | None = None,
    **options: Any,
) -> tuple[Module, Trainer]:
    module = Module(net(seed), configure, example)
    module.beside = beside
    if processes > 1:
        options |= {
            "devices": processes,
            "strategy": ModelParallelStrategy(processes, 1, save_distributed_checkpoint=not whole_file),
        }
    options = {"max_epochs": EPOCHS, "use_distributed_sampler": False, **options}
    run = training(*callbacks, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options)
    run.fit(module, ckpt_path=None if ckpt is None else str(ckpt))
    return module, run


FITS: dict[str, dict[str, Any]] = {
    "SGD": {"configure": scheduled, "gradient_clip_val": 0.2},
    "AdamW": {"configure": adamw, "accumulate_grad_batches": 2},
    "ECSGD": {"configure": named_optimizer, "beside": True},
    "no example": {"configure": scheduled, "gradient_clip_val": 0.2, "example": None},
    "no example, ECSGD": {"configure": named_optimizer, "beside": True, "example": None},
}
#: With checkpoints in a folder and in one file.
SAVED = [*((name, False) for name in FITS), ("SGD", True), ("AdamW", True)]


def ended(module: Module, run: Trainer, callback: Any) -> dict[str, Any]:
    return {
        "weights": whole(dict(module.named_parameters())),
        "rows": callback.state_dict()["rules"][0] if run.world_size > 1 else run.optimizers[0].rule_state(),
        "units": callback.group.num_units,
        "steps": run.global_step,
    }


def fitted(name: str, processes: int = 1, **options: Any) -> dict[str, Any]:
    """Train with the callback, in one process or in several."""
    callback = quiet(refresh_interval=3 if name == "AdamW" else "epoch")
    saving = [options.pop("saving")] if "saving" in options else []
    return ended(*fit(callback, *saving, processes=processes, **FITS[name], **options), callback)


def saved(name: str, whole_file: bool, folder: Path) -> dict[str, Any]:
    """A whole run of two processes, and one from the end of its first epoch, which starts with other weights."""
    options = {"processes": 2, "whole_file": whole_file}
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    expected = fitted(name, saving=saving, **options)
    return {"expected": expected, "resumed": fitted(name, seed=9, ckpt=folder / "epoch=0.ckpt", **options)}


REFUSED: dict[str, Callable[[], Any]] = {
    "path": lambda: fit(quiet(rule="path"), processes=2),
    "path, ec_sgd": lambda: fit(configure=lambda m: ec_sgd(m, lr=0.1, rule="path"), processes=2),
}


def refused(name: str) -> str:
    """What is said of a configuration that is not supported."""
    try:
        REFUSED[name]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def without_callback(folder: Path) -> list[dict[str, Any]]:
    """What the optimizer of ``configure_optimizers`` has at the end, and when it was taken up after an epoch."""
    found = []
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    for options in ({}, {"seed": 9, "ckpt": folder / "epoch=0.ckpt"}):
        module, run = fit(*([] if options else [saving]), configure=own_optimizer, processes=2, **options)
        optimizer = run.optimizers[0]
        moments = {name: optimizer.state[p]["momentum_buffer"] for name, p in module.named_parameters()}
        weights = whole(dict(module.named_parameters()))
        found.append({"weights": weights, "moments": whole(moments), "rows": optimizer.rule_state()})
    return found


def run_lightning(rank: int, folder: Path) -> dict[str, Any]:
    """All that is done with a Trainer."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return {
        "saved": {run: saved(*run, folder / " ".join(map(str, run))) for run in SAVED},
        "without callback": without_callback(folder / "without callback"),
        "refused": {name: refused(name) for name in REFUSED},
    }


def main(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=60), init_method=f"file://{folder}/{size}", rank=rank, world_size=size
    )
    mesh = init_device_mesh("cpu", (size,))
    runs = RUNS if size == 2 else FEW
    found: dict[str, Any] = {"trained": {run: trained(*run, mesh) for run in runs}, "refusal": refusal(mesh)}
    found["in a loop"] = in_a_loop(mesh)
    if size == 2:
        found |= run_lightning(rank, folder)
    torch.save(found, folder / f"{size}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    for processes in (2, 4):
        multiprocessing.start_processes(
            main, args=(processes, Path(sys.argv[1])), nprocs=processes, start_method="fork"
        )
