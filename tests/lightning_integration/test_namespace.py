"""Lightning goes by two names, and pipelines of either train with the callback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.selection import full

pytestmark = full

pytest.importorskip("pytorch_lightning")

FIT = """
import torch
from torch import nn
import pytorch_lightning as pl
from sklearn.datasets import load_digits
import lightning_ecopt
from lightning_ecopt import EquivalentClassOptimization, EquivalentClassOptimizer, ec_sgd

torch.set_num_threads(1)
assert issubclass(EquivalentClassOptimization, pl.Callback)
data = load_digits()
images, labels = torch.tensor(data.data / 16, dtype=torch.float32)[:64], torch.tensor(data.target)[:64]

class Classifier(pl.LightningModule):
    def __init__(self, ours=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        self.ours = ours

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return ec_sgd(self, lr=0.1) if self.ours else torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 16)

def fit(module, callbacks):
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, max_epochs=1,
                         enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks)
    trainer.fit(module)
    assert isinstance(trainer.optimizers[0], EquivalentClassOptimizer)
    return trainer.optimizers[0]

callback = EquivalentClassOptimization(verbose=False)
one, two = Classifier(), Classifier(ours=True)
fit(one, [callback])
assert callback.group.num_units == 8
# Without a LightningModule of its own name, ec_sgd would watch forward, which this pipeline never calls.
assert fit(two, []).group.num_units == 8
for a, b in zip(one.parameters(), two.parameters()):
    assert torch.equal(a, b)
"""

# As if it had never been installed: no finder finds it, and nothing else is in its place.
NOT_INSTALLED = """
import sys

class WithoutLightning:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "lightning" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [WithoutLightning(finder) for finder in sys.meta_path]
"""

REFUSED = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""

BLOCKED = "import sys\nsys.modules['lightning'] = None\n"


def _python(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hidden", [NOT_INSTALLED, BLOCKED], ids=["not installed", "blocked"])
def test_pytorch_lightning_alone_is_enough(hidden: str) -> None:
    _python(hidden + FIT + "import sys\nassert sys.modules.get('lightning') is None\n")


def test_a_lightning_that_refuses_to_be_found_does_not_stand_in_the_way() -> None:
    _python(
        REFUSED + "import lightning_ecopt, pytorch_lightning\n"
        "assert issubclass(lightning_ecopt.EquivalentClassOptimization, pytorch_lightning.Callback)\n"
    )


def test_pytorch_lightning_is_used_where_it_is_imported_first() -> None:
    _python(FIT + "import sys\nassert 'lightning.pytorch' not in sys.modules\n")


def test_lightning_is_used_by_default() -> None:
    _python(
        "import lightning_ecopt, sys\nassert 'pytorch_lightning' not in sys.modules\nimport lightning.pytorch as L\n"
        "assert issubclass(lightning_ecopt.EquivalentClassOptimization, L.Callback)\n"
    )
