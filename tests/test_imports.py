"""No circles among the modules of the package, and nothing slow is imported before it is needed."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import lightning_ecopt

PACKAGE = Path(lightning_ecopt.__file__).parent
#: Modules that take tens to hundreds of milliseconds to import, and that training may never need.
SLOW = ("rich", "scipy", "torch.distributed.fsdp", "torch.distributed.tensor")


def name_of(file: Path) -> str:
    """The module in a file."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(file): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that these statements import; a name that is no module of the package stands for its module."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else node.module for name in names}
    return found


def reached(start: str, edges: dict[str, set[str]]) -> set[str]:
    """All modules that a module imports, directly or not."""
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += edges[module]
    return seen


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports in functions, and those for type checking only, count like all others."""
    edges = {name: imported(ast.walk(tree)) & TREES.keys() for name, tree in TREES.items()}
    assert [name for name in edges if name in reached(name, edges)] == []


def test_slow_modules_are_imported_in_functions() -> None:
    at_once = {name: imported(tree.body) for name, tree in TREES.items()}
    slow = {
        (name, module)
        for name, modules in at_once.items()
        for module in modules
        if any(f"{module}.".startswith(f"{each}.") for each in SLOW)
    }
    assert slow == set()
