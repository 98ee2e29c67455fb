"""The rooms of the package, and which of them may know of which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_ecopt

PACKAGE = Path(lightning_ecopt.__file__).parent
NAME = "lightning_ecopt"
#: What each room may import, beside itself and what is not of this package.
ROOMS = {
    "common": set(),
    "symmetry": {"common"},
    "kernels": {"common"},
    "steps": {"common", "symmetry", "kernels"},
    "optim": {"common", "symmetry", "kernels", "steps"},
    "metrics": {"common", "symmetry"},
    "_lightning": set(),
    "configure": {"common", "symmetry", "kernels", "steps", "optim", "_lightning"},
    "callback": {"common", "symmetry", "kernels", "steps", "optim", "_lightning", "configure"},
    "__main__": {"symmetry"},
    "__init__": {"common", "symmetry", "optim", "metrics", "configure", "callback"},
}


def modules() -> dict[str, Path]:
    """All modules of the package by their names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [NAME, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, at_once: bool = False) -> Iterator[str]:
    """The full names of what a module imports anywhere, also for type checkers alone; or ``at_once``, when loaded."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """``lightning_ecopt.optim.bases`` is in ``optim``; the package itself in ``__init__``."""
    return "__init__" if name == NAME else name.split(".")[1]


def own(names: Iterator[str]) -> Iterator[str]:
    """Of imported names the modules of this package that they are, or are in."""
    known = modules()
    for name in names:
        if name.split(".")[0] == NAME:
            yield name if name in known else name.rpartition(".")[0]


@pytest.mark.parametrize("name", modules())
def test_a_room_knows_those_below_it_only(name: str) -> None:
    here = room(name)
    foreign = {room(other) for other in own(imports(modules()[name]))} - {here}
    assert foreign <= ROOMS[here], f"{name} imports from {foreign - ROOMS[here]}"


def test_there_is_no_circle() -> None:
    graph = {name: set(own(imports(path))) - {name} for name, path in modules().items()}
    # The package's own names are imported when they are asked for.
    graph[NAME] = set()
    while graph:
        free = {name for name, others in graph.items() if not others & graph.keys()}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


@pytest.mark.parametrize("name", modules())
def test_lightning_is_named_in_one_module(name: str) -> None:
    foreign = {other.split(".")[0] for other in imports(modules()[name])}
    assert name == f"{NAME}._lightning" or not foreign & {"lightning", "pytorch_lightning"}


#: Modules that take long to import, and that training with plain torch may never need.
SLOW = {"lightning", "pytorch_lightning", "torchmetrics", "rich", "matplotlib", "sklearn"}


def test_plain_torch_users_import_neither_lightning_nor_what_prints() -> None:
    names = "ECSGD, ECAdamW, EquivalentClassOptimizer, scaling_group, ScalingGroup"
    code = (
        f"import sys, torch; before = set(sys.modules); from {NAME} import {names}; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {module.split(".")[0] for module in run.stdout.split()} & SLOW


@pytest.mark.full
def test_rooms_are_found_from_the_package_alone() -> None:
    code = f"import {NAME} as p; p.metrics.PathNorm, p.symmetry.trace, p.optim.ECSGD; print(*dir(p))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) >= {*lightning_ecopt.__all__, "metrics", "optim", "symmetry"}
    assert not hasattr(lightning_ecopt, "paths")


@pytest.mark.parametrize("name", modules())
def test_slow_modules_are_imported_in_functions(name: str) -> None:
    slow = ("rich", "scipy", "torch.distributed.fsdp", "torch.distributed.tensor")
    at_once = [f"{other}." for other in imports(modules()[name], at_once=True)]
    assert not [other for other in at_once if other.startswith(tuple(f"{each}." for each in slow))]
