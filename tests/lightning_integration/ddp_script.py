"""What test_ddp runs in several processes: ways to train, each of which one process must be able to follow.

    python -m tests.lightning_integration.ddp_script launched FOLDER  # two processes, each of which runs the script
    python -m tests.lightning_integration.ddp_script started FOLDER   # four that are forked, and two that are spawned

Every rank leaves what it ended with in a file.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, DistributedSampler

from lightning_ecopt import ECSGD, ec_adamw, ec_sgd
from tests.lightning_integration.modules import EXAMPLE, Batch, Classifier, loader, mlp, quiet, trainer, weights
from tests.lightning_integration.runs import TakenUp
from tests.lightning_integration.sync_batch_norm import on_cpu

DOUBLE = EXAMPLE.double()
RULES = ("unit", "path")
STRATEGIES = {"popen": "ddp", "spawn": "ddp_spawn", "fork": "ddp_fork"}

# Modules --------------------------------------------------------------------------------------------------------------


class Follower(Classifier):
    """Trains as one of several ranks, or in one process with what all of them would take."""

    def setup(self, stage: str) -> None:
        # Ranks start from different weights: DDP makes them equal before training, and nothing may come earlier.
        if self.trainer.global_rank > 0:
            with torch.no_grad():
                for p in self.parameters():
                    p.normal_()
        self.start = weights(self)

    def train_dataloader(self) -> DataLoader[Any]:
        """Of every 32 consecutive examples each rank takes every n-th; the sampler of Lightning's choice shuffles."""
        everything, world = loader().dataset, self.trainer.world_size
        sampler: DistributedSampler[Any] = DistributedSampler(
            everything, world, self.trainer.global_rank, shuffle=False
        )
        return DataLoader(everything, batch_size=32 // world, sampler=sampler)


class Parted(Follower):
    """In one process, treats the part of each rank by itself.

    Args:
        world: how many ranks there are, or would be.
        net: the network.
        example: the ``example_input_array``.
    """

    def __init__(self, world: int, net: nn.Module | None = None, example: Tensor | None = None) -> None:
        super().__init__(net, example=example)
        self.world = world

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ranks = range(self.world) if self.trainer.world_size == 1 else [self.trainer.global_rank]
        parts = [(batch[0][k :: len(ranks)], batch[1][k :: len(ranks)]) for k in range(len(ranks))]
        self.losses = [self.loss(part, rank) for part, rank in zip(parts, ranks, strict=True)]
        return torch.stack(self.losses).mean()

    def loss(self, part: Batch, rank: int) -> Tensor:
        return F.cross_entropy(self(part[0]), part[1])


class Sometimes(Parted):
    """Has a second head, of 8 freedoms, that is not used in every step of every rank.

    Args:
        world: as above.
        uses: whether a rank uses the head in a step.
        example: the ``example_input_array``, with which the head is used.
    """

    def __init__(self, world: int, uses: Callable[[int, int], bool], example: Tensor | None = None) -> None:
        super().__init__(world, example=example)
        self.uses = uses
        self.second = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        hidden = self.net[:4](x)
        return self.net[4](hidden) + (self.second(hidden) if both else 0)

    def loss(self, part: Batch, rank: int) -> Tensor:
        return F.cross_entropy(self(part[0], self.uses(self.trainer.global_step, rank)), part[1])


def at_even_steps(step: int, rank: int) -> bool:
    return step % 2 == 0


def at_odd_steps(step: int, rank: int) -> bool:
    return step % 2 == 1


def by_turns(step: int, rank: int) -> bool:
    """In the first step all ranks use it, in further ones half of them."""
    return step == 0 or (step + rank) % 2 == 0


def never(step: int, rank: int) -> bool:
    return False


def by_the_first(step: int, rank: int) -> bool:
    return rank == 0


class Compressed(Parted):
    """In one process, does to the gradients what a communication hook does between several.

    Args:
        world: as above.
        dtype: that of what is sent.
    """

    def __init__(self, world: int, dtype: torch.dtype) -> None:
        super().__init__(world)
        self.sent_as = dtype

    def backward(self, loss: Tensor) -> None:
        if self.trainer.world_size > 1:
            super().backward(loss)
            return
        own = list(self.parameters())
        for p, *gradients in zip(own, *(torch.autograd.grad(one, own) for one in self.losses), strict=True):
            p.grad = torch.stack([g.to(self.sent_as) / len(gradients) for g in gradients]).sum(0).to(p)


class OwnExample(Follower):
    """Has an example with as many rows as the rank."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.example_input_array = DOUBLE.expand(1 + self.trainer.global_rank, -1)


class Fickle(Follower):
    """On all ranks but the first, the first call shows other operations than all further ones."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.squashes = self.trainer.global_rank > 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[:3](x)
        squashes, self.squashes = self.squashes, False
        return self.net[4](torch.tanh(hidden) if squashes else torch.relu(hidden))


class Copied(Follower):
    """In the midst of training the first rank, and no other, begins to keep an average of the weights."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == 6 and self.trainer.global_rank == 0:
            self.average = copy.deepcopy(self.net).requires_grad_(False)
        with torch.no_grad():
            for name, p in self.average.named_parameters() if hasattr(self, "average") else ():
                p.lerp_(self.net.get_parameter(name), 0.1)


class Manual(Follower):
    """Takes its steps by itself."""

    def __init__(self, example: Tensor | None = DOUBLE) -> None:
        super().__init__(example=example)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def normed() -> nn.Sequential:
    """A convolution with a batch norm and a hidden layer, with 4 and 6 freedoms."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, stride=2, bias=False),  # whose gradient would be nothing but rounding
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.ReLU(),
        nn.Linear(6, 10),
    )


# Callbacks ------------------------------------------------------------------------------------------------------------


class Record(Callback):
    """Takes down the gradients of every step and what the ranks ended with, and leaves it in files."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.gradients: list[list[Tensor]] = []
        self.result: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = [getattr(part, "group", None) for part in (*trainer.callbacks, *trainer.optimizers)]
        self.result = {
            "start": getattr(pl_module, "start", None),
            "weights": [p.detach().clone() for p in pl_module.parameters() if p.requires_grad],
            "gradients": self.gradients,
            "units": {group.num_units for group in found if group is not None},
            "steps": trainer.global_step,
            "modules": {type(part).__name__ for part in pl_module.modules()},
        }
        self.leave(trainer.global_rank)

    @classmethod
    def failed(cls, path: Path, error: Exception, rank: int) -> None:
        """Leave an error instead."""
        record = cls(path)
        record.result = {"error": f"{type(error).__name__}: {error}"}
        record.leave(rank)

    def leave(self, rank: int) -> None:
        """Write the file of a rank."""
        if self.path is not None:
            torch.save(self.result, self.path.with_name(f"{self.path.name}-{rank}.pt"))


class Hooked(Callback):
    """Registers a communication hook, which Lightning itself does on GPUs only."""

    def __init__(self, hook: Callable[..., Any], state: Callable[[], Any] = lambda: None) -> None:
        self.hook, self.state = hook, state

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            trainer.strategy.model.register_comm_hook(self.state(), self.hook)


def low_rank() -> PowerSGDState:
    return PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1)


# Ways to train --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A way to train that means the same in any number of processes.

    Args:
        module: makes the module, given the number of processes that train or are followed.
        callback: options of the callback; ``None`` where ``configure_optimizers`` makes the optimizer.
        ddp: options of the strategy.
        finds_unused: whether DDP looks for parameters that were not used.
        hook: a communication hook, and what makes its state.
        exact: whether the steps are taken in float64.
        options: of the Trainer.
    """

    module: Callable[[int], LightningModule]
    callback: dict[str, Any] | None
    ddp: dict[str, Any] = field(default_factory=dict)
    finds_unused: bool = False
    hook: Sequence[Callable[..., Any]] = ()
    exact: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def train(self, world: int, start: str | None = None, path: Path | None = None) -> dict[str, Any]:
        """Train for three epochs of four batches.

        Args:
            world: how many ranks train, or are followed.
            start: how processes are started; in one process all ranks are followed.
            path: of the files with the results.

        Returns:
            The result, if this process trains.
        """
        options = {"max_epochs": 3, "use_distributed_sampler": False, **self.options}
        if self.exact:
            options["precision"] = "64-true"
        if start is not None:
            options |= {"strategy": self.strategy(start), "devices": world}
        record = Record(path)
        callbacks: list[Callback] = [record, *([Hooked(*self.hook)] if self.hook else [])]
        if self.callback is not None:
            callbacks.append(quiet(**self.callback))
        module = self.module(world)
        kernels: AbstractContextManager[None] = on_cpu() if start and "sync_batchnorm" in options else nullcontext()
        with kernels:
            trainer(*callbacks, **options).fit(module)
        return record.result

    def strategy(self, start: str) -> Any:
        """The strategy, by its name where it has one."""
        if self.ddp:
            return DDPStrategy(start_method=start, **self.ddp)
        return STRATEGIES[start] + ("_find_unused_parameters_true" if self.finds_unused else "")


def cases(rule: str) -> dict[str, Case]:
    """The ways to train with a rule, by name."""
    callback = {"rule": rule}

    def plain(**options: Any) -> Callable[[int], Follower]:
        return lambda world: Follower(**options)

    def synchronized(world: int) -> Follower:
        return Follower(normed())

    def adamw(module: Any) -> AdamW:
        return AdamW(module.parameters(), lr=0.01)

    def ours(module: Any) -> Any:
        return ec_sgd(module, lr=0.1, momentum=0.9, weight_decay=1e-3, rule=rule, refresh_interval=5)

    def by_name(module: Any) -> Any:
        return ECSGD(module.parameters(), lr=0.1, momentum=0.9, rule=rule, refresh_interval=5)

    def ours_adamw(module: Any) -> Any:
        return ec_adamw(module, lr=0.01, rule=rule, refresh_interval=5)

    return {
        "first step": Case(plain(), callback, exact=False),
        "example": Case(plain(example=EXAMPLE), {**callback, "verbose": True}, exact=False),
        "examples of other sizes": Case(lambda world: OwnExample(), callback),
        "AdamW": Case(plain(configure=adamw), callback),
        "ec_sgd": Case(plain(configure=ours), None),
        "ECSGD": Case(plain(configure=by_name), None),
        "ec_adamw": Case(plain(configure=ours_adamw, example=DOUBLE), None),
        "accumulation": Case(plain(), callback, options={"accumulate_grad_batches": 3}),
        "clipping": Case(plain(), callback, options={"gradient_clip_val": 0.5}),
        "bucket views": Case(
            plain(), callback, {"gradient_as_bucket_view": True}, options={"accumulate_grad_batches": 2}
        ),
        "static graph": Case(plain(), callback, {"static_graph": True}),
        "manual": Case(lambda world: Manual(), callback),
        "manual, first step": Case(lambda world: Manual(None), callback),
        "unused at times": Case(lambda world: Sometimes(world, at_even_steps), callback, finds_unused=True),
        "unused at first": Case(lambda world: Sometimes(world, at_odd_steps, DOUBLE), callback, finds_unused=True),
        "unused by turns": Case(lambda world: Sometimes(world, by_turns), callback, finds_unused=True),
        "batch norm": Case(lambda world: Parted(world, normed()), callback),
        "SyncBatchNorm": Case(synchronized, callback, options={"sync_batchnorm": True}),
        "SyncBatchNorm, example": Case(
            lambda world: Follower(normed(), example=DOUBLE), callback, options={"sync_batchnorm": True}
        ),
        "fp16": Case(lambda world: Compressed(world, torch.float16), callback, hook=[fp16_compress_hook]),
        # By its own name torch lets no backend run it but NCCL.
        "bf16": Case(
            lambda world: Compressed(world, torch.bfloat16),
            callback,
            hook=[lambda state, bucket: bf16_compress_hook(state, bucket)],
        ),
        "low rank": Case(plain(), callback, hook=[powerSGD_hook, low_rank], exact=False),
        "never used": Case(lambda world: Sometimes(world, never), callback, finds_unused=True),
        "used by one rank": Case(lambda world: Sometimes(world, by_the_first), callback, finds_unused=True),
        "a copy": Case(lambda world: Copied(), callback),
        "other first steps": Case(lambda world: Fickle(), callback),
        "other first calls": Case(lambda world: Fickle(configure=by_name), None),
        "other examples": Case(lambda world: Fickle(example=DOUBLE), callback),
    }


#: The ways in which the gradients are others than those of one process.
APPROXIMATE = ("low rank",)
#: The ways in which ranks find other freedoms by themselves, and which one process cannot follow.
APART = ("other first steps", "other first calls", "other examples")
#: What is run in four processes, and in two that are spawned.
FORKED = (
    ("example", "unit"),
    ("accumulation", "path"),
    ("unused by turns", "unit"),
    ("SyncBatchNorm", "path"),
)
SPAWNED = (("unused by turns", "path"),)

# Resuming -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """A run that is resumed from checkpoints within its first epoch, within its second, and at the end of that.

    Args:
        callback: options of the callback; ``None`` goes without.
        configure: what ``configure_optimizers`` does.
        example: the ``example_input_array``.
    """

    callback: dict[str, Any] | None
    configure: Callable[[Any], Any] | None = None
    example: Tensor | None = None

    CHECKPOINTS = ("step=4", "step=8", "epoch=1")

    def train(self, folder: Path) -> dict[str, Any]:
        """What a rank ends with, uninterrupted and from each checkpoint."""
        steps = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=4)
        epochs = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        ends = {"whole": self._end(0, None, steps, epochs)}
        for name in self.CHECKPOINTS:
            # Another seed shows that everything comes from the checkpoint.
            ends[name] = self._end(9, folder / f"{name}.ckpt")
        return ends

    def _end(self, seed: int, checkpoint: Path | None, *saves: Callback) -> dict[str, Any]:
        ours = [] if self.callback is None else [quiet(**self.callback)]
        run = trainer(*ours, *saves, strategy="ddp", devices=2, max_epochs=4, enable_checkpointing=bool(saves))
        module = TakenUp(mlp(seed), self.configure, self.example)
        run.fit(module, ckpt_path=checkpoint)
        assert run.global_step == 4 * TakenUp.STEPS_PER_EPOCH
        return {
            "weights": weights(module),
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "callbacks": [callback.state_dict() for callback in ours],
        }


RESUMED = {
    "first step, unit": Resumed({"rule": "unit"}),
    "example, path": Resumed({"rule": "path"}, example=EXAMPLE),
    "ec_sgd, path": Resumed(None, lambda m: ec_sgd(m, lr=0.1, momentum=0.9, rule="path", refresh_interval=4)),
    "ec_adamw, unit": Resumed(None, lambda m: ec_adamw(m, lr=0.01, refresh_interval=4), EXAMPLE),
}

# Running them ---------------------------------------------------------------------------------------------------------


def launched(folder: Path, *names: str) -> None:
    """All cases with both rules, and what is resumed; or some cases with the first rule."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    for rule in RULES[:1] if names else RULES:
        for name, case in cases(rule).items():
            if names and name not in names:
                continue
            path = folder / f"{name}, {rule}"
            try:
                case.train(2, "popen", path)
            except Exception as error:
                Record.failed(path, error, rank)
    for name, resumed in RESUMED.items() if not names else ():
        record = Record(folder / f"resumed, {name}")
        record.result = resumed.train(folder / name)
        record.leave(rank)


def started(folder: Path) -> None:
    for name, rule in FORKED:
        cases(rule)[name].train(4, "fork", folder / f"{name}, {rule}")
    for name, rule in SPAWNED:
        cases(rule)[name].train(2, "spawn", folder / f"{name}, {rule}, spawned")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"launched": launched, "started": started}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
