"""Every snippet of the documentation runs as it stands there, and each section by itself.

What a section takes as given is made when it is first used: a small network ``model``, its ``loss_function``, a batch
``x, y``, a ``loader`` of such batches, a LightningModule ``module`` that trains such a network, and ``torch``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt.steps.rule import PathStatistics, UnitStatistics
from tests.lightning_integration.modules import Classifier, batches, is_clean, loader, mlp

DOCS = Path(__file__).parents[1] / "docs"


def sections() -> list[Any]:
    """The snippets of each section that has some; those that need other libraries are skipped where there are none."""
    found = []
    for page in sorted(DOCS.rglob("*.md")):
        parts = re.split(r"^##? (.+)$", page.read_text(), flags=re.MULTILINE)[1:]
        for heading, text in zip(parts[::2], parts[1::2], strict=True):
            snippets = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
            name = f"{page.relative_to(DOCS)}: {heading}"
            if snippets:
                found.append(pytest.param(name, snippets, id=name))
    return found


class Logs(Classifier):
    """A pipeline that logs what is watched."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def transformers_model() -> nn.Module:
    from tests.integrations.test_transformers import llama

    return llama()


def transformers_data() -> Any:
    from tests.integrations.test_transformers import Counts

    return Counts()


GIVEN: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch,
    "model": mlp,
    "loss_function": lambda: F.cross_entropy,
    "x": lambda: batches(1)[0][0],
    "y": lambda: batches(1)[0][1],
    "loader": loader,
    "val_loader": lambda: loader(1),
    "module": Logs,
}
#: What a section takes as given in its own form.
OWN: dict[str, dict[str, Callable[[], Any]]] = {
    "integrations.md: Hugging Face transformers": {"model": transformers_model, "dataset": transformers_data},
}


class Names(dict[str, Any]):
    """The names of a section, of which those that it takes as given are made when they are first used."""

    def __init__(self, make: dict[str, Callable[[], Any]]) -> None:
        super().__init__(__name__="snippet")
        self._make = make

    def __missing__(self, name: str) -> Any:
        self[name] = self._make[name]()
        return self[name]


@pytest.mark.usefixtures("no_stand_ins")
@pytest.mark.filterwarnings("ignore")  # what libraries have to say of their defaults, and what pages write of
@pytest.mark.parametrize(("name", "snippets"), sections())
def test_the_snippets_run(name: str, snippets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in re.findall(r"^(?:from|import) (\w+)", "\n".join(snippets), flags=re.MULTILINE):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = Names({**GIVEN, **OWN.get(name, {})})
    for snippet in snippets:
        exec(compile(snippet, name, "exec"), names)
        optimizer = names.get("optimizer")
        made_only = name.startswith(("integrations.md", "followers.md")) and "loader" not in names
        if made_only and optimizer is not None:
            train(names["model"], optimizer)  # what is trained elsewhere trains here
    assert all(is_clean(value) for value in names.values() if isinstance(value, nn.Module))


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


def test_all_pages_are_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/]+\.md", (DOCS.parent / "mkdocs.yml").read_text()))
    assert {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} <= listed


def test_the_messages_are_those_of_the_package() -> None:
    """What ``faq.md`` and ``devices.md`` quote, with … for what varies, is found in the strings of the code."""
    parts = [part for tree in sources() for part in ast.walk(tree)]
    joined = [part for part in parts if isinstance(part, ast.JoinedStr)]
    texts = ["".join(one.value if isinstance(one, ast.Constant) else "…" for one in part.values) for part in joined]
    texts += [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    quotes = re.findall(r"^> (.+)$", (DOCS / "faq.md").read_text(), flags=re.MULTILINE)
    quotes += re.findall(r"^\| `(.{40,}?)` \|", (DOCS / "devices.md").read_text(), flags=re.MULTILINE)
    pieces = [piece.strip() for quote in quotes for piece in re.split(r"…|\.\.\. | \.\.\.|DeepSpeedStrategy,", quote)]
    missing = [piece for piece in pieces if not any(piece in text for text in texts)]
    assert len(quotes) > 50
    assert missing == []


def test_the_page_tells_what_each_logged_number_is() -> None:
    """The table of ``watch.md`` has the names that are logged, each for its rule, and no others."""
    page = (DOCS / "watch.md").read_text()
    (table,) = re.findall(r"^## Logged numbers\n\n(?:\|.*\n){2}((?:\|.*\n)+)", page, flags=re.MULTILINE)
    told: dict[str, set[str]] = {"unit": set(), "path": set()}
    for row in table.splitlines():
        names, rule, what, healthy, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert what
        assert healthy
        for known in told.keys() if rule == "all" else [rule]:
            told[known] |= set(re.findall(r"`(\w+)`", names))
    logged = {
        rule: {"violation", *(entry.name for entry in fields(kind))}
        for rule, kind in {"unit": UnitStatistics, "path": PathStatistics}.items()
    }
    assert told == logged


def sources() -> Iterator[ast.Module]:
    for path in (DOCS.parent / "lightning_ecopt").rglob("*.py"):
        yield ast.parse(path.read_text())
