"""The rule "unit": what belongs to the user and to the base, checkpoints, and statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from lightning_ecopt.kernels import EagerKernels, choose_kernels
from lightning_ecopt.kernels.clipping import MEMORY, MOST_SEEN, ClippedRows, RowGradients, seen_of, sum_of_weights
from tests.networks import ResidualMLP
from tests.optim.training import batches, loss_of, only_refresh, problem, same_bits, through_a_file, train, weights_of
from tests.optim.unit_rule import POWERS, Make, finite, saved, unit
from tests.selection import few

# What belongs to the user and to the base -----------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["momentum", "amsgrad"])
def test_gradients_are_the_users_again_after_a_step(base: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, base)
    train(module, optimizer, x, y, range(3))
    optimizer.zero_grad()
    loss_of(module, x, y).backward()
    tensors = {name: p.grad for name, p in module.named_parameters()}
    values = {name: gradient.clone() for name, gradient in tensors.items() if gradient is not None}
    optimizer.step()
    for name, p in module.named_parameters():
        assert p.grad is tensors[name]
        assert torch.equal(p.grad, values[name])


KINDS: dict[str, Make] = {
    "sgd": lambda params: SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: AdamW(params, lr=0.01, amsgrad=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_base_goes_on_from_a_saved_state(kind: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, KINDS[kind])
    train(module, optimizer, x, y, range(5))
    plain = KINDS[kind](module.parameters())
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in module.parameters():
        assert plain.state[p].keys() == optimizer.state[p].keys()
        for entry, value in plain.state[p].items():
            assert torch.equal(value, optimizer.state[p][entry])
    losses = train(module, plain, x, y, range(5, 45))
    assert sum(losses[-4:]) < sum(losses[:4])


class Squared(nn.Sequential):
    """Its last layer reads squares of ReLUs."""

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self
        return last(nn.Sequential(*hidden)(x).square())  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_squared", [False, True])
def test_the_saved_momentum_of_one_gradient_is_that_gradient_centred(is_squared: bool) -> None:
    module, x, y = problem(4, 6, 5, 3)
    if is_squared:
        module = Squared(*module)
    uncentred = [f"{len(module) - 1}.weight"] if is_squared else []
    start = copy.deepcopy(module)
    scaling_group(start, x).balance_()
    loss_of(start, *batches(x, y, 0)).backward()
    optimizer = unit(module, x, lambda params: SGD(params, lr=0.05, momentum=0.9))
    train(module, optimizer, x, y, range(1))
    plain = SGD(module.parameters(), lr=0.05, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    for name, p in module.named_parameters():
        g = start.get_parameter(name).grad
        expected = g - 0.9 * g.mean(1, keepdim=True) if g.ndim == 2 and name not in uncentred else g
        torch.testing.assert_close(plain.state[p]["momentum_buffer"], expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_the_plain_base_is_taken_over(kind: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    plain = KINDS[kind](module.parameters())
    train(module, plain, x, y, range(5))
    before = weights_of(module)
    optimizer = unit(module, x, KINDS[kind])
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    only_refresh(optimizer)
    for entry, power in POWERS.items():
        for name, p in module.named_parameters():
            if entry in plain.state[p]:
                expected = plain.state[p][entry] * (before[name] / p.detach()) ** power
                torch.testing.assert_close(optimizer.state[p][entry], expected, rtol=1e-9, atol=1e-15)
    losses = train(module, optimizer, x, y, range(5, 45))
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("first", "second"), [("path", "unit"), ("unit", "path")])
def test_a_checkpoint_of_the_other_rule_starts_anew(kind: str, first: str, second: str) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = EquivalentClassOptimizer(KINDS[kind](module.parameters()), scaling_group(module, x), rule=first)
    train(module, optimizer, x, y, range(5))
    state = through_a_file(optimizer.state_dict())
    assert state["equivalent_class"]["rule"] == first
    twin = copy.deepcopy(module)
    other = EquivalentClassOptimizer(KINDS[kind](twin.parameters()), scaling_group(twin, x), rule=second)
    other.load_state_dict(copy.deepcopy(state))  # a torch optimizer goes on with the tensors that it is given
    losses = train(twin, other, x, y, range(5, 35))
    assert finite(twin)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert other.state_dict()["equivalent_class"]["rule"] == second

    # As if the plain base had been saved.
    third = EquivalentClassOptimizer(KINDS[kind](module.parameters()), scaling_group(module, x), rule=second)
    third.load_state_dict({key: value for key, value in state.items() if key != "equivalent_class"})
    assert train(module, third, x, y, range(5, 35)) == losses
    assert same_bits(module, twin)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "stop"),
    few(
        [("momentum", stop) for stop in (0, 1, 6, 7, 8)] + [("amsgrad", 1), ("amsgrad", 7)],
        [("momentum", 7), ("amsgrad", 1)],
    ),
)
def test_a_resumed_run_has_the_same_bits(base: str, stop: int) -> None:
    def fresh() -> tuple[nn.Module, EquivalentClassOptimizer]:
        torch.manual_seed(1)
        module = ResidualMLP()
        return module, unit(module, x, base, refresh_interval=7)

    torch.manual_seed(0)
    x, y = torch.randn(32, 3), torch.randn(32, 2)
    reference, optimizer = fresh()
    losses = train(reference, optimizer, x, y, range(15))

    module, optimizer = fresh()
    assert train(module, optimizer, x, y, range(stop)) == losses[:stop]
    state = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    train(module, optimizer, x, y, range(stop, 15))  # goes on after it was saved
    assert same_bits(module, reference)

    again, optimizer = fresh()
    again.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    assert train(again, optimizer, x, y, range(stop, 15)) == losses[stop:]
    assert same_bits(again, reference)


@pytest.mark.parametrize(("base", "sizes"), [("sgd", ("rho", "reference")), ("adamw", ("own",))])
def test_a_saved_state_does_not_move_on_with_the_run(base: str, sizes: tuple[str, ...]) -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, base)
    train(module, optimizer, x, y, range(3))
    state = optimizer.state_dict()["equivalent_class"]
    frozen = copy.deepcopy(state)
    train(module, optimizer, x, y, range(3, 6))
    assert {"rho", "reference", "own"}.intersection(state) == set(sizes)
    for key in (*sizes, "second", "seen"):
        assert torch.equal(state[key], frozen[key])
    assert not torch.equal(saved(optimizer)["second"], frozen["second"])


@pytest.mark.parametrize(("first", "second"), [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_base_takes_over_the_running_sizes_of_gradients(first: str, second: str) -> None:
    """AdamW takes over the magnitudes of SGD, too. It keeps only s_k itself, so that SGD measures them anew."""
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, KINDS[first])
    train(module, optimizer, x, y, range(3))
    before = optimizer.rule_state()
    assert before is not None
    scaling_group(module, x).balance_()  # as the first step of the one that begins anew does
    again, fresh = (unit(copy.deepcopy(module), x, KINDS[second]) for _ in range(2))
    again.load_rule_state(copy.deepcopy(before))
    for each in (again, fresh):
        for group in each.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        each.step()
    found, new = saved(again), saved(fresh)
    if second == "sgd":
        torch.testing.assert_close(found["rho"], new["rho"], rtol=1e-12, atol=0)
        torch.testing.assert_close(found["reference"], new["reference"], rtol=1e-12, atol=0)
    else:
        ratio = (before["rho"] / before["reference"]).clamp(min=1 / 3)
        assert torch.equal(found["own"], torch.where(new["own"] == 1, 1.0, ratio))
    assert torch.equal(found["second"], 0.99 * before["second"])
    assert not bool(new["second"].any())


@pytest.mark.parametrize("widths", [(4, 7, 3), (4, 6, 2)])
def test_a_checkpoint_of_a_network_with_other_rows_is_an_error(widths: tuple[int, ...]) -> None:
    module, x, y = problem(4, 6, 3)
    optimizer = unit(module, x, "sgd")
    train(module, optimizer, x, y, range(2))
    other, x, y = problem(*widths)
    wrapped = unit(other, x, "sgd")
    with pytest.raises(ValueError, match="made with parameters of other shapes: load it into the network"):
        wrapped.load_state_dict(through_a_file(optimizer.state_dict()))


# Statistics -----------------------------------------------------------------------------------------------------------


def constant_gradients(module: nn.Module, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.grad = factor * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_clipped_under_constant_gradients(dtype: torch.dtype) -> None:
    module, x, _ = problem(4, 6, 5, 3, dtype=dtype)
    scaling_group(module, x).balance_()  # so that the first refresh changes no gradient
    optimizer = unit(module, x, "sgd")
    assert optimizer.statistics() is None
    for _ in range(20):
        constant_gradients(module)
        optimizer.step()
        assert optimizer.statistics().clipped_share == 0.0
    assert optimizer.statistics().dormant_units == 0


def test_the_clipped_share_is_that_of_rows_and_steps() -> None:
    module, x, _ = problem(4, 6, 5, 3)
    optimizer = unit(module, x, "sgd", refresh_interval=None, check=None)
    for factor in (4.0, 2.0, 1.0, 10.0):  # at first each is less than the mean so far
        constant_gradients(module, factor)
        optimizer.step()
    assert optimizer.statistics().clipped_share == pytest.approx(1 / 4)
    constant_gradients(module, 100.0)
    module[2].weight.grad *= 1e-6
    optimizer.step()
    rows, small = 6 + 6 + 5 + 5 + 3 + 3, 5
    assert optimizer.statistics().clipped_share == pytest.approx((2 * rows - small) / (5 * rows))
    optimizer.refresh()  # the running means go on, and so does the count
    constant_gradients(module, 1e-3)
    optimizer.step()
    assert optimizer.statistics().clipped_share == pytest.approx((2 * rows - small) / (6 * rows))


def test_the_clipped_share_of_a_run_is_a_share() -> None:
    module, x, y = problem(4, 6, 5, 3)
    optimizer = unit(module, x, "momentum", refresh_interval=30)
    for step in range(40):
        train(module, optimizer, x, y, range(step, step + 1))
        assert 0.0 <= optimizer.statistics().clipped_share <= 1.0
    assert optimizer.statistics().clipped_share > 0.0


def test_dormant_units_are_counted() -> None:
    module, x, y = problem(4, 6, 5, 3)
    with torch.no_grad():
        module[2].weight[:, :2] = 0
    optimizer = unit(module, x, "sgd")
    train(module, optimizer, x, y, range(1))
    assert optimizer.statistics().dormant_units == 2
    optimizer.refresh()  # the gradient has brought them to life
    train(module, optimizer, x, y, range(1, 2))
    assert optimizer.statistics().dormant_units == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_old_state_has_the_sum_of_weights_from_which_the_number_of_gradients_follows(dtype: torch.dtype) -> None:
    """A state of version 0.1.0; where the sum is nearly one, its rounding leaves the number open, and q as it is."""
    seen = torch.arange(MOST_SEEN + 1)
    weight = sum_of_weights(seen, dtype)
    found = seen_of(weight)
    assert found.dtype == torch.int16
    torch.testing.assert_close(sum_of_weights(found, dtype), weight, rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.equal(found[:500].long(), seen[:500])
    one = torch.ones(1, dtype=dtype)
    assert seen_of(one) == MOST_SEEN
    iterated = torch.zeros(1, dtype=dtype)
    for number in range(1, 300):
        iterated = iterated + (1 - MEMORY) * (1 - iterated)
        assert seen_of(iterated) == number


def test_more_gradients_than_are_counted_change_nothing() -> None:
    for kernels in (EagerKernels(), choose_kernels("auto", [torch.zeros(1, device="cpu")])):
        rows = ClippedRows.of(torch.full((2,), 4.0), torch.zeros(2, dtype=torch.bool), None, 1e-20)
        seen = torch.tensor([MOST_SEEN - 1, MOST_SEEN], dtype=torch.int16)
        ones = torch.ones(2)
        clipped = kernels.clipping(RowGradients(ones, 4 * ones, ones, seen, rows, None, ones, 1.0, None, None))
        assert clipped.seen.dtype == torch.int16
        assert clipped.seen.tolist() == [MOST_SEEN, MOST_SEEN]
        assert clipped.step[0] == clipped.step[1]
