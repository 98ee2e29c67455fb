"""What is published has all that is needed, and works from where it is installed.

The source distribution and, from it, the wheel are built once. The wheel is installed into a fresh environment, which
sees the libraries of this one and nothing of this folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from lightning_ecopt import __version__
from lightning_ecopt.kernels.library import compiler

for needed in ("build", "hatchling", "hatch_fancy_pypi_readme", "mypy", "twine"):
    pytest.importorskip(needed)

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that knows nothing of this folder; it is shown if the command fails."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both distributions."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel; all else is found behind it."""
    folder = tmp_path_factory.mktemp("installed") / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder.parent)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    behind = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "behind.pth").write_text("\n".join(behind))
    return python


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def files_of_the_package() -> set[str]:
    paths = (path.relative_to(ROOT) for path in (ROOT / "lightning_ecopt").rglob("*") if path.is_file())
    return {str(path) for path in paths if "__pycache__" not in path.parts}


# What is in them ------------------------------------------------------------------------------------------------------


def test_the_wheel_has_all_files_of_the_package_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = {name for name in names if ".dist-info/" not in name}
    assert found == files_of_the_package()
    others = ("py.typed", "kernels/passes.c", "kernels/vectors.c", "kernels/looks.c")
    assert {f"lightning_ecopt/{name}" for name in others} <= found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_has_what_its_tests_read_and_little_else(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    pages = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE", "mkdocs.yml")
    assert tests | files_of_the_package() | {*pages, "docs/index.md", "examples/digits.py"} <= names
    assert not [name for name in names if ".runs/" in name or "__pycache__" in name or name.startswith(".git/")]
    assert path.stat().st_size < 3e6


def test_both_are_what_pypi_takes(dist: Path) -> None:
    assert run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist).count("PASSED") == 2


def test_the_metadata_say_what_it_is(metadata: Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())


def test_links_of_the_page_on_pypi_lead_to_files_of_the_version(metadata: Message) -> None:
    page, source = str(metadata.get_payload()), (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) == len(re.findall(r"\]\(", source)) > 30
    assert [link for link in links if not link.startswith("https://")] == []
    own = [
        re.fullmatch(rf"https://.*/lightning-ecopt/(?:blob/)?v{re.escape(__version__)}/(.+)", link) for link in links
    ]
    files = [found[1].partition("#")[0] for found in own if found]
    assert "examples/benchmarks/RESULTS.png" in files
    assert "LICENSE" in files
    assert [name for name in files if not (ROOT / name).is_file()] == []
    raw = [link for link in links if link.startswith("https://raw.githubusercontent.com")]
    assert {Path(link).suffix for link in raw} == {".png"}  # a picture needs the file, a link its page


# From where it is installed -------------------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""

PROGRAM = """
import sys
from pathlib import Path

import lightning_ecopt
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from models import network
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

assert Path(lightning_ecopt.__file__).is_relative_to(sys.prefix), lightning_ecopt.__file__


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(2, (64,))), batch_size=16)


LightningCLI(Net)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text(MODEL)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def test_the_console_script_describes_a_model_of_the_current_directory(python: Path, folder: Path) -> None:
    said = run(python.with_name("ecopt"), "models:network", "--input", "1,4", "--unit", "3", cwd=folder)
    assert said == "Unit 3: c multiplies 0.weight[3], 0.bias[3]; 1/c multiplies 2.weight[:, 3]\n"


CALLBACK = """
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.03, momentum: 0.9}}
trainer: {callbacks: [{class_path: lightning_ecopt.EquivalentClassOptimization, init_args: {refresh_interval: 3}}]}
"""
NAMED = "optimizer: {class_path: lightning_ecopt.ECAdamW, init_args: {lr: 0.003}}\n"


@pytest.mark.parametrize(
    ("configuration", "said"),
    [(CALLBACK, "8 freedoms in 2 layers, all used; lr = 0.03 is "), (NAMED, "")],
    ids=["callback", "optimizer"],
)
def test_a_command_line_program_trains_and_compiles_the_steps(
    configuration: str, said: str, python: Path, folder: Path
) -> None:
    (folder / "run.yaml").write_text(configuration)
    options = ("--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.logger=false")
    command = (python, "program.py", "fit", "--config=run.yaml", *options)
    assert said in run(*command, cwd=folder, XDG_CACHE_HOME=str(folder / "cache"))
    made = list((folder / "cache" / "lightning_ecopt").glob("passes-*.so"))
    assert len(made) == (compiler() is not None)


SNIPPET = """
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_ecopt import (
    ECSGD,
    EquivalentClassOptimization,
    EquivalentClassOptimizer,
    PathNorm,
    ScalingGroup,
    UnitImbalance,
    check_invariance,
    ec_adamw,
    ec_sgd,
    scaling_group,
)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ec_adamw(self, lr=3e-3, weight_decay=0.1)


callback = EquivalentClassOptimization(rule="path", refresh_interval=500, verbose="table")
Trainer(callbacks=[callback])
found: ScalingGroup | None = callback.group

model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4)
group: ScalingGroup = scaling_group(model, x)
sizes: tuple[int, int, int] = (group.num_units, group.num_parameters, group.dimension)
group.act_(torch.randn(group.num_units)).balance_()
optimizer: EquivalentClassOptimizer = ec_sgd(model, lr=0.03, momentum=0.9)
ECSGD(model.parameters(), lr=0.03)
EquivalentClassOptimizer(torch.optim.RMSprop(model.parameters()), group, max_path_ratio=None)
if not check_invariance(group, lambda: model(x).square().sum()):
    raise SystemExit("the group is not right for the loss")
statistics = optimizer.statistics()
if statistics is not None:
    dormant: int = statistics.dormant_units
PathNorm(p=1, log=True).update(model, x)
UnitImbalance().update(group)

# Mistakes, each of which is told; that none of these comments is idle shows it.
EquivalentClassOptimization(rule="units")  # type: ignore[arg-type]
EquivalentClassOptimization(verbose="tabel")  # type: ignore[arg-type]
ec_sgd(model, momentun=0.9)  # type: ignore[call-arg]
ec_adamw(model, lr="high")  # type: ignore[arg-type]
"""


def test_a_program_of_a_user_is_type_checked_by_the_types_of_the_wheel(python: Path, folder: Path) -> None:
    (folder / "snippet.py").write_text(SNIPPET)
    # With the options of this project, and so with what its own check has kept of torch.
    options = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    options += ("--python-executable", python)
    run(sys.executable, "-m", "mypy", *options, "snippet.py", cwd=folder)
