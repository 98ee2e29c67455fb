"""Every snippet of docs/integrations.md and docs/followers.md runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.lightning_integration.modules import EXAMPLE, Classifier, batches, is_clean, loader, mlp

PAGES = [Path(__file__).parents[2] / "docs" / f"{name}.md" for name in ("integrations", "followers")]


def sections() -> dict[str, tuple[list[str], list[str]]]:
    """By heading: the modules that a section imports, and its snippets."""
    text = "\n".join(page.read_text() for page in PAGES)
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        found[heading] = (re.findall(r"^(?:from|import) (\w+)", "\n".join(snippets), flags=re.MULTILINE), snippets)
    return found


def made() -> dict[str, Callable[[], Any]]:
    """What the page takes as given."""
    return {"model": mlp, "loader": loader, "x": lambda: EXAMPLE, "loss_function": lambda: F.cross_entropy}


def of_transformers() -> dict[str, Callable[[], Any]]:
    from tests.integrations.test_transformers import Counts, llama

    return {"model": llama, "dataset": Counts}


class Logs(Classifier):
    """A pipeline that logs what is watched."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


#: What a section takes as given in its own form.
OWN: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "Hugging Face transformers": of_transformers,
    "finetuning-scheduler": lambda: {"module": Logs, "val_loader": lambda: loader(1)},
}


class Names(dict[str, Any]):
    """The names of a snippet, of which those that it takes as given are made when they are first used."""

    def __init__(self, make: dict[str, Callable[[], Any]]) -> None:
        super().__init__(torch=torch)
        self._make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self._make[name]()
        return self[name]


@pytest.mark.filterwarnings("ignore")  # what the libraries have to say of their defaults
@pytest.mark.parametrize("heading", list(sections()))
def test_the_snippets_run(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, snippets = sections()[heading]
    for module in modules:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        names = Names(made() | OWN.get(heading, dict)())
        exec(compile(snippet, heading, "exec"), names)
        optimizer = names.get("optimizer")
        if optimizer is not None and "loader" not in names:  # what is trained elsewhere trains here
            train(names["model"], optimizer)
        assert is_clean(names["model"] if "model" in names else names["module"])


def train(model: nn.Module, optimizer: Any) -> None:
    """A few steps, for optimizers that take a closure and for those that do not."""
    losses = []
    for x, y in batches() * 3:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(float(closure().detach()))
        optimizer.step(closure)
    assert sum(losses[-4:]) < sum(losses[:4])
