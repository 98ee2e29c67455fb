"""What all tests run under."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from lightning_ecopt.kernels.library import compiler
from lightning_ecopt.symmetry import DeferredGroup, isolation
from lightning_ecopt.symmetry.stand_ins import STAND_INS
from tests import selection

# A failed assertion of a helper shows its values, as that of a test does.
pytest.register_assert_rewrite(
    *(f"tests.{name}" for name in ("benchmarks", "lightning_integration", "metrics", "optim", "paths", "symmetry"))
)


def pytest_configure(config: pytest.Config) -> None:
    selection.choose(config.getoption("markexpr"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a C compiler there is nothing to test of what is compiled."""
    for item in items if compiler() is None else []:
        parameters = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        if "compiled" in parameters or item.get_closest_marker("compiler"):
            item.add_marker(pytest.mark.skip(reason="there is no C compiler"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in a fixed order, as runs are compared bit for bit; and threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_stand_ins() -> Iterator[None]:
    """Forget what a test has taught the trace."""
    before = dict(STAND_INS)
    yield
    STAND_INS.clear()
    STAND_INS.update(before)


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """Let garbage collections look at the objects of this module's tests alone: all others make them take 0.4 s.

    What still waits for calls of modules is another test's, which is frozen with all that refers to it.
    """
    gc.collect()
    for waiting in [reference() for reference in isolation._waiting.values()]:
        if isinstance(waiting, DeferredGroup):
            waiting.cancel()
    gc.freeze()
    yield
    gc.unfreeze()
