"""Many steps, fits and threads in one process, and what they leave behind: ``python -m tests.soak``.

What is compared, before and after each part: everything that a trace switches, hooks, threads, the handler of Ctrl-C,
those who wait for calls, and, after a garbage collection, the number of live objects and the resident memory.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.optim import SGD, AdamW
from torch.optim import optimizer as optimizer_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_ecopt import ECSGD, ECAdamW, EquivalentClassOptimizer, ec_adamw, ec_sgd, scaling_group
from lightning_ecopt.symmetry import isolation
from tests.lightning_integration.modules import Classifier, fit, mlp, quiet, sgd

WAYS: list[Callable[[nn.Module, Tensor, str], torch.optim.Optimizer]] = [
    lambda net, x, rule: ECSGD(net.parameters(), lr=0.02, momentum=0.9, rule=rule, refresh_interval=50),
    lambda net, x, rule: ECAdamW(net.parameters(), lr=1e-3, rule=rule, refresh_interval=50),
    lambda net, x, rule: ec_sgd(net, lr=0.02, rule=rule, refresh_interval=50),
    lambda net, x, rule: EquivalentClassOptimizer(AdamW(net.parameters(), lr=1e-3), scaling_group(net, x), rule=rule),
]
MODULES: list[Callable[[Any], Any]] = [
    sgd,
    lambda m: ec_sgd(m, lr=0.05),
    lambda m: ec_adamw(m, lr=1e-3, rule="path"),
    lambda m: ECSGD(m.parameters(), lr=0.05),
    lambda m: SGD([{"params": m.net[0].parameters()}, {"params": m.net[2:].parameters()}], lr=0.05),
]


def state() -> dict[str, Any]:
    """What must be the same before and after."""
    of_modules = [hooks for name, hooks in vars(module_hooks).items() if name.startswith("_global_")]
    of_steps = [optimizer_hooks._global_optimizer_pre_hooks, optimizer_hooks._global_optimizer_post_hooks]
    return {
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "function modes": len(_get_current_function_mode_stack()),
        "Module.__call__": nn.Module.__call__.__qualname__,
        "Thread.start": threading.Thread.start.__qualname__,
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "cuDNN": torch.backends.cudnn.enabled,
        "module hooks": [len(hooks) for hooks in of_modules if isinstance(hooks, dict)],
        "optimizer hooks": [len(hooks) for hooks in of_steps],
        "waiting": len(isolation._waiting),
        "threads": threading.active_count(),
        "Ctrl-C": signal.getsignal(signal.SIGINT),
    }


def resident() -> float:
    """Resident memory in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def steps(count: int) -> None:
    """Steps of eight optimizers; some parameters freeze and thaw on the way."""
    x, y = torch.randn(32, 64), torch.arange(32) % 10
    for way in WAYS:
        for rule in ("unit", "path"):
            net = mlp()
            optimizer = way(net, x, rule)
            for part in range(4):
                net[2].requires_grad_(part != 1)
                train(net, optimizer, x, y, count // (8 * len(WAYS)))
            assert all(p.isfinite().all() for p in net.parameters())


def fits(count: int) -> None:
    """Fits in every way in, some of which end by an error, and some before the first step."""

    class Stops(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == random.choice([0, 2]):
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    for number in range(count):
        kind = Stops if number % 7 == 3 else Classifier
        module = kind(mlp(), MODULES[number % len(MODULES)], torch.zeros(1, 64) if number % 2 else None)
        try:
            fit(module, *([quiet(log=False)] if number % 3 else []), max_epochs=1, limit_train_batches=number % 4)
        except RuntimeError as error:
            if str(error) != "stop":
                raise


def threads(count: int) -> None:
    """Threads that trace and train at once."""
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            x, y = torch.randn(8, 64), torch.arange(8) % 10
            net = mlp(number)
            train(net, WAYS[number % len(WAYS)](net, x, "unit"), x, y, 20)
            assert scaling_group(net, x).num_units == 32
        except BaseException as error:
            failed.append(error)

    all_of_them = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()
    assert not failed, failed


def soak(part: Callable[[int], None], count: int) -> str:
    """Run a tenth of a part, then all of it; returns a line of a table.

    Raises:
        AssertionError: if something is left behind, or objects grow with the number of steps or fits.
    """
    part(max(count // 10, 8))  # imports and caches
    gc.collect()
    before, objects, memory, began = state(), len(gc.get_objects()), resident(), time.perf_counter()
    part(count)
    gc.collect()
    assert state() == before, (state(), before)
    grown, more = len(gc.get_objects()) - objects, resident() - memory
    assert grown < 20 * count**0.5 + 500, grown
    seconds = time.perf_counter() - began
    return f"| {part.__name__} | {count:,} | {seconds:.0f} s | {grown:+,} objects | {more:+.1f} MiB |"


def main(scale: float = 1.0) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| part | count | time | objects that stay | resident memory |\n|---|---|---|---|---|")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part, count in ((steps, 20_000), (fits, 300), (threads, 64)):
            print(soak(part, max(1, round(scale * count))), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of 20,000 steps, 300 fits and 64 threads")
    main(parser.parse_args().scale)
