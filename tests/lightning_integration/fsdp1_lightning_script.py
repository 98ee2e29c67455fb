"""What test_fsdp1_lightning runs in two processes that share parameters under FSDPStrategy, in a file for each."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, strategies
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, MixedPrecision, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.fsdp.wrap import enable_wrap, wrap

from lightning_ecopt import ec_sgd
from tests.lightning_integration.fsdp1_script import weights
from tests.lightning_integration.fsdp_training_script import (
    EPOCHS,
    EXAMPLE,
    Share,
    adamw,
    net,
    own_optimizer,
    scheduled,
)
from tests.lightning_integration.modules import Classifier, quiet
from tests.lightning_integration.modules import trainer as training


class Double(FSDPPrecision):
    """64 bits, which Lightning's own leaves out."""

    def __init__(self) -> None:
        super().__init__("32-true")
        self._desired_input_dtype = torch.float64


class OnCPU(FSDPStrategy):
    """Lightning refuses its own class where there is no GPU, and tells FSDP the number of one."""

    def _options(self) -> dict[str, Any]:
        own = {"sharding_strategy": self.sharding_strategy, "mixed_precision": self.mixed_precision}
        return {**own, "device_id": torch.device("cpu"), **self.kwargs}

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            return model
        return FullyShardedDataParallel(model, **self._options())

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._options()):
            yield


def stay_on_the_cpu() -> None:
    """Let Lightning's whole checkpoints be made where there is no GPU."""
    strategies.fsdp._get_full_state_dict_context = whole_states


def whole_states(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    """As Lightning's, but that it offloads nothing to the CPU: FSDP frees what it has "moved" there from the CPU."""
    of_weights = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
    of_state = FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only)
    kind = StateDictType.FULL_STATE_DICT
    return FullyShardedDataParallel.state_dict_type(module, kind, of_weights, of_state)


class Module(Classifier):
    """Is wrapped by hand if ``by_hand`` is set, and else by the strategy."""

    by_hand = False

    def configure_model(self) -> None:
        if self.by_hand and self.trainer.world_size > 1 and not isinstance(self.net, FullyShardedDataParallel):
            self.net[0] = wrap(self.net[0])
            self.net = wrap(self.net)

    def train_dataloader(self) -> Share:
        return Share(self.trainer.global_rank, self.trainer.world_size)


def fit(
    *callbacks: Callback,
    configure: Callable[[Any], Any] = scheduled,
    example: Tensor | None = EXAMPLE,
    seed: int = 0,
    processes: int = 1,
    strategy: dict[str, Any] | None = None,
    full: bool = True,
    by_hand: bool = False,
    ckpt: Path | None = None,
    **options: Any,
) -> tuple[Module, Trainer]:
    module = Module(net(seed), configure, example)
    module.by_hand = by_hand
    if processes > 1:
        own = OnCPU(state_dict_type="full" if full else "sharded", precision_plugin=Double(), **(strategy or {}))
        options |= {"devices": processes, "strategy": own}
    options = {"max_epochs": EPOCHS, "use_distributed_sampler": False, **options}
    run = training(*callbacks, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options)
    run.fit(module, ckpt_path=None if ckpt is None else str(ckpt))
    return module, run


CLIPPED = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}
FITS: dict[str, dict[str, Any]] = {
    "SGD": {"configure": scheduled, **CLIPPED},
    "AdamW": {"configure": adamw, "accumulate_grad_batches": 2, "strategy": {"auto_wrap_policy": {nn.Linear}}},
    "ec_sgd": {"configure": own_optimizer, "strategy": {"sharding_strategy": "SHARD_GRAD_OP"}},
    "replicas": {"configure": scheduled, "strategy": {"sharding_strategy": "NO_SHARD"}},
    "by hand": {"configure": scheduled, "by_hand": True},
    "16 bits": {"configure": scheduled, "strategy": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)}},
    "no example": {"configure": scheduled, "example": None, **CLIPPED},
    "no example, AdamW": {
        "configure": adamw,
        "example": None,
        "strategy": {"auto_wrap_policy": {nn.Linear}, "sharding_strategy": "SHARD_GRAD_OP"},
    },
}
#: With checkpoints in one file and in a folder.
SAVED = [(name, full) for name in ("SGD", "AdamW", "16 bits", "no example", "by hand") for full in (True, False)]


def ended(module: Module, run: Trainer, callback: Any) -> dict[str, Any]:
    of = run.strategy.model if run.world_size > 1 else module
    return {
        "weights": weights(of),
        "rows": callback.state_dict()["rules"][0] if run.world_size > 1 else run.optimizers[0].rule_state(),
        "units": callback.group.num_units,
        "names": list(callback.group.parameters),
        "steps": run.global_step,
    }


def fitted(name: str, processes: int = 1, **options: Any) -> dict[str, Any]:
    """Train with the callback, in one process or in several."""
    callback = quiet(refresh_interval=3 if name == "AdamW" else "epoch")
    saving = [options.pop("saving")] if "saving" in options else []
    return ended(*fit(callback, *saving, processes=processes, **FITS[name], **options), callback)


def saved(name: str, full: bool, folder: Path) -> dict[str, Any]:
    """A whole run of two processes, and one from the end of its first epoch, which starts with other weights."""
    options = {"processes": 2, "full": full}
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    expected = fitted(name, saving=saving, **options)
    return {"expected": expected, "resumed": fitted(name, seed=9, ckpt=folder / "epoch=0.ckpt", **options)}


def flat_parameters(module: Any) -> Any:
    return torch.optim.SGD(module.trainer.model.parameters(), lr=0.1)


REFUSED: dict[str, Callable[[], Any]] = {
    "path": lambda: fit(quiet(rule="path"), processes=2),
    "path, ec_sgd": lambda: fit(configure=lambda m: ec_sgd(m, lr=0.1, rule="path"), processes=2),
    "flat": lambda: fit(quiet(), configure=flat_parameters, processes=2, strategy={"use_orig_params": False}),
}


def refused(name: str) -> str:
    """What is said of a configuration that is not supported."""
    try:
        REFUSED[name]()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.init_process_group(
        "gloo", timeout=timedelta(seconds=60), init_method=f"file://{folder}/{size}", rank=rank, world_size=size
    )
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    stay_on_the_cpu()
    found = {
        "fitted": {name: fitted(name, size) for name in FITS if name in names},
        "saved": {run: saved(*run, folder / " ".join(map(str, run))) for run in SAVED if run[0] in names},
        "refused": {name: refused(name) for name in REFUSED if name in names},
    }
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    arguments = (2, Path(sys.argv[1]), sys.argv[2:] or [*FITS, *REFUSED])
    multiprocessing.start_processes(main, args=arguments, nprocs=2, start_method="fork")
