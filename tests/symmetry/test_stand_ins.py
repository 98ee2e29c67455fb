"""Operations that a trace is taught, and the check of what it was taught."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_ecopt.symmetry import check_freedoms, check_stand_in, scaling_group, stand_in
from lightning_ecopt.symmetry.advice import advice
from lightning_ecopt.symmetry.rules import RULES
from lightning_ecopt.symmetry.stand_ins import STAND_INS

pytestmark = pytest.mark.usefixtures("no_stand_ins")


def custom(name: str, function: Callable[..., Tensor]) -> Any:
    """An operation that computes the function, with its gradients, and of which a trace sees nothing else."""
    operation = torch.library.custom_op(f"ecopt_tests::{name}", function, mutates_args=())
    operation.register_fake(lambda *arguments: function(*arguments).clone())

    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in ctx.inputs]
            wanted = [t for t in inputs if isinstance(t, Tensor)]
            found = iter(torch.autograd.grad(function(*inputs), wanted, grad, allow_unused=True))
        return tuple(next(found) if isinstance(t, Tensor) else None for t in inputs)

    operation.register_autograd(backward, setup_context=lambda ctx, inputs, output: setattr(ctx, "inputs", inputs))
    return operation


def _scaled(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope) * 3


def _gated(x: Tensor, y: Tensor) -> Tensor:
    return x * y.sigmoid()


def _summed(x: Tensor) -> Tensor:
    return x + x.flip(-1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x @ weight.t() + bias).clamp(min=0)


def _shifted(x: Tensor) -> Tensor:
    return (x + 1).relu()


SCALED, GATED, SUMMED, LINEAR, SHIFTED = (
    custom(function.__name__[1:], function) for function in (_scaled, _gated, _summed, _linear, _shifted)
)
X = torch.randn(8, 4)
WEIGHTS = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))

# operation, arguments, a right stand-in, units of the small network
TAUGHT: dict[str, tuple[Any, tuple[Any, ...], Callable[..., Any], int]] = {
    "scaled": (SCALED, (X, 0.1), lambda x, slope: x.relu(), 4),
    "gated": (GATED, (X, X), lambda x, y: x * y.sigmoid(), 4),
    "summed": (SUMMED, (X,), lambda x: x + x.flip(-1), 2),
    "linear": (LINEAR, (X, *WEIGHTS), lambda x, weight, bias: F.linear(x, weight, bias).relu(), 7),
    "shifted": (SHIFTED, (X,), lambda x: x.sigmoid(), 0),
}


@pytest.mark.parametrize("name", list(TAUGHT))
def test_a_right_stand_in_gives_an_operation_all_its_freedoms(name: str) -> None:
    operation, inputs, function, units = TAUGHT[name]
    if name != "shifted":
        with pytest.raises(ValueError, match=rf"^ecopt_tests::{name} has no stand-in, .* \d+ scales"):
            check_stand_in(operation, *inputs)
    stand_in(f"ecopt_tests::{name}")(function)
    assert check_stand_in(operation, *inputs) == units


class Mixture(nn.Module):
    """Two layers of three experts, of which data choose one for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(2, 2)
        self.up, self.down = nn.Parameter(torch.ones(3, 5, 4)), nn.Parameter(torch.ones(3, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        expert = (h.detach()[:, :2] > 0).sum(1)
        y = SCALED(torch.bmm(self.up[expert], h[:, :, None]), 0.1)
        return self.last(torch.bmm(self.down[expert], y)[:, :, 0])


def test_a_stand_in_keeps_the_units_of_experts_apart() -> None:
    stand_in("ecopt_tests::scaled")(lambda x, slope: x.relu())
    assert check_freedoms(Mixture(), X) == 4 + 15 + 2


@pytest.mark.parametrize(
    ("name", "function"),
    [
        pytest.param("gated", lambda x, y: x * y, id="degree"),
        pytest.param("summed", lambda x: x.relu(), id="elements that are mixed"),
        pytest.param("shifted", lambda x: x.relu(), id="a constant is added"),
        pytest.param("linear", lambda x, weight, bias: F.linear(x, weight).relu(), id="an argument left out"),
        pytest.param("scaled", lambda x, slope: x.abs().sqrt(), id="another power"),
    ],
)
def test_a_wrong_stand_in_is_found(name: str, function: Callable[..., Any]) -> None:
    operation, inputs, _, _ = TAUGHT[name]
    stand_in(f"ecopt_tests::{name}")(function)
    for complete in (False, True):
        with pytest.raises(ValueError, match=f"The stand-in of ecopt_tests::{name} is unsound"):
            check_stand_in(operation, *inputs, complete=complete)


def test_a_stand_in_may_say_less_than_there_is_to_say() -> None:
    stand_in("ecopt_tests::scaled")(lambda x, slope: x + x.flip(-1))
    assert check_stand_in(SCALED, X, 0.1, complete=False) == 2
    with pytest.raises(ValueError, match="of ecopt_tests::scaled is incomplete: it holds 2 freedoms fixed"):
        check_stand_in(SCALED, X, 0.1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(SCALED(self.first(x), 0.1))


class Branching(Net):
    """Can be traced in a real call only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


@pytest.mark.parametrize("make", [Net, Branching])
def test_the_operation_itself_is_called(make: type[nn.Module]) -> None:
    stand_in("ecopt_tests::scaled")(lambda x, slope: x.relu())
    net, seen = make(), []
    net.last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    assert scaling_group(net, X).num_units == 6
    if make is Branching:
        torch.testing.assert_close(seen[-1], _scaled(net.first(X), 0.1))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, slope: x[:1].relu(), "outputs of shapes"),
        (lambda x, slope: (x, x), "outputs of shapes"),
        (lambda x: x, "positional argument"),
    ],
)
def test_a_stand_in_that_fails_costs_freedoms_only(function: Callable[..., Any], words: str) -> None:
    stand_in("ecopt_tests::scaled")(function)
    with pytest.warns(UserWarning, match=words):
        assert scaling_group(Net(), X).num_units == 0


def test_operations_that_write_to_their_arguments_have_no_stand_in() -> None:
    @torch.library.custom_op("ecopt_tests::written", mutates_args=("x",))
    def written(x: Tensor) -> None:
        x.add_(1)

    stand_in("ecopt_tests::written")(lambda x: None)
    net = Net()
    net.forward = lambda x: (h := net.first(x), written(h), net.last(h))[-1]  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="writes to its arguments"), torch.no_grad():
        assert scaling_group(net, X).num_units == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("relu", "namespace"),
        ("::f", "namespace"),
        ("aten::relu", "rule already"),
        (torch.ops.aten.relu.default, "rule already"),
        ("ecopt_tests::scale", "no operation 'ecopt_tests::scale'; did you mean 'ecopt_tests::scaled'"),
        ("ecopt_tests::scaled.default", "did you mean 'ecopt_tests::scaled'"),
    ],
)
def test_names_that_cannot_be_taught(name: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stand_in(name)


@pytest.mark.parametrize(
    "operation", [SCALED, torch.ops.ecopt_tests.scaled, torch.ops.ecopt_tests.scaled.default, "ecopt_tests::scaled"]
)
def test_an_operation_is_told_by_its_name_or_by_itself(operation: Any) -> None:
    stand_in(operation)(lambda x, slope: x.relu())
    assert check_stand_in(operation, X, 0.1) == 4


def test_what_is_no_operation_has_no_stand_in() -> None:
    with pytest.raises(TypeError, match=r"@stand_in\('mylib::scaled_relu'\), got <function"):
        stand_in(lambda x: x)
    with pytest.raises(ValueError, match="no operation 'ecopt_tests::sumed'; did you mean 'ecopt_tests::summed'"):
        check_stand_in("ecopt_tests::sumed", X)


def test_a_stand_in_that_is_replaced_or_not_met_is_told() -> None:
    def relu(x: Tensor, slope: float) -> Tensor:
        return x.relu()

    stand_in("ecopt_later::f")(relu)
    with pytest.warns(UserWarning, match="No stand-in was met"):
        check_stand_in(torch.relu, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stand_in("ecopt_tests::scaled")(relu)
        stand_in("ecopt_tests::scaled")(relu)
        check_stand_in(lambda x: SCALED(x, 0.1), X)
    with pytest.warns(UserWarning, match="ecopt_tests::scaled has a stand-in already"):
        stand_in("ecopt_tests::scaled")(lambda x, slope: x)
    assert STAND_INS["ecopt_later::f"] is relu


def test_an_operation_of_torch_can_be_taught() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 2))
    net[1].forward = lambda h: torch.hypot(h, h)  # type: ignore[method-assign]
    assert scaling_group(net, X).num_units == 0
    stand_in("aten::hypot")(lambda x, y: x + y)
    assert scaling_group(net, X).num_units == 6


def test_freedoms_that_cannot_be_counted_are_no_freedoms_that_were() -> None:
    detached = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    detached.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(ValueError, match="no gradient"):
        check_freedoms(detached, X)
    assert check_freedoms(detached, X, complete=False) == 6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gelu", "ReLU"),
        ("native_layer_norm", "epsilon"),
        ("_log_softmax", "no factor leaves"),
        ("mse_loss", "no factor leaves"),
        ("output", "must stay"),
        ("output['past_key_values'].layers[0].keys", "outputs="),
        ("output.logits", "outputs="),
        ("loss", "must stay"),
        ("loss['loss']", "must stay"),
        ("loss['feat']", "leave it out"),
        ("kept by the module", "attribute"),
        ("gradient", "see the warning"),
        ("somebody else writes to the weights", "parametrization"),
        ("_local_scalar_dense", "on_train_batch_end"),
        ("add", "must scale alike"),
        ("left out by the user", "nothing: "),
        ("an unfrozen copy", "freeze it"),
        ("numpy", "torch.library.custom_op"),
        ("data_ptr", "torch.library.custom_op"),
        ("mylib::fused", "help(lightning_ecopt.symmetry.stand_in)"),
        ("hypot", "help(lightning_ecopt.symmetry.stand_in)"),
    ],
)
def test_the_report_says_what_could_be_done(name: str, words: str) -> None:
    assert words in advice(name)
    assert words != "must scale alike" or name in RULES


@pytest.mark.parametrize("name", ["clamp", "softplus", "gradient", "_log_softmax", "binary_cross_entropy"])
def test_what_a_training_step_computes_itself_is_the_loss(name: str) -> None:
    lines = ["training_step, line 3", "training_step, line 7 of other.py"]
    assert advice(name, lines) == "nothing: part of the loss"
    for places in ([], ["net.0"], ["forward, line 3"], [*lines, "net.0"]):
        assert advice(name, places) == advice(name) != "nothing: part of the loss"
