"""What path norms are good for, how they are used, and that measuring changes nothing."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map_only

from lightning_ecopt import scaling_group
from lightning_ecopt.metrics import PathNorm
from tests.lightning_integration.modules import same
from tests.metrics.cases import CASES, Computed, M, P, distance, imbalance, path_norm, prepared, zeros
from tests.networks import ResNet, mlp, norm_cnn, plain_cnn
from tests.selection import few
from tests.symmetry.helpers import flat_output
from tests.symmetry.zoo.case import Case, Use

COVERED = [case for case in CASES if Use.PATHS in case.good_for]
with_paths = pytest.mark.parametrize(
    "case", few(COVERED, [case for case in COVERED if Use.FAST in case.good_for]), ids=lambda case: case.name
)

# What path norms are good for -----------------------------------------------------------------------------------------


def test_the_list_of_networks_with_paths_is_right(generator: torch.Generator) -> None:
    assert len(COVERED) == 93
    others = [case for case in CASES if Use.PATHS not in case.good_for]
    for case in others[::6]:
        with pytest.raises(ValueError, match=r"PathNorm does not cover|has shape"):
            path_norm(*prepared(case, generator))


@with_paths
def test_the_path_norm_depends_on_the_class_alone(case: Case, generator: torch.Generator) -> None:
    module, inputs = prepared(case, generator)
    module.eval()
    group = scaling_group(module, *inputs)
    before = [path_norm(module, inputs, p) for p in (1, 2)]
    assert all(map(math.isfinite, before))
    group.act_(torch.randn(group.num_units, generator=generator, dtype=torch.float64))
    assert [path_norm(module, inputs, p) for p in (1, 2)] == pytest.approx(before, rel=1e-11)
    group.balance_()
    assert [path_norm(module, inputs, p) for p in (1, 2)] == pytest.approx(before, rel=1e-11)


@with_paths
def test_the_l1_path_norm_bounds_the_outputs(case: Case, generator: torch.Generator) -> None:
    module, inputs = prepared(case, generator)
    module.eval()
    bound = path_norm(module, inputs)
    for _ in range(5):
        drawn = tree_map_only(Tensor, lambda t: t.sign() if t.is_floating_point() else t, case.inputs(generator))
        outputs = flat_output(module(*drawn)).detach()
        assert float(outputs.abs().sum()) / len(drawn[0]) <= bound


# How path norms are used ----------------------------------------------------------------------------------------------


def test_neither_values_nor_the_number_of_samples_matter() -> None:
    net = norm_cnn()
    expected = path_norm(net, torch.zeros(1, 1, 8, 8))
    assert path_norm(net, 100 * torch.randn(7, 1, 8, 8)) == pytest.approx(expected, rel=1e-12)
    assert path_norm(net, torch.full((3, 1, 8, 8), math.nan)) == pytest.approx(expected, rel=1e-12)
    merged = Computed(lambda x: net(x).reshape(-1, 1))
    assert path_norm(merged, torch.zeros(4, 1, 8, 8)) == pytest.approx(expected, rel=1e-12)
    alone = mlp(3, 4, 2)
    assert path_norm(alone, torch.zeros(3), samples=1) == pytest.approx(path_norm(alone, torch.zeros(1, 3)), rel=1e-12)


def test_inputs_are_given_as_an_example_input_array_is() -> None:
    net = Computed(lambda a, b: a + 2 * b)
    a, b = torch.zeros(1, 2), torch.zeros(1, 2)
    assert path_norm(net, (a, b)) == 6.0

    class Named(nn.Module):
        def forward(self, a: Tensor, *, b: Tensor) -> dict[str, Tensor]:
            return {"sum": a + 2 * b, "first": a}

    assert path_norm(Named(), {"a": a, "b": b}) == 8.0
    with pytest.raises(ValueError, match="the inputs hold no tensor"):
        path_norm(net, ())
    with pytest.raises(ValueError, match="samples must be a positive number, got 0"):
        path_norm(net, (a, b), samples=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_path_norms_are_exact_whatever_the_type_of_the_weights(dtype: torch.dtype) -> None:
    net = nn.Sequential(plain_cnn(), nn.PReLU(), nn.Linear(3, 2)).to(dtype)
    exact = copy.deepcopy(net).double()
    inputs = torch.zeros(1, 1, 8, 8)
    for p in (1, 2):
        expected = path_norm(exact, inputs.double(), p)
        assert path_norm(net, inputs.to(dtype), p) == pytest.approx(expected, rel=1e-13)
        with torch.autocast("cpu", torch.bfloat16):
            assert path_norm(net, inputs.to(dtype), p) == pytest.approx(expected, rel=1e-13)
        with torch.inference_mode():
            assert path_norm(net, inputs.to(dtype), p) == pytest.approx(expected, rel=1e-13)


def test_scripted_and_compiled_networks_have_the_same_path_norm() -> None:
    net, inputs = mlp(3, 4, 4, 2), torch.zeros(2, 3)
    expected = path_norm(net, inputs)
    assert path_norm(torch.jit.script(net), inputs) == pytest.approx(expected, rel=1e-12)
    compiled = torch.compile(net, backend="eager")
    assert path_norm(compiled, inputs) == pytest.approx(expected, rel=1e-12)
    compiled(inputs)
    assert path_norm(compiled, inputs) == pytest.approx(expected, rel=1e-12)


def test_changes_in_place_are_followed() -> None:
    linear = nn.Linear(3, 3).double()

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.full((len(x), 5), 0.5, dtype=x.dtype)
            y[:, 1:4] = linear(x)
            y[:, :1] += 2
            columns = y[:, 2:]
            columns.mul_(-3).relu_()
            out = torch.empty(len(x), 2, dtype=x.dtype)
            torch.mm(y, torch.ones(5, 2, dtype=x.dtype), out=out)
            return out.detach_()

    weight = torch.cat([linear.weight, linear.bias[:, None]], 1)
    rows = [weight[0], 3 * weight[1], 3 * weight[2], torch.tensor([2.0, 0.5, 3 * 0.5])]
    expected = 2 * float(torch.cat(rows).abs().sum())
    assert path_norm(InPlace(), zeros(2, 3)) == pytest.approx(expected, rel=1e-12)


def test_a_norm_that_is_too_large_is_infinite_and_its_logarithm_need_not_be() -> None:
    net = mlp(2, 2, 1, bias=False).double()
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.fill_(1e60)
    logarithm = PathNorm(p=2, log=True)
    logarithm.update(net, zeros(1, 2))
    assert float(logarithm.compute()) == pytest.approx(math.log(2e120), rel=1e-12)
    with torch.no_grad():
        net[0].weight.fill_(1e160)
    assert path_norm(net, zeros(1, 2), 2) == math.inf
    with torch.no_grad():
        net[0].weight.fill_(math.nan)
    assert math.isnan(path_norm(net, zeros(1, 2)))


@pytest.mark.parametrize("p", [0.5, 0, -1, math.inf, math.nan])
def test_an_exponent_without_a_norm_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p must be a real number from 1 on, got"):
        PathNorm(p)


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "sigmoid": (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), r"'sigmoid' in module '1' \(Sigmoid\): it has no paths"),
    "attention": (nn.TransformerDecoderLayer(4, 2, 8), r"softmax' in module 'self_attn' \(Multihead"),
    "softmax": (nn.Softmax(1), "'_softmax' in Softmax"),
    "layer norm": (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "'native_layer_norm' in module '1'"),
    "no running statistics": (nn.BatchNorm1d(4, track_running_stats=False), "it normalises by statistics of the batch"),
    "relu6": (nn.ReLU6(), "it has a bound other than zero"),
    "square root": (Computed(lambda x: x**0.5), "its exponent is no positive integer"),
    "division by an activation": (Computed(lambda x: 1 / x), "'reciprocal'"),
    "comparison": (Computed(lambda x: torch.where(x > 0, x, 0.1 * x)), "'gt' in Computed"),
    "control flow": (Computed(lambda x: x if x.sum() else -x), "'is_nonzero'|'_local_scalar_dense'"),
    "positions of maxima": (Computed(lambda x: x[:, x.max(1)[1]]), "positions of maxima, which depend on the data"),
    "integers": (Computed(lambda x: x.long().float()), "it makes other numbers of activations"),
    "bits": (Computed(lambda x: x.view(torch.int32)), "it takes real numbers for something else"),
    "random numbers": (Computed(lambda x: x * torch.rand(4)), r"'rand' .* put the model in evaluation mode"),
    "product over elements": (Computed(lambda x: x.scatter_reduce(1, P[0, 0, :1], x, "prod")), "it does not add"),
    "higher-order operator": (Computed(lambda x: torch.cond(M[0, 0], torch.sin, torch.cos, (x,))), "'cond' in Com"),
    "values outside torch": (Computed(lambda x: torch.from_numpy(x.numpy() * 2)), "no output of Computed is a real"),
    "no dependence": (Computed(lambda x: torch.ones(2)), "no output of Computed is a real number that depends on the"),
    "no axis of samples": (Computed(lambda x: x.flatten()[:3]), r"an output has shape \[3\], but .* \[2, 4\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_paths_is_refused_by_name(name: str) -> None:
    module, message = REFUSED[name]
    inputs = (torch.zeros(1, 3, 4),) * 2 if name == "attention" else torch.zeros(2, 4)
    with pytest.raises(ValueError, match=message):
        path_norm(module, inputs)


def test_values_that_leave_torch_are_undefined() -> None:
    escaped = Computed(lambda x: x + torch.from_numpy(x.numpy() * 2))
    assert math.isnan(path_norm(escaped, torch.ones(1, 4)))


def test_a_network_without_values_is_refused() -> None:
    with torch.device("meta"):
        net = mlp(3, 4, 2)
    group = scaling_group(net, torch.zeros(1, 3, device="meta"))
    with pytest.raises(RuntimeError, match="meta device"):
        path_norm(net, torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="meta device"):
        imbalance(group)
    with pytest.raises(RuntimeError, match="meta device"):
        distance(net, mlp(3, 4, 2), group)


def test_a_default_device_is_kept_to() -> None:
    # A function of the network that makes a tensor must make it there; on the meta device it has no values.
    net = Computed(lambda x: x + torch.ones(3))
    with torch.device("meta"), pytest.raises(ValueError, match="on device meta"):
        path_norm(net, torch.zeros(1, 3, device="cpu"))


# Nothing changes ------------------------------------------------------------------------------------------------------


class Watchful(nn.Module):
    """Keeps statistics, counts its calls, draws random numbers, and looks whether its parameters are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ResNet(), nn.Dropout(0.5), parametrizations.spectral_norm(nn.Linear(3, 3)))
        self.head = nn.utils.weight_norm(nn.Linear(3, 2))
        self.position = nn.Parameter(torch.randn(4, 2))
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mean", torch.zeros(2))
        self.calls, self.history = 0, [torch.zeros(1)]
        self.expected: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: (id(tensor), tensor.detach().clone(), self.training) for name, tensor in tensors}

    def check(self, first: dict[str, Any]) -> None:
        for (name, one), two in zip(first.items(), self.state().values(), strict=True):
            assert one[::2] == two[::2], name
            assert torch.equal(one[1], two[1]), name

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.expected:
            with torch._C._DisableTorchDispatch():
                self.check(self.expected)
        x = self.head(self.body(x)) + self.norm(self.position).sum(0)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        self.history.append(self.mean)
        random.random()
        return x - self.mean


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_metric_changes_anything_even_meanwhile(training: bool) -> None:
    net = Watchful().train(training)
    inputs = torch.randn(2, 1, 8, 8, requires_grad=True)
    given = inputs.detach().clone()
    net(inputs).sum().backward()
    group = scaling_group(net, inputs)
    first, calls, history = net.state(), net.calls, list(net.history)
    gradients = [p.grad.clone() for p in net.parameters()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), net.head.weight
    net.expected = first
    values = [path_norm(net, inputs, p) for p in (1, 2, 1)]
    assert values[0] == values[2]
    net.expected = {}
    imbalance(group)
    distance(net, net, group)
    net.check(first)
    assert net.calls == calls
    assert list(map(id, net.history)) == list(map(id, history))
    assert same(gradients, [p.grad for p in net.parameters()])
    assert torch.equal(inputs, given)
    assert inputs.grad is not None
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert net.head.weight is before[3]
