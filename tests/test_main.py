"""``python -m lightning_ecopt``: the table for any model that can be imported, and one line for any mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_ecopt.__main__ import main
from tests.selection import full

MODELS = '''
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, width=4, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.head = nn.Linear(width * 4, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(1))

    @classmethod
    def small(cls):
        return cls(1)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(7, 3), nn.Parameter(torch.zeros(9, 3))
        self.up, self.down, self.head = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, tokens, mask=None):
        assert not tokens.is_floating_point() and (mask is None or mask.dtype == torch.bool)
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        x = self.down(self.up(x).relu())
        return self.head(x if mask is None else x.masked_fill(mask[..., None], 0))


class Depends(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))

    def forward(self, x):
        return self.net(x if x.sum() > 0 else -x)


class Needs(Depends):
    """Its construction needs values."""

    def __init__(self):
        super().__init__()
        self.largest = self.net[0].weight.max().item()


class Device(nn.Module):
    """Says where it is built, and in which mode it is called."""

    def forward(self):
        raise ValueError(f"training: {self.training}, on {torch.empty(0).device}\\nand more")


class Huge(nn.Module):
    """400 gigabytes of weights."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(10**6, 10**5, bias=False), nn.Linear(10**5, 3, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


net = Net(3)
seven = 7
namespace = Net


def pair():
    return net, net
'''


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a module with models, which can be imported."""
    (tmp_path / "models_of_the_tests.py").write_text(MODELS)
    (tmp_path / "broken_model_of_the_tests.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delitem(sys.modules, "models_of_the_tests", raising=False)
    return tmp_path


#: What an installed console script runs.
SCRIPT = "from lightning_ecopt.__main__ import main; main()"


def output(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> str:
    main([f"models_of_the_tests:{model}", *arguments])
    return " ".join(capsys.readouterr().out.split())


def failure(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> str:
    """The one line that is said of a mistake."""
    with pytest.raises(SystemExit) as caught:
        main([model if ":" in model else f"models_of_the_tests:{model}", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    start = "ecopt: error: "
    assert line.startswith(start)
    return line.removeprefix(start)


# What is printed ------------------------------------------------------------------------------------------------------


def test_the_table_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    said = output(capsys, "Net", "--input", "1,1,4,4")
    assert "│ 4 │ 0:4 │ conv.weight │ head.weight │" in said
    assert "m = 74 parameters, H = 4 freedoms, m - H = 70 path coordinates" in said


@pytest.mark.parametrize(
    ("model", "units"), [("Net.small", 1), ("net", 3), ("namespace.small", 1)], ids=["method", "module", "path"]
)
def test_factories_modules_and_dotted_paths(model: str, units: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"H = {units} freedoms" in output(capsys, model, "--input", "1,1,4,4")


def test_arguments_of_the_factory(capsys: pytest.CaptureFixture[str]) -> None:
    said = output(capsys, "Net", "--input", "2,1,4,4", "--args", '{"width": 6, "norm": true}')
    assert "H = 6 freedoms" in said
    assert "│ norm │ native_batch_norm │ 6 │" in said


def test_a_unit_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "Net", "--input", "1,1,4,4", "--unit", "2") == (
        "Unit 2: c multiplies conv.weight[2], conv.bias[2]; 1/c multiplies head.weight[:, 8:12]"
    )


@pytest.mark.parametrize(
    "inputs", [["1,4:int64"], ["tokens=1,4:int64"], ["1,4:int64", "mask=1,4:bool"], ["1,4:int64", "1,4:bool"]]
)
def test_inputs_by_place_and_by_name_with_types(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "H = 11 freedoms" in output(capsys, "Tokens", *(word for text in inputs for word in ("--input", text)))


@full
def test_weights_take_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    said = output(capsys, "Huge", "--input", "1,1000000")
    assert "│ 100000 │ 0:100000 │ up.weight │ down.weight │" in said


@pytest.mark.parametrize("model", ["Depends", "Needs"])
def test_a_model_that_needs_values_is_built_for_real(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "H = 3 freedoms" in output(capsys, model, "--input", "1,2", "--real")


@full
@pytest.mark.parametrize("start", [["-m", "lightning_ecopt"], ["-P", "-c", SCRIPT]], ids=["module", "console script"])
def test_the_command_finds_modules_in_the_current_directory(start: list[str], models: Path) -> None:
    if "-P" in start and sys.version_info < (3, 11):
        pytest.skip("there is no -P, which leaves the current directory out, as a console script does")
    command = [sys.executable, *start, "models_of_the_tests:Net", "--input=1,1,4,4", "--unit=0"]
    result = subprocess.run(command, cwd=models, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Unit 0: c multiplies conv.weight[0], conv.bias[0]; 1/c multiplies head.weight")


def test_the_example_of_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "examples")
    main(["digits:CNN", "--input", "1,1,8,8", "--unit", "21"])
    printed = capsys.readouterr().out
    assert f"\n```text\n{printed}```\n" in (root / "docs" / "report.md").read_text()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "ecopt torchvision.models:resnet18 --input 1,3,224,224\n" in capsys.readouterr().out


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("no_such_module.at_all:Net", "there is no module 'no_such_module': install it, or run this where it is"),
        (
            "broken_model_of_the_tests:Net",
            "broken_model_of_the_tests cannot be imported: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        (":Net", "':Net' is not of the form MODULE:FACTORY, such as torchvision.models:resnet18"),
        ("models_of_the_tests:", "'models_of_the_tests:' is not of the form MODULE:FACTORY, such as"),
        ("net2", "models_of_the_tests has no attribute 'net2': is it net"),
        ("tokens", "models_of_the_tests has no attribute 'tokens': is it Tokens?"),
        ("Net.smal", "models_of_the_tests.Net has no attribute 'smal': is it small?"),
        ("xyzxyz", "models_of_the_tests has no attribute 'xyzxyz'"),
        ("seven", "models_of_the_tests:seven is an int: name an nn.Module, or a callable that returns one"),
        ("pair", "models_of_the_tests:pair returned a tuple: name a callable that returns an nn.Module"),
    ],
)
def test_a_model_that_there_is_not(model: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, model).startswith(expected)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (
            "Net",
            ["--args", '{"wide": 4}'],
            "models_of_the_tests:Net cannot be built on the meta device: TypeError: Net.__init__() got an unexpected "
            "keyword argument 'wide'; give its arguments with --args, or try --real if it needs values",
        ),
        (
            "Needs",
            [],
            "models_of_the_tests:Needs cannot be built on the meta device: RuntimeError: Tensor.item() cannot be "
            "called on meta tensors; give its arguments with --args, or try --real if it needs values",
        ),
        ("net", ["--args", "{}"], "models_of_the_tests:net is a module already: leave --args out, or name the class"),
        ("Net", ["--args", "[4]"], "argument --args: '[4]' is not a JSON object, such as {\"depth\": 4}"),
        ("Net", ["--args", "{4"], "argument --args: '{4' is not JSON: "),
    ],
)
def test_a_model_that_cannot_be_built(
    model: str, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failure(capsys, model, *options).startswith(expected)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (
            "Net",
            ["--input", "1,3,4,4"],
            "models_of_the_tests:Net cannot be called with --input 1,3,4,4: RuntimeError: ",
        ),
        (
            "Net",
            [],
            "models_of_the_tests:Net cannot be called with no --input: TypeError: Net.forward() missing 1 required "
            "positional argument: 'x'; adapt the inputs, or try --real if it needs values",
        ),
        (
            "Depends",
            ["--input", "1,2"],
            "models_of_the_tests:Depends cannot be called with --input 1,2: RuntimeError: Tensor.item() cannot be "
            "called on meta tensors; adapt the inputs, or try --real if it needs values",
        ),
        (
            "net",
            ["--input", "1,1,4,4", "--input", "y=1"],
            "models_of_the_tests:net cannot be called with --input 1,1,4,4 --input y=1: TypeError: Net.forward() got "
            "an unexpected keyword argument 'y'; adapt the inputs",
        ),
        ("Net", ["--input", "1,x"], "argument --input: '1,x' is not of the form [NAME=]SIZE,SIZE,...[:DTYPE]"),
        (
            "Net",
            ["--input", "1,4:flot32"],
            "argument --input: 'flot32' in '1,4:flot32' is no dtype of torch, such as float32 or int64",
        ),
        ("Net", ["--input", "1:nn"], "argument --input: 'nn' in '1:nn' is no dtype of torch"),
    ],
)
def test_inputs_with_which_a_model_cannot_be_called(
    model: str, options: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failure(capsys, model, *options).startswith(expected)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("evaluation", [False, True])
def test_the_mode_and_the_device_of_the_call(evaluation: bool, real: bool, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--eval"] * evaluation + ["--real"] * real
    device = "cpu" if real else "meta"
    assert failure(capsys, "Device", *options).startswith(
        f"models_of_the_tests:Device cannot be called with no --input: ValueError: training: {not evaluation}, on "
        f"{device}; adapt the inputs"
    )


@pytest.mark.parametrize("unit", ["-1", "4"])
def test_a_unit_that_there_is_not(unit: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, "Net", "--input", "1,1,4,4", f"--unit={unit}")
    assert said == f"there is no unit {unit}: the group has units 0 to 3"
