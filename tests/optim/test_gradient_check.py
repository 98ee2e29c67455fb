"""What the gradient shows to change the loss is held fixed; nothing else is."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils._pytree import tree_map_only

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ScalingGroup, check_invariance, scaling_group
from lightning_ecopt.common import tensors
from lightning_ecopt.common.sharding import Ranks
from lightning_ecopt.kernels.compiled import CompiledKernels
from lightning_ecopt.symmetry.coupling import sides_of
from lightning_ecopt.symmetry.derivatives import DerivativeSums
from tests.networks import mlp
from tests.selection import examples, few
from tests.symmetry.helpers import broken_units, directions, draw_, flat_output
from tests.symmetry.zoo import FAST, ZOO
from tests.symmetry.zoo.case import Case

Term = Callable[[nn.Module, Tensor], Tensor]


def net(*widths: int) -> nn.Sequential:
    """A network whose units all are switched on by some inputs: others have no gradient, and are not judged."""
    torch.manual_seed(0)
    module = mlp(*(widths or (6, 12, 8, 8, 3))).float()
    for layer in module[:-1:2]:
        nn.init.constant_(layer.bias, 0.3)
    return module


def batches(seed: int = 0, size: int = 16, width: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(size, width, generator=generator)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def hidden(module: nn.Module, x: Tensor) -> Tensor:
    return (module[:4](x) - 1).square().mean()


def l1(module: nn.Module, x: Tensor) -> Tensor:
    return 1e-3 * sum(p.abs().sum() for p in module.parameters())


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    term: Term | None = None,
    *,
    data: Iterator[tuple[Tensor, Tensor]] | None = None,
    change: Callable[[list[Tensor]], Any] | None = None,
    zero: bool = True,
    autocast: torch.dtype | None = None,
    accumulate: int = 1,
) -> None:
    data = batches() if data is None else data
    for _ in range(steps):
        if zero:
            optimizer.zero_grad()
        for _ in range(accumulate):
            x, y = next(data)
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                loss = F.cross_entropy(module(x).float(), y)
                if term is not None:
                    loss = loss + term(module, x)
            loss.backward()
        if change is not None:
            change(list(module.parameters()))
        optimizer.step()


def ec(module: nn.Module, lr: float = 0.05, make: Any = SGD, **options: Any) -> EquivalentClassOptimizer:
    group = scaling_group(module, torch.randn(2, 6))
    return EquivalentClassOptimizer(
        make(module.parameters(), lr=lr), group, **{"refresh_interval": 6, "implementation": "wrapped", **options}
    )


@pytest.fixture
def quiet() -> Iterator[None]:
    """No warning at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# The sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", few([case for case in ZOO if case.units], FAST[::3]), ids=lambda case: case.name)
@pytest.mark.parametrize("way", ["together", "in pieces", pytest.param("in C", marks=pytest.mark.compiler)])
def test_the_sums_are_those_over_all_elements(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "in pieces":
        monkeypatch.setattr(tensors, "FEW", 0)
        monkeypatch.setitem(tensors.PIECE_SIZES, "refresh", tensors.PieceSize(7, 7))
    generator = torch.Generator().manual_seed(0)
    module = case.build().eval()
    draw_(module, generator)
    group = scaling_group(module, *case.inputs(generator))
    products = []
    for p in group.parameters.values():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        products.append((p.detach() * p.grad).flatten())
    kernels = CompiledKernels() if way == "in C" else None
    exponents, found = directions(group), group.derivatives(kernels=kernels)
    torch.testing.assert_close(found.total, torch.cat(products) @ exponents)
    size = torch.cat(products).abs() @ exponents.abs()
    assert (found.size >= size * (1 - 1e-12))[found.judged].all()  # exponents of two sides may cancel in part
    simple = found.judged & group.monomials.simple
    torch.testing.assert_close(found.size[simple], size[simple])


@pytest.mark.compiler
def test_c_is_asked_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    both_sides = CompiledKernels.both_sides
    monkeypatch.setattr(
        CompiledKernels,
        "both_sides",
        lambda *a, **k: (asked.append((found := both_sides(*a, **k)) is not None), found)[1],
    )
    module = net()
    optimizer = EquivalentClassOptimizer(torch.optim.SGD(module.parameters(), lr=0.01))
    for implementation, expected in (("compiled", [True]), ("eager", [])):
        optimizer.implementation = implementation
        optimizer.bind(scaling_group(module, torch.randn(2, 6)))
        asked.clear()
        F.cross_entropy(module(torch.randn(8, 6)), torch.arange(8) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert sorted(set(asked)) == expected, implementation


def test_a_rank_without_couplings_adds_zeros_of_the_type_of_the_others() -> None:
    group = scaling_group(net(), torch.randn(2, 6))
    weights = {name: p.detach() for name, p in group.parameters.items()}
    nothing = DerivativeSums([], group.monomials, sides_of([]))(weights, weights, Ranks(weights), 2.0**-22)
    others = group.derivatives(weights)
    assert nothing.total.dtype == others.total.dtype == torch.float64
    assert nothing.total.shape == others.total.shape
    assert not bool(nothing.size.any())


def test_gradients_whose_memory_has_their_negatives_count_as_what_they_are() -> None:
    module = net()
    group, other = scaling_group(module, torch.randn(2, 6)), {}
    lazy = {}
    for name, p in group.parameters.items():
        lazy[name] = torch.complex(torch.randn_like(p), torch.randn_like(p).bfloat16().float()).conj().imag
        assert lazy[name].is_neg()
        other[name] = lazy[name].resolve_neg().contiguous()
    found, expected = group.derivatives(lazy), group.derivatives(other)
    for one, two in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, two)


def test_a_unit_without_all_of_its_gradients_is_not_judged() -> None:
    module = net()
    group = scaling_group(module, torch.randn(2, 6))
    (F.cross_entropy(module(torch.randn(8, 6)), torch.arange(8) % 3) + l1(module, torch.zeros(0))).backward()
    module[2].bias.grad = None
    module[4].weight.grad[3, 0] = torch.nan
    judged = group.derivatives().judged
    names = [group.describe(unit) for unit in range(group.num_units)]
    assert all("2.bias" not in name for unit, name in enumerate(names) if judged[unit])
    assert all("4.weight[3]" not in name for unit, name in enumerate(names) if judged[unit])
    assert 0 < int(judged.sum()) < group.num_units


def test_sparse_gradients_count() -> None:
    torch.manual_seed(0)
    found = []
    for sparse in (False, True):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Embedding(20, 6, sparse=sparse), nn.ReLU(), nn.Linear(6, 3))
        ids = torch.arange(10) % 7
        group = scaling_group(nn.Sequential(nn.Embedding(20, 6), *module[1:]), ids)
        parameters = dict(zip(group.parameters, module.parameters(), strict=True))
        F.cross_entropy(module(ids), ids % 3).backward()
        group = ScalingGroup(parameters, group.couplings, group.monomials, group.costs)
        found.append(group.derivatives())
    torch.testing.assert_close(found[0].total, found[1].total)
    torch.testing.assert_close(found[0].size, found[1].size)
    assert found[1].judged.all()


# The question by itself -----------------------------------------------------------------------------------------------


def test_a_loss_is_asked() -> None:
    module, x, y = net(), *next(batches())
    group = scaling_group(module, x)
    found = check_invariance(group, lambda: F.cross_entropy(module(x), y))
    assert found
    assert found.judged.all()
    assert "does not change the loss" in str(found)
    assert all(p.grad is None for p in module.parameters())
    loss = F.cross_entropy(module(x), y) + 0.01 * hidden(module, x)
    found = check_invariance(group, loss)
    assert not found
    assert found.parameters == ["2.weight", "2.bias", "4.weight"]
    assert int(found.broken.sum()) == 8
    assert "2.weight, 2.bias, 4.weight" in str(found)
    loss.backward()
    assert torch.equal(check_invariance(group).broken, found.broken)
    rest = group.without(found.broken)
    assert check_invariance(rest)


def test_what_a_loss_does_not_depend_on_counts() -> None:
    module, x, _ = net(), *next(batches())
    found = check_invariance(scaling_group(module, x), hidden(module, x))
    assert int(found.broken.sum()) == 8  # the head has no gradient


def test_what_tells_nothing_is_refused() -> None:
    module, x, y = net(), *next(batches())
    group, loss = scaling_group(module, x), F.cross_entropy(module(x), y)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (group, net()(x).sum(), ValueError, "depends on no parameter of this group: is it of another"),
        (group, loss.detach(), ValueError, "depends on no parameter of this group: it has no gradient"),
        (group, None, ValueError, "tells nothing of any unit"),
        (group, loss * 0, ValueError, "tells nothing of any unit"),
        (group, lambda: None, TypeError, "a function that returned None"),
        (group, lambda: loss.item(), TypeError, r"a function that returned \d"),
        (group, 0.5, TypeError, "got 0.5"),
        (module, loss, TypeError, r"got Sequential. Of a module it is scaling_group\("),
    ]
    for of, given_loss, error, words in wrong:
        with pytest.raises(error, match=words):
            check_invariance(of, given_loss)


def test_units_that_cannot_be_judged_are_told() -> None:
    module, x, y = net(), *next(batches())
    group = scaling_group(module, x)
    F.cross_entropy(module(x), y).backward()
    module[2].bias.grad = None
    found = check_invariance(group)
    assert found
    assert re.search(r"any of 20 of 28 units .*; 8 have no gradient", str(found))
    assert str(found) in repr(found)


# False alarms ---------------------------------------------------------------------------------------------------------

PRECISIONS = [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None), (torch.float64, None)]


#: Each network in one of the precisions; examples/benchmarks/gradient_check.py tries all of them.
MIXED = [(case, *PRECISIONS[number % 4]) for number, case in enumerate(case for case in ZOO if case.units)]


@pytest.mark.parametrize(
    ("case", "kept", "autocast"), few(MIXED, MIXED[::14]), ids=lambda value: getattr(value, "name", None)
)
def test_no_network_of_the_zoo_raises_an_alarm(case: Case, kept: torch.dtype, autocast: torch.dtype | None) -> None:
    generator = torch.Generator().manual_seed(3)
    module = case.build().train()
    draw_(module, generator)
    group = scaling_group(module, *case.inputs(generator))
    module = module.to(kept)
    optimizer = EquivalentClassOptimizer(
        SGD(module.parameters(), lr=0.01), group.of(module), refresh_interval=3, implementation="wrapped"
    )
    for _ in range(5):
        optimizer.zero_grad()
        inputs = tree_map_only(Tensor, lambda v: v.to(kept) if v.is_floating_point() else v, case.inputs(generator))
        try:
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                output = flat_output(module(*inputs)).float()
            target = output.detach().std().clamp(min=1e-3) * torch.randn(output.shape, generator=generator)
            F.mse_loss(output, target).backward()
        except (RuntimeError, NotImplementedError):
            pytest.skip("torch has no such operation")
        optimizer.step()
    assert optimizer.group.num_units == group.num_units


CLIP_NORM, CLIP_VALUE = nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "options",
    [
        {"change": lambda ps: CLIP_NORM(ps, 0.1)},
        {"change": lambda ps: CLIP_VALUE(ps, 0.01)},
        {"change": lambda ps: CLIP_VALUE(ps, 0.1)},
        {"change": lambda ps: CLIP_VALUE(ps, 0.17)},
        {"change": lambda ps: [p.grad.sign_() for p in ps]},
        {"change": lambda ps: CLIP_NORM(ps, 0.1), "autocast": torch.bfloat16, "accumulate": 3},
        {"autocast": torch.float16, "accumulate": 3},
        {"change": lambda ps: [p.grad.mul_(torch.inf) for p in ps[:2]]},
        {"zero": False},
    ],
    ids=["norm", "value", "rarely", "seldom", "sign", "clipped sums of 16 bits", "sums", "infinite", "not zeroed"],
)
def test_what_is_done_to_gradients_raises_no_alarm(options: dict[str, Any]) -> None:
    module = net()
    optimizer = ec(module, lr=0.0 if "inf" in str(options) else 0.05)
    train(module, optimizer, 40, **options)
    assert optimizer.group.num_units == 28


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
@pytest.mark.parametrize("sent", [torch.float16, torch.bfloat16])
def test_gradients_that_ranks_exchange_in_16_bits_raise_no_alarm(kept: torch.dtype, sent: torch.dtype) -> None:
    module = net().to(kept)
    optimizer = EquivalentClassOptimizer(
        SGD(module.parameters(), lr=0.05), scaling_group(net(), torch.randn(2, 6)).of(module), refresh_interval=4
    )
    optimizer.follow_precision(lambda: "32-true" if kept is torch.float32 else "64-true")
    data = ((x.to(kept), y) for x, y in batches())
    train(module, optimizer, 40, data=data, change=lambda ps: [p.grad.copy_(p.grad.to(sent)) for p in ps])
    assert optimizer.group.num_units == 28


@pytest.mark.usefixtures("quiet")
def test_a_fit_to_the_last_digit_raises_no_alarm() -> None:
    """The gradient is nothing but rounding in the end."""
    module = net(6, 16, 8, 3)
    x = torch.randn(4, 6)
    y = torch.randn(4, 3)
    optimizer = ec(module, lr=0.03, make=AdamW, refresh_interval=20)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.03 * 0.98**step
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
    assert optimizer.group.num_units == 24


@pytest.mark.usefixtures("quiet")
def test_gradients_from_other_weights_are_not_asked() -> None:
    """Sharpness-aware steps take the gradient away from where the weights are."""
    module = net()
    optimizer = ECSGD(module.parameters(), lr=0.05, refresh_interval=4)
    data = batches()
    for _ in range(12):
        x, y = next(data)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        moves = [0.5 * p.grad for p in module.parameters()]
        with torch.no_grad():
            torch._foreach_add_(list(module.parameters()), moves)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(module.parameters()), moves)
        optimizer.step()
    assert optimizer.group.num_units == 28


# Detections -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "make"), [("unit", SGD), ("unit", AdamW), ("path", AdamW), ("path", SGD)])
def test_a_term_that_begins_later_is_found_at_the_next_refresh(rule: str, make: Any) -> None:
    module = net()
    optimizer = ec(module, lr=0.001, make=make, rule=rule)
    data = batches()
    train(module, optimizer, 8, data=data)
    assert optimizer.group.num_units == 28
    with pytest.warns(UserWarning, match=r"2\.weight, 2\.bias, 4\.weight.* by \d+(\.\d+)? % of .*8 of 28.*check=None"):
        train(module, optimizer, 6, lambda m, x: 0.1 * hidden(m, x), data=data)
    assert optimizer.group.num_units == 20
    assert optimizer.violation > 0.01
    assert ("gradient", 8) in {(why.name, count) for why, count in optimizer.group.costs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, optimizer, 12, hidden, data=data)
    assert optimizer.group.num_units == 20


def test_sums_over_looks_take_no_memory_once_they_have_been_read() -> None:
    module = net()
    optimizer = ec(module, lr=0.001, refresh_interval=10)
    data = batches()
    held = []
    for _ in range(33):
        train(module, optimizer, 1, data=data)
        held.append(optimizer.state_dict()["equivalent_class"]["check"]["sums"] is not None)
    watched = [*4 * [True], *6 * [False]]  # the fifth look reads the sums
    assert held == [*3 * watched, *3 * [False]]  # no looks follow the fourth refresh


@pytest.mark.parametrize(("kept", "autocast"), PRECISIONS[:2])
def test_a_penalty_on_all_weights_holds_all_units(kept: torch.dtype, autocast: torch.dtype | None) -> None:
    module = net()
    optimizer = ec(module, lr=1e-9)
    before = copy.deepcopy(module)
    with pytest.warns(UserWarning, match="28 of 28 units"):
        train(module, optimizer, 3, l1, autocast=autocast)
    assert optimizer.group.num_units == 0
    for p, q in zip(module.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_option_switches_it_off() -> None:
    module = net()
    optimizer = ec(module, check=None)
    train(module, optimizer, 3, l1)
    assert optimizer.group.num_units == 28
    optimizer.check = "gradient"
    optimizer.follow_precision(lambda: "32-true")
    with pytest.warns(UserWarning, match="28 of 28"):
        train(module, optimizer, 6, lambda *args: 10 * l1(*args))  # so much that no unit is near the bound
    assert optimizer.group.num_units == 0
    with pytest.raises(ValueError, match="check must be 'gradient' or None, got 'loss'"):
        ec(net(), check="loss")


def test_another_loss_on_the_same_weights_tells_the_optimizer_that_rescales_them() -> None:
    """The second optimizer matches features of the first one's network, whose own loss is sound."""
    first, second = net(6, 12, 8, 3), net(6, 8, 6)
    both = nn.Sequential(second, first)
    group = scaling_group(both, torch.randn(2, 6))
    one, two = (
        EquivalentClassOptimizer(SGD(part.parameters(), lr=1e-3), group, refresh_interval=5) for part in (first, second)
    )
    data = batches()

    def steps(count: int, match: bool) -> None:
        for _ in range(count):
            x, y = next(data)
            both.zero_grad()
            F.cross_entropy(both(x), y).backward()
            one.step()
            both.zero_grad()
            loss = F.cross_entropy(both(x), y)
            if match:
                loss = loss + F.mse_loss(first[:2](second(x)), first[:2](x))
            loss.backward()
            two.step()

    units = group.num_units
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(12, False)
    assert one.group.num_units == units
    with pytest.warns(UserWarning, match=r"1\.0\.weight"):
        steps(6, True)
    assert one.group is two.group
    assert one.group.num_units == units - 12 - 6  # those between the two networks, too


class Whole(nn.Module):
    """A network, and a loss with a term, as one module."""

    def __init__(self, layers: nn.Sequential, term: Term | None, begins: int) -> None:
        super().__init__()
        self.layers, self.term, self.begins, self.count = layers, term, begins, 0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        loss = F.cross_entropy(self.layers(x), y)
        return loss if self.term is None or self.count <= self.begins else loss + self.term(self.layers, x)


@st.composite
def terms(draw: Any) -> tuple[list[int], Term]:
    """Widths of a random network, and a random term."""
    widths = [6, *draw(st.lists(st.integers(2, 8), min_size=1, max_size=4)), 3]
    place = draw(st.integers(0, len(widths) - 3))
    size = draw(st.sampled_from([0.03, 0.3, 3.0]))
    rows = draw(st.sampled_from([slice(None), slice(0, 3), slice(None, None, 4)]))
    kinds: dict[str, Term] = {
        "hidden": lambda m, x: size * (m[: 2 * place + 2](x[rows]) - 1).square().mean(),
        "mean": lambda m, x: size * m[: 2 * place + 2](x[rows]).mean(),
        "l1": lambda m, x: 0.1 * size * m[2 * place].weight.abs().sum(),
        "l2 of biases": lambda m, x: size * (m[2 * place].bias - 1).square().sum(),
        "all l1": lambda m, x: 0.01 * size * sum(p.abs().sum() for p in m.parameters()),
        "elsewhere": lambda m, x: size * F.linear(x[rows], m[0].weight).square().mean(),
    }
    return widths, kinds[draw(st.sampled_from(sorted(kinds)))]


@examples(40)
@given(described=terms(), begins=st.integers(0, 7), seed=st.integers(0, 99), rule=st.sampled_from(["unit", "path"]))
def test_units_that_a_random_term_breaks_are_held_and_all_others_are_kept(
    described: tuple[list[int], Term], begins: int, seed: int, rule: str
) -> None:
    widths, term = described
    torch.manual_seed(seed)
    layers = mlp(*widths).float()
    data = batches(seed)
    x, y = next(data)
    group = scaling_group(layers, x)
    whole = Whole(copy.deepcopy(layers), term, 0)
    free = scaling_group(whole, x, y)
    whole = Whole(layers, term, begins)
    optimizer = EquivalentClassOptimizer(
        SGD(layers.parameters(), lr=1e-3), group, rule=rule, refresh_interval=5, implementation="wrapped"
    )
    optimizer.follow_precision(lambda: "32-true")  # so that most units may break by little
    seen = torch.zeros(group.num_units, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(begins + 5 + 4):  # within one refresh, and the steps that are looked at behind it
            optimizer.zero_grad()
            x, y = next(data)
            if step >= begins:
                seen |= touched(layers, group, term(layers, x))
            whole(x, y).backward()
            optimizer.step()
            if step < begins:
                assert optimizer.group is group
    broken, kept = broken_units(group, free), units_of(optimizer.group)
    left = units_of(group.without(broken))
    assert left <= kept
    # A unit cannot be found if the term has met it in no batch, or if no input switches on what is behind it: then the
    # gradient is that of a penalty alone, which looks as if it were clipped.
    x, y = (torch.cat(parts) for parts in zip(*(next(data) for _ in range(20)), strict=True))
    switched_on = check_invariance(group, F.cross_entropy(layers(x), y)).judged
    assert kept - left <= units_of(group.without(switched_on & seen))


def touched(layers: nn.Module, group: ScalingGroup, value: Tensor) -> Tensor:
    """Units with an element that a value depends on, ``bool[H]``."""
    found = torch.autograd.grad(value, list(layers.parameters()), materialize_grads=True)
    products = torch.cat([(p * g).detach().flatten() for p, g in zip(layers.parameters(), found, strict=True)])
    return products.abs().double() @ directions(group).abs() > 0


def units_of(group: ScalingGroup) -> set[tuple[float, ...]]:
    """What each unit does to all elements."""
    return set(map(tuple, directions(group).t().tolist()))


# Resumed runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_run_that_is_resumed_in_the_middle_of_the_looks_decides_alike(stop: int) -> None:
    def run(resume_at: int | None) -> tuple[nn.Module, EquivalentClassOptimizer]:
        module = net()
        optimizer = ec(module)
        data = batches()
        count = 0

        def term(m: nn.Module, x: Tensor) -> Tensor:  # in one step only, behind the first
            nonlocal count
            count += 1
            return hidden(m, x) if count == 3 else x.new_zeros(())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(module, optimizer, stop, term, data=data)
            if resume_at is not None:
                saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))
                module = net(6, 12, 8, 8, 3)
                optimizer = ec(module)
                module.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            train(module, optimizer, 12 - stop, term, data=data)
        return module, optimizer

    (module, optimizer), (other, resumed) = run(None), run(stop)
    assert optimizer.group.num_units == resumed.group.num_units == 20
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_copy_decides_alike() -> None:
    module = net()
    optimizer = ec(module)
    train(module, optimizer, 2)
    other, copied = copy.deepcopy((module, optimizer))
    for one, own in ((module, optimizer), (other, copied)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(one, own, 3, hidden)
        assert own.group.num_units == 20


def test_a_module_can_be_moved_by_swapping_its_parameters() -> None:
    """As sharded ones are moved; a weak reference to one of them, or to its gradient, would forbid it."""
    module, x = mlp(4, 8, 2), torch.randn(3, 4)
    torch.__future__.set_swap_module_params_on_conversion(True)
    gc.disable()  # which ends some weak references, at any time
    try:
        optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.03), scaling_group(module, x))
        for _ in range(2):
            module(x).square().sum().backward()
            optimizer.step()
            module.to("cpu")
    finally:
        gc.enable()
        torch.__future__.set_swap_module_params_on_conversion(False)
