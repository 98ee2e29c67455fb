"""What test_tp runs in processes that share a decoder by tensor parallelism, alone or together with FSDP2."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, multiprocessing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F
from torch.optim import SGD

from lightning_ecopt import EquivalentClassOptimizer, ec_adamw, ec_sgd, scaling_group
from lightning_ecopt.common.sharding import local
from tests.lightning_integration.decoders import HEADS, LENGTH, WORDS, Decoder, split_
from tests.lightning_integration.fsdp_script import whole
from tests.lightning_integration.modules import quiet, trainer

STEPS = 4
MESHES = {"tensors": (1, 2), "both": (2, 2)}  # data parallel, tensor parallel
DIMENSIONS = ("data_parallel", "tensor_parallel")


def sentences(step: int, place: int = 0, count: int = 1) -> tuple[Tensor, Tensor]:
    """A share of a batch of four: words, and those that follow them."""
    drawn = torch.randint(0, WORDS, (4, LENGTH + 1), generator=torch.Generator().manual_seed(step))[place::count]
    return drawn[:, :-1], drawn[:, 1:]


def decoder(rotary: bool, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(rotary).double()


# The optimizer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A decoder that is trained in a plain loop.

    Args:
        make: its optimizer.
        rotary: which decoder.
        how: it is split, see ``decoders.plan``.
        clip: the norm of gradients.
        plain: number of steps of the base before the first of ours.
    """

    make: Callable[[Decoder], Any]
    rotary: bool = True
    how: dict[str, bool] = field(default_factory=dict)
    clip: float | None = None
    plain: int = 0


def base_sgd(net: Decoder) -> SGD:
    return SGD(net.parameters(), lr=0.03, momentum=0.9)


CASES = {
    "EC-SGD": Case(lambda net: ec_sgd(net, lr=0.03, momentum=0.9, refresh_interval=2), clip=0.3),
    "EC-AdamW": Case(lambda net: ec_adamw(net, lr=0.01, refresh_interval=2), rotary=False, clip=0.3),
    "without a module": Case(lambda net: EquivalentClassOptimizer(base_sgd(net), refresh_interval=2), rotary=False),
    "after plain steps": Case(lambda net: EquivalentClassOptimizer(base_sgd(net), refresh_interval=2), plain=2),
    "wrapped": Case(lambda net: ec_adamw(net, lr=0.01, refresh_interval=2, implementation="wrapped")),
    "plain norms": Case(lambda net: ec_adamw(net, lr=0.01, refresh_interval=2), how={"sequence": False}),
    "loss in parallel": Case(
        lambda net: ec_sgd(net, lr=0.03, momentum=0.9, refresh_interval=2), False, {"by_width": True, "losses": True}
    ),
}


#: Of these with four processes.
IN_FOUR = ("EC-SGD", "plain norms")


def take_steps(net: Decoder, optimizer: Any, case: Case, mesh: DeviceMesh | None) -> list[dict[str, int]]:
    """Train, and count what processes exchange in each step of the optimizer."""
    place, found = (0, 1), []
    if mesh is not None:
        place = mesh["data_parallel"].get_local_rank(), mesh["data_parallel"].size()
    for step in range(STEPS):
        words, following = sentences(step, *place)
        optimizer.zero_grad()
        with loss_parallel():
            F.cross_entropy(net(words).flatten(0, 1), following.flatten()).backward()
        if case.clip is not None:
            optimizer.start()
            torch.nn.utils.clip_grad_norm_(net.parameters(), case.clip)
        with CommDebugMode() as counter:
            (optimizer.optimizer if step < case.plain else optimizer).step()
        found.append({str(op): n for op, n in counter.get_comm_counts().items()})
    return found


def trained(name: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Train a case, in one process or in several."""
    case = CASES[name]
    net = decoder(case.rotary)
    if mesh is not None:
        split_(net, mesh, **case.how)
    optimizer = case.make(net)
    found = {"collectives": take_steps(net, optimizer, case, mesh), "units": optimizer.group.num_units}
    return found | {
        "weights": whole(dict(net.named_parameters())),
        "held": sum(local(p).numel() for p in net.parameters()),
    }


def counted_heads(how: str, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Train a decoder that is told how many heads a rank has.

    Args:
        how: ``"before"`` takes a group that was traced before the decoder was split, ``"after"`` finds it by calls, and
            ``"plain"`` takes none.
        mesh: the mesh, if there is one.
    """
    net = decoder(rotary=False)
    for block in net.blocks:
        block.attention.heads = HEADS
    group = scaling_group(net, sentences(0)[0])
    if mesh is not None:
        split_(net, mesh)
        for block in net.blocks:
            block.attention.heads //= mesh["tensor_parallel"].size()
    optimizer: Any = base_sgd(net)
    if how != "plain":
        optimizer = EquivalentClassOptimizer(optimizer, group.of(net) if how == "before" else None, refresh_interval=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        take_steps(net, optimizer, Case(base_sgd), mesh)
    said = [str(warning.message) for warning in caught]
    return {"weights": whole(dict(net.named_parameters())), "said": [text for text in said if "held fixed" in text]}


def without_sequence_clipped(mesh: DeviceMesh) -> list[str]:
    """What plain training says where norms of gradients of both kinds are added up, and what ours says."""
    found = []
    for make in (base_sgd, CASES["EC-SGD"].make):
        net = decoder(rotary=True)
        split_(net, mesh, sequence=False)
        optimizer = make(net)
        words, following = sentences(0)
        F.cross_entropy(net(words).flatten(0, 1), following.flatten()).backward()
        try:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        except RuntimeError as error:
            found.append(str(error))
        optimizer.step()
    return found


# Lightning ------------------------------------------------------------------------------------------------------------

EPOCHS = 4


class Sentences:
    """Three batches, of which a rank has its share."""

    def __init__(self, epoch: int, place: int, count: int) -> None:
        self.epoch, self.share = epoch, (place, count)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (sentences(3 * self.epoch + number, *self.share) for number in range(len(self)))


class Module(LightningModule):
    """A decoder that is split where there are several processes."""

    def __init__(self, run: Run, seed: int) -> None:
        super().__init__()
        self.net, self.run = decoder(run.rotary, seed), run
        self.example_input_array = torch.zeros(1, LENGTH, dtype=torch.long) if run.example else None

    def configure_model(self) -> None:
        if self.device_mesh is not None and not any(isinstance(p, DTensor) for p in self.parameters()):
            split_(self.net, self.device_mesh)

    def forward(self, words: Tensor) -> Tensor:
        return self.net(words)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        return self.run.configure(self)

    def train_dataloader(self) -> Sentences:
        mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
        share = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        return Sentences(self.trainer.current_epoch, *share)


@dataclass(frozen=True)
class Run:
    """A fit.

    Args:
        configure: what ``configure_optimizers`` returns.
        rotary: which decoder.
        callback: whether the Trainer has it.
        example: whether the module has an ``example_input_array``.
    """

    configure: Callable[[Module], Any]
    rotary: bool = True
    callback: bool = True
    example: bool = False


RUNS = {
    "SGD": Run(lambda m: SGD(m.parameters(), lr=0.03, momentum=0.9)),
    "ec_adamw, example": Run(lambda m: ec_adamw(m, lr=0.01), rotary=False, callback=False, example=True),
}


def fit(
    name: str,
    mesh: tuple[int, int] | None,
    epochs: int,
    ckpt: Path | None = None,
    save: Path | None = None,
    whole_file: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Train up to so many epochs.

    Args:
        name: of the run.
        mesh: data and tensor parallel processes; ``None`` for one process alone.
        epochs: when training ends.
        ckpt: where it begins.
        save: the folder of checkpoints ``epoch=N.ckpt``.
        whole_file: whether these are one file each.
        seed: of the first weights.
    """
    run = RUNS[name]
    callbacks: list[Any] = [quiet()] if run.callback else []
    if save is not None:
        callbacks.append(ModelCheckpoint(save, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True))
    options: dict[str, Any] = {}
    if mesh is not None:
        strategy = ModelParallelStrategy(*mesh, save_distributed_checkpoint=not whole_file)
        options = {"devices": mesh[0] * mesh[1], "strategy": strategy}
    options |= {"max_epochs": epochs, "use_distributed_sampler": False, "gradient_clip_val": 0.3}
    fitting: Trainer = trainer(
        *callbacks, enable_checkpointing=save is not None, reload_dataloaders_every_n_epochs=1, **options
    )
    module = Module(run, seed)
    fitting.fit(module, ckpt_path=None if ckpt is None else str(ckpt))
    optimizer = fitting.optimizers[0]
    rule = callbacks[0].state_dict().get("rules", [None])[0] if run.callback else optimizer.rule_state()
    return {
        "weights": whole(dict(module.named_parameters())),
        "rows": rule,
        "units": (callbacks[0] if run.callback else optimizer).group.num_units,
    }


def in_two(name: str, folder: Path) -> dict[str, Any]:
    """Two epochs with tensor parallelism, and the second once more, from checkpoints; two on two meshes."""
    alone = (1, 2)
    found: dict[str, Any] = {"expected": fit(name, alone, 2, save=folder / "distributed")}
    found["resumed"] = fit(name, alone, 2, folder / "distributed" / "epoch=0.ckpt", seed=9)
    fit(name, alone, 1, save=folder / "file", whole_file=True)
    found["from a file"] = fit(name, alone, 2, folder / "file" / "epoch=0.ckpt", whole_file=True, seed=9)
    fit(name, (2, 1), 1, save=folder / "moving")
    fit(name, alone, 2, folder / "moving" / "epoch=0.ckpt", folder / "moving", seed=9)
    return found


def in_four(name: str, folder: Path) -> dict[str, Any]:
    """The third epoch on a third mesh; it leaves one file for the fourth, which one process trains."""
    return fit(name, (2, 2), 3, folder / "moving" / "epoch=1.ckpt", folder / "moving", whole_file=True, seed=9)


def run_part(part: str, size: int, folder: Path) -> dict[str, Any]:
    """The results of ``"few"`` or ``"loops"``, or of a run of a Trainer."""
    if part in RUNS:
        return (in_two if size == 2 else in_four)(part, folder)
    shape = next(shape for shape in MESHES.values() if shape[0] * shape[1] == size)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
    if part == "few":
        return {"EC-SGD": trained("EC-SGD", mesh)}
    found: dict[str, Any] = {name: trained(name, mesh) for name in (CASES if size == 2 else IN_FOUR)}
    if size == 2:
        found["heads"] = {how: counted_heads(how, mesh) for how in ("before", "after", "plain")}
        found["clipped"] = without_sequence_clipped(mesh)
    return found


def main(rank: int, size: int, folder: Path, part: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=120), init_method=f"file://{folder}/{size}", rank=rank, world_size=size
    )
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(size)}
    torch.save(run_part(part, size, folder), folder / f"{size}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    where, what = sys.argv[1:]
    for processes in (2,) if what == "few" else (2, 4):
        multiprocessing.start_processes(
            main, args=(processes, Path(where), what), nprocs=processes, start_method="fork"
        )
