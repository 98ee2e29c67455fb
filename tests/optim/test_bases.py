"""Every base optimizer, by both rules: against the definitions, in every precision, and as loops and users treat it."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_ecopt import EquivalentClassOptimizer, ScalingGroup, scaling_group
from lightning_ecopt.steps.skeleton import Skeleton
from lightning_ecopt.steps.state import entries_of
from tests.networks import mlp
from tests.optim.bases import (
    BASES,
    DEFINITIONS,
    FREE_START,
    Base,
    Definition,
    Lamb,
    Lion,
    Make,
    Orthogonal,
    ScheduleFree,
    UsersSGD,
    entries_of,
)
from tests.optim.training import (
    RULES,
    batches,
    distance,
    loss_of,
    only_refresh,
    same_bits,
    through_a_file,
    train,
    weights_of,
)
from tests.paths.explicit import place_of

EVERY_BASE = pytest.mark.parametrize("name", BASES)


def problem(base: Base, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network that the base can train, in general position, with batches of a regression."""
    torch.manual_seed(seed)
    module = mlp(4, 6, 5, 3, activation=nn.LeakyReLU, bias=not base.matrices).double()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1 + 0.3 * torch.randn_like(p))
    x = torch.randn(64, 4, dtype=torch.float64)
    return module.to(dtype), x.to(dtype), (x @ torch.randn(4, 3, dtype=torch.float64)).to(dtype)


def wrap(name: str, module: nn.Module, x: Tensor, rule: str, **options: Any) -> EquivalentClassOptimizer:
    """A base optimizer in the equivalent-class space of a module, without warnings of what it is known to have."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = BASES[name].make(list(module.parameters()))
        options = {"rule": rule, "refresh_interval": 3, **options}
        return EquivalentClassOptimizer(base, scaling_group(module, x), **options)


# The definition -------------------------------------------------------------------------------------------------------

CLIPPING = (None, "norm", "value")
VARIANTS = list(itertools.product(("path", "unit"), (torch.float64, torch.float32)))
#: Of every two of base, rule, precision, accumulation and clipping, each with each.
MATRIX = [
    (name, rule, dtype, 1 + (j + i // 3) % 2, CLIPPING[(i + j) % 3])
    for i, name in enumerate(BASES)
    for j, (rule, dtype) in enumerate(VARIANTS)
]
LIMIT = {"norm": 0.1, "value": 0.03}
MISSING = {0: "0.weight", 4: "2.weight"}
#: What is left between two ways to compute the same: some tens of roundings.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}


def clip_(gradients: list[Tensor], clipping: str | None) -> None:
    """By definition."""
    if clipping == "norm":
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
        for gradient in gradients:
            gradient.mul_(min(1.0, LIMIT["norm"] / (norm + 1e-6)))
    elif clipping == "value":
        for gradient in gradients:
            gradient.clamp_(-LIMIT["value"], LIMIT["value"])


def backward(module: nn.Module, parts: list[tuple[Tensor, Tensor]], clipping: str | None) -> None:
    """Accumulate and clip as a training loop does."""
    module.zero_grad()
    for x, y in parts:
        (loss_of(module, x, y) / len(parts)).backward()
    if clipping == "norm":
        nn.utils.clip_grad_norm_(module.parameters(), LIMIT["norm"])
    elif clipping == "value":
        nn.utils.clip_grad_value_(module.parameters(), LIMIT["value"])


def errors(
    base: Base,
    optimizer: EquivalentClassOptimizer,
    module: nn.Module,
    batches_of: Callable[[int], list[tuple[Tensor, Tensor]]],
    clipping: str | None = None,
    steps: int = 6,
) -> list[float]:
    """How far a run is from its definition after every step, relative to the largest weight.

    Gradients of some parameters are missing in the first step, and in one between two refreshes.
    """
    x = batches_of(0)[0][0]
    exact: Definition = DEFINITIONS[optimizer.rule](base, copy.deepcopy(module).double(), x.double())
    found = []
    for step in range(steps):
        parts = batches_of(step)
        backward(module, parts, clipping)
        gradients = exact.gradients([(a.double(), b.double()) for a, b in parts])
        before = copy.deepcopy(gradients)
        clip_(list(gradients.values()), clipping)
        assert (clipping is None) == all(torch.equal(before[name], gradients[name]) for name in before)
        if step in MISSING:
            module.get_parameter(MISSING[step]).grad = None
            del gradients[MISSING[step]]
        optimizer.step()
        exact.step(gradients, refresh=step % 3 == 0)
        found.append(error_of(module, exact))
    return found


def error_of(module: nn.Module, exact: Definition) -> float:
    """The largest difference of a weight, relative to the largest weight."""
    pairs = zip(weights_of(module).values(), exact.weights().values(), strict=True)
    largest = max(float(weight.abs().max()) for weight in exact.weights().values())
    return max(float((p.double() - weight).abs().max()) for p, weight in pairs) / largest


def test_the_matrix_has_every_pair() -> None:
    for first, second in itertools.combinations(zip(*MATRIX, strict=True), 2):
        assert len(set(zip(first, second, strict=True))) == len(set(first)) * len(set(second))


@pytest.mark.parametrize(("name", "rule", "dtype", "accumulation", "clipping"), MATRIX)
def test_a_run_is_that_of_the_definition(
    name: str, rule: str, dtype: torch.dtype, accumulation: int, clipping: str | None
) -> None:
    module, x, y = problem(BASES[name], dtype)
    start = copy.deepcopy(module)
    found = errors(
        BASES[name],
        wrap(name, module, x, rule, max_path_ratio=None, free_start=FREE_START),
        module,
        lambda step: [batches(x, y, accumulation * step + k) for k in range(accumulation)],
        clipping,
    )
    assert max(found) < BOUND[dtype]
    assert distance(start, module, x) > 1e-2


@RULES
def test_parameter_groups_with_options_of_their_own_are_those_of_the_definition(rule: str) -> None:
    def make(params: Iterable[Any]) -> Optimizer:
        first, *others = params
        return optim.SGD(
            [{"params": [first], "momentum": 0.8, "nesterov": True}, {"params": others, "lr": 0.02}],
            lr=0.05,
            weight_decay=0.01,
        )

    base = Base(make, {"momentum_buffer": 1})
    module, x, y = problem(base)
    optimizer = EquivalentClassOptimizer(
        make(module.parameters()), scaling_group(module, x), rule=rule, refresh_interval=3, max_path_ratio=None
    )
    assert max(errors(base, optimizer, module, lambda step: [batches(x, y, step)])) < BOUND[torch.float64]


# What a rescaling does to the state -----------------------------------------------------------------------------------


#: Steps that are as good as none, without decay, and nothing that is added to gradients.
STILL: dict[str, Make] = {
    "nesterov": lambda params: optim.SGD(params, lr=1e-12, momentum=0.9, nesterov=True),
    "adam": lambda params: optim.Adam(params, lr=1e-12, eps=0.0),
    "adamw": lambda params: optim.AdamW(params, lr=1e-12, weight_decay=0.0, amsgrad=True, eps=0.0),
    "nadam": lambda params: optim.NAdam(params, lr=1e-12, eps=0.0),
    "radam": lambda params: optim.RAdam(params, lr=1e-12, eps=0.0),
    "adamax": lambda params: optim.Adamax(params, lr=1e-12, eps=0.0),
    "adagrad": lambda params: optim.Adagrad(params, lr=1e-12, eps=0.0),
    "adadelta": lambda params: optim.Adadelta(params, lr=1e-12, eps=1e-30),
    "rmsprop": lambda params: optim.RMSprop(params, lr=1e-12, eps=0.0),
    "rmsprop_centered": lambda params: optim.RMSprop(params, lr=1e-12, eps=0.0, momentum=0.9, centered=True),
    "rprop": lambda params: optim.Rprop(params, lr=1e-12, step_sizes=(1e-13, 1e-11)),
    "asgd": lambda params: optim.ASGD(params, lr=1e-12, lambd=0.0, t0=1),
    "adafactor": lambda params: optim.Adafactor(params, lr=1e-12, eps=(1e-30, 1.0)),
    "lion": lambda params: Lion(params, lr=1e-12),
    "orthogonal": lambda params: Orthogonal(params, lr=1e-12),
    "lamb": lambda params: Lamb(params, lr=1e-12),
    "schedule_free": lambda params: ScheduleFree(params, lr=1e-12),
}
if "muon" in BASES:
    STILL["muon"] = lambda params: optim.Muon(params, lr=1e-12, weight_decay=0.0)


@pytest.mark.parametrize("name", STILL)
def test_larger_weights_divide_the_state_by_the_power_that_is_known_for_it(name: str) -> None:
    torch.manual_seed(0)
    shapes = [(3, 2)] if BASES[name].matrices else [(3, 2), (4,)]
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    factors = [torch.randn_like(weight).exp() for weight in weights]
    plain = [nn.Parameter(weight.clone()) for weight in weights]
    larger = [nn.Parameter(weight * factor) for weight, factor in zip(weights, factors, strict=True)]
    first, second = STILL[name](plain), STILL[name](larger)
    for _ in range(7):
        for p, q, factor in zip(plain, larger, factors, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad / factor
        first.step()
        second.step()
    powers = {}
    for number, factor in enumerate(factors):
        (ours, unknown), (theirs, _) = (
            entries_of(optimizer.state, {"p": params[number]}, {})
            for optimizer, params in ((first, plain), (second, larger))
        )
        assert not unknown
        for entry, moment in ours.items():
            powers[entry] = moment.degree
            assert bool((moment.tensors["p"] != 0).any())
            expected = moment.tensors["p"] / factor**moment.degree
            torch.testing.assert_close(theirs[entry].tensors["p"], expected, rtol=1e-7, atol=0)
        held = {
            entry for entry, value in first.state[plain[number]].items() if getattr(value, "shape", ()) == factor.shape
        }
        assert ours.keys() == held
    assert powers == BASES[name].powers


def test_every_base_with_a_state_is_among_those() -> None:
    held = {frozenset(base.powers) for base in BASES.values() if base.powers}
    assert held == {frozenset(BASES[name].powers) for name in STILL}


# The class alone ------------------------------------------------------------------------------------------------------


@RULES
@EVERY_BASE
def test_a_run_that_is_rescaled_at_the_start_and_on_the_way_ends_in_the_same_function(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name])
    other, start = copy.deepcopy(module), copy.deepcopy(module)
    for one in (module, other):
        optimizer = wrap(name, one, x, rule)
        group = optimizer.group
        assert group is not None
        rescale = one is other
        if rescale:
            group.act_(torch.randn(group.num_units, dtype=torch.float64))
            assert distance(start, other, x) < 1e-12
        train(one, optimizer, x, y, range(2))
        if rescale:
            log_scale = torch.randn(group.num_units, dtype=torch.float64)
            group.act_(log_scale)
            for entry, power in BASES[name].powers.items():
                held = {key: optimizer.state[p].get(entry) for key, p in one.named_parameters()}
                group.rescale_(held, log_scale, power=-power)
        optimizer.refresh()
        train(one, optimizer, x, y, range(2, 6))
    assert distance(module, other, x) < 1e-8
    assert distance(start, module, x) > 1e-2


# Checkpoints ----------------------------------------------------------------------------------------------------------


@RULES
@EVERY_BASE
def test_a_run_that_is_resumed_between_two_refreshes_has_the_same_bits(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name], torch.float32)
    optimizer = wrap(name, module, x, rule)
    train(module, optimizer, x, y, range(5))
    saved = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    other, plain = copy.deepcopy(module), copy.deepcopy(module)
    losses = train(module, optimizer, x, y, range(5, 8))

    other.load_state_dict(saved["module"])
    resumed = wrap(name, other, x, rule)
    resumed.load_state_dict(saved["optimizer"])
    assert train(other, resumed, x, y, range(5, 8)) == losses
    assert same_bits(module, other)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert optimizer.state.get(p, {}).keys() == resumed.state.get(q, {}).keys()
        for entry, value in optimizer.state.get(p, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[q][entry])), entry

    base = BASES[name].make(list(plain.parameters()))
    base.load_state_dict(saved["optimizer"])
    before = weights_of(plain)
    losses = train(plain, base, x, y, range(5, 8))
    assert all(torch.tensor(losses).isfinite())
    assert all(not torch.equal(p, before[key]) and bool(p.isfinite().all()) for key, p in plain.named_parameters())


@pytest.mark.parametrize("name", ["rmsprop_centered", "muon"])
def test_what_a_loaded_state_knows_of_gradients_does_not_depend_on_the_size_of_the_loss(name: str) -> None:
    """These have an entry of the name that SGD's momentum has, and another meaning."""
    if name not in BASES:
        pytest.skip("this torch has no Muon")
    runs = []
    for factor in (1.0, 2.0**-20):
        module, x, y = problem(BASES[name])
        base = BASES[name].make(list(module.parameters()))
        for options in base.param_groups:
            options["eps"] = 0.0
        for step in range(8):
            if step == 4:
                state = base.state_dict()
                base = EquivalentClassOptimizer(base, scaling_group(module, x))
                base.load_state_dict(state)
            base.zero_grad()
            (factor * loss_of(module, *batches(x, y, step))).backward()
            base.step()
        runs.append((module, base.statistics().clipped))
    assert runs[0][1] == runs[1][1]
    assert distance(runs[0][0], runs[1][0], x) < 1e-9


def test_an_average_of_weights_is_carried_whatever_has_been_read_of_the_state() -> None:
    """To look up the state of a parameter without one leaves an empty entry behind."""
    runs = []
    for read in (False, True):
        module, x, y = problem(BASES["asgd"])
        module[0].weight.requires_grad_(False)
        optimizer = wrap("asgd", module, x, "unit")
        if read:
            assert len(optimizer.state[module[0].weight]) == 0
        train(module, optimizer, x, y, range(5))
        runs.append([optimizer.state[p]["ax"] for p in module.parameters() if p.requires_grad])
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)


# Options --------------------------------------------------------------------------------------------------------------


def with_option(option: str) -> list[str]:
    """The bases that have it."""
    return [name for name in BASES if option in BASES[name].make([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]]


def run(
    make: Make, rule: str, options: Mapping[str, Any] | None = None, *, sign: float = 1.0, matrices: bool = False
) -> nn.Module:
    """A network after a few steps, with options of the base that are set afterwards."""
    module, x, y = problem(Base(make, matrices=matrices))
    base = make(list(module.parameters()))
    for group in base.param_groups:
        group.update(options or {})
    optimizer = EquivalentClassOptimizer(
        base, scaling_group(module, x), rule=rule, refresh_interval=3, state_powers={"row_var": 0, "col_var": 0}
    )
    for step in range(5):
        optimizer.zero_grad()
        (sign * loss_of(module, *batches(x, y, step))).backward()
        optimizer.step()
    return module


def assert_alike(first: nn.Module, second: nn.Module) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


@pytest.fixture
def rates_in_float64() -> Iterator[None]:
    """ASGD keeps its rate in a tensor of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def alternating(names: list[str]) -> list[tuple[str, str]]:
    return [(name, ("unit", "path")[number % 2]) for number, name in enumerate(names)]


@pytest.mark.usefixtures("rates_in_float64")
@pytest.mark.parametrize(("name", "rule"), alternating(with_option("foreach")))
def test_one_tensor_or_many_at_a_time_are_the_same(name: str, rule: str) -> None:
    assert_alike(*(run(BASES[name].make, rule, {"foreach": foreach}) for foreach in (True, False)))


@pytest.mark.parametrize(("name", "rule"), alternating(with_option("maximize")))
def test_maximizing_is_minimizing_the_opposite(name: str, rule: str) -> None:
    make, matrices = BASES[name].make, BASES[name].matrices
    opposite = run(make, rule, {"maximize": True}, sign=-1.0, matrices=matrices)
    assert_alike(run(make, rule, matrices=matrices), opposite)


@RULES
@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad])
def test_fused_steps_and_rates_in_tensors_are_the_same(kind: Any, rule: str) -> None:
    expected = run(lambda params: kind(params, lr=0.02, weight_decay=0.01), rule)
    assert_alike(run(lambda params: kind(params, lr=0.02, weight_decay=0.01, fused=True), rule), expected)
    rate = torch.tensor(0.02, dtype=torch.float64)
    assert_alike(run(lambda params: kind(params, lr=rate, weight_decay=0.01), rule), expected)


def failure(optimizer: Optimizer) -> tuple[type, str] | None:
    try:
        optimizer.step()
    except Exception as error:
        return type(error), str(error)
    return None


@RULES
def test_a_capturable_base_takes_its_steps_where_it_can_and_fails_as_it_does_elsewhere(rule: str) -> None:
    for name in ("adam", "nadam", "rmsprop_centered", "rprop", "asgd"):
        outcomes = []
        for wrapped in (False, True):
            module, x, y = problem(BASES[name])
            group = scaling_group(module, x)
            group.balance_()
            optimizer: Optimizer = BASES[name].make(list(module.parameters()))
            optimizer.param_groups[0]["capturable"] = True
            if wrapped:
                optimizer = EquivalentClassOptimizer(optimizer, group, rule=rule)
            before = weights_of(module)
            loss_of(module, x, y).backward()
            outcomes.append(failure(optimizer))
            for key, p in module.named_parameters():
                if outcomes[-1] is None:
                    assert not torch.equal(p, before[key])
                else:
                    torch.testing.assert_close(p.detach(), before[key], rtol=1e-13, atol=0)
        assert outcomes[0] == outcomes[1]


@RULES
def test_gradients_may_be_cleared_to_zeros(rule: str) -> None:
    modules = []
    for set_to_none in (True, False):
        module, x, y = problem(BASES["adam"])
        optimizer = wrap("adam", module, x, rule)
        for step in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(module, *batches(x, y, step)).backward()
            optimizer.step()
        modules.append(module)
    assert same_bits(*modules)


# Parameters come and go -----------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("name", ["nesterov", "adamw", "asgd"])
def test_units_are_found_again_for_the_parameters_of_an_added_group(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name])
    other = copy.deepcopy(module)
    group = scaling_group(other, x)
    log_scale = torch.zeros(11, dtype=torch.float64)
    log_scale[group.couplings[0].incoming.flatten()] = torch.randn(6, dtype=torch.float64)
    group.act_(log_scale)  # of what may be rescaled before the last layer is trained
    frozen = weights_of(module[4])
    for one in (module, other):
        one[4].requires_grad_(False)
        base = BASES[name].make([*one[0].parameters(), *one[2].parameters()])
        optimizer = EquivalentClassOptimizer(
            base, lambda params, one=one: scaling_group(one, x, parameters=params), rule=rule
        )
        train(one, optimizer, x, y, range(3))
        assert optimizer.group.num_units == 6
        assert all(torch.equal(p, frozen[key]) for key, p in one[4].named_parameters())
        held = {
            key: {e: v.clone() for e, (_, v) in entries_of(BASES[name], base, p).items()}
            for key, p in one.named_parameters()
        }
        one[4].requires_grad_(True)
        optimizer.add_param_group({"params": list(one[4].parameters())})
        assert optimizer.group.num_units == 11
        only_refresh(optimizer)
        assert int(optimizer.usable_units().sum()) == 11
        for key, entries in held.items():
            for entry, value in entries.items():
                now = base.state[one.get_parameter(key)][entry]
                assert int((now != 0).sum()) >= int((value != 0).sum()) // 2, (key, entry)
        train(one, optimizer, x, y, range(3, 8))
        assert all(not torch.equal(p, frozen[key]) for key, p in one[4].named_parameters())
    assert distance(module, other, x) < 1e-9


@RULES
@pytest.mark.parametrize("kind", ["generator", "named", "one"])
def test_a_group_is_added_in_every_form_that_the_base_takes(kind: str, rule: str) -> None:
    module, x, y = problem(BASES["adam"])
    others = [p for name, p in module.named_parameters() if name != "4.weight"]
    named = [(name, p) for name, p in module.named_parameters() if name != "4.weight"]
    base = optim.AdamW(named if kind == "named" else others, lr=0.01)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule)
    train(module, optimizer, x, y, range(2))
    last = module[4].weight
    forms = {"generator": (p for p in [last]), "named": [("4.weight", last)], "one": last}
    optimizer.add_param_group({"params": forms[kind], "lr": 0.02})
    assert [len(options["params"]) for options in optimizer.param_groups] == [5, 1]
    before = last.detach().clone()
    train(module, optimizer, x, y, range(2, 4))
    assert not torch.equal(last, before)
    assert int(optimizer.usable_units().sum()) == 11


@RULES
def test_units_are_found_again_at_a_refresh_when_parameters_of_the_optimizer_thaw(rule: str) -> None:
    module, x, y = problem(BASES["adam"])
    module[0].requires_grad_(False)
    asked: list[int] = []

    def find(params: Sequence[Tensor]) -> ScalingGroup:
        asked.append(len(params))
        return scaling_group(module, x, parameters=params)

    optimizer = EquivalentClassOptimizer(
        BASES["adam"].make(list(module.parameters())), find, rule=rule, refresh_interval=3
    )
    train(module, optimizer, x, y, range(4))
    assert asked == [4]
    assert optimizer.group.num_units == 5
    module[0].requires_grad_(True)
    train(module, optimizer, x, y, range(4, 6))
    assert optimizer.group.num_units == 5
    train(module, optimizer, x, y, range(6, 8))
    assert asked == [4, 6]
    assert optimizer.group.num_units == 11


@EVERY_BASE
def test_fixed_skeleton_weights_are_moved_by_nothing(name: str) -> None:
    module, x, y = problem(BASES[name])
    optimizer = wrap(name, module, x, "path", refresh_interval=None)
    for options in optimizer.param_groups:
        if "weight_decay" in options:
            options["weight_decay"] = 0.5
    train(module, optimizer, x, y, range(1))
    skeleton = Skeleton.from_state_dict(optimizer.state_dict()["equivalent_class"]["skeleton"])
    places = [
        place_of(optimizer.group, int(skeleton.fixed_coupling[unit]), int(skeleton.fixed_index[unit]))
        for unit in range(11)
    ]
    before = weights_of(module)
    train(module, optimizer, x, y, range(1, 5))
    for key, index in places:
        assert torch.equal(module.get_parameter(key)[index], before[key][index])
    for key, p in module.named_parameters():
        fixed = torch.zeros(p.shape, dtype=torch.bool)
        for other, index in places:
            if other == key:
                fixed[index] = True
        assert bool((p != before[key])[~fixed].all())


# Hooks and attributes -------------------------------------------------------------------------------------------------


@RULES
@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_steps_see_weights_and_gradients_once_and_can_be_removed(rule: str, early: bool) -> None:
    module, x, y = problem(BASES["nesterov"])
    scaling_group(module, x).balance_()
    base = BASES["nesterov"].make(list(module.parameters()))
    seen: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = []

    def hook(kind: str) -> Callable[..., None]:
        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            seen.append((kind, weights_of(module), gradients))

        return note

    def register(optimizer: Optimizer) -> list[Any]:
        return [
            optimizer.register_step_pre_hook(hook("before")),
            optimizer.register_step_post_hook(hook("after")),
        ]

    handles = register(base) if early else []
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=None)
    handles = handles or register(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(module, *batches(x, y, step)).backward()
        weights = weights_of(module)
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
        assert [kind for kind, _, _ in seen] == ["before", "after"]
        for (_, held, shown), expected in zip(seen, (weights, weights_of(module)), strict=True):
            for name in gradients:
                torch.testing.assert_close(held[name], expected[name], rtol=0, atol=0)
                torch.testing.assert_close(shown[name], gradients[name], rtol=1e-12, atol=0)
        seen.clear()
    for handle in handles:
        handle.remove()
    train(module, optimizer, x, y, range(3, 5))
    assert seen == []


@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_checkpoints_run(early: bool) -> None:
    module, x, y = problem(BASES["adam"])
    base = BASES["adam"].make(list(module.parameters()))
    calls: list[str] = []

    def register(optimizer: Optimizer) -> None:
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
        optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append(f"loading {state.get('note')}"))
        optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))

    if early:
        register(base)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x))
    if not early:
        register(optimizer)
    train(module, optimizer, x, y, range(2))
    state = optimizer.state_dict()
    assert calls == ["saving"]
    assert state["note"] == 1
    assert "equivalent_class" in state
    optimizer.load_state_dict(state)
    assert calls == ["saving", "loading 1", "loaded"]


@RULES
def test_a_schedule_free_optimizer_is_evaluated_at_its_average_as_by_definition(rule: str) -> None:
    base = BASES["schedule_free"]
    module, x, y = problem(base)
    optimizer = wrap("schedule_free", module, x, rule, max_path_ratio=None)
    exact = DEFINITIONS[rule](base, module, x)
    for step in range(5):
        backward(module, [batches(x, y, step)], None)
        exact.step(exact.gradients([batches(x, y, step)]), refresh=step % 3 == 0)
        optimizer.step()
    trained = weights_of(module)
    optimizer.eval()
    exact.optimizer.eval()
    exact.allocate()
    assert error_of(module, exact) < 1e-12
    assert max(float((p - trained[key]).abs().max()) for key, p in weights_of(module).items()) > 1e-3
    optimizer.train()
    for key, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), trained[key], rtol=1e-11, atol=1e-13)


@RULES
def test_a_run_that_is_saved_at_its_average_goes_on_as_if_it_had_not_been(rule: str) -> None:
    module, x, y = problem(BASES["schedule_free"])
    optimizer = wrap("schedule_free", module, x, rule)
    train(module, optimizer, x, y, range(5))
    other = copy.deepcopy(module)
    optimizer.eval()
    saved = through_a_file({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.train()
    train(module, optimizer, x, y, range(5, 8))

    other.load_state_dict(saved["module"])
    resumed = wrap("schedule_free", other, x, rule)
    resumed.load_state_dict(saved["optimizer"])
    resumed.train()
    train(other, resumed, x, y, range(5, 8))
    assert_alike(module, other)


def test_what_no_optimizer_has_is_missing_from_ours_too() -> None:
    module, x, _ = problem(BASES["sgd"])
    optimizer = wrap("sgd", module, x, "unit")
    assert not hasattr(optimizer, "train")
    with pytest.raises(AttributeError):
        optimizer.warmup  # noqa: B018


class Velocity(UsersSGD):
    """Keeps its last gradient under a name of its own, and the largest in each row."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for options in self.param_groups:
            for p in options["params"]:
                if p.grad is not None:
                    self.state[p]["velocity"] = p.grad.clone()
                    self.state[p]["largest"] = p.grad.abs().amax(-1)
                    self.state[p]["count"] = torch.tensor(1.0)
        super().step(closure)


@RULES
def test_an_entry_of_the_state_that_nobody_knows_is_named_once(rule: str) -> None:
    module, x, y = problem(BASES["sgd"])
    optimizer = EquivalentClassOptimizer(
        Velocity(module.parameters(), lr=0.01), scaling_group(module, x), rule=rule, refresh_interval=2
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(module, optimizer, x, y, range(6))
        optimizer.state_dict()
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1
    assert "largest, velocity in the state of Velocity" in texts[0]
    assert "state_powers=" in texts[0]


@RULES
def test_an_entry_of_the_state_whose_power_is_told_is_carried_without_a_word(rule: str) -> None:
    module, x, y = problem(BASES["sgd"])
    group = scaling_group(module, x)
    optimizer = EquivalentClassOptimizer(
        Velocity(module.parameters(), lr=0.01), group, rule=rule, state_powers={"velocity": 1, "largest": 0}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module, optimizer, x, y, range(2))
        held = {key: optimizer.state[p]["velocity"].clone() for key, p in module.named_parameters()}
        before = weights_of(module)
        group.act_(torch.randn(11, dtype=torch.float64))
        drawn = weights_of(module)
        only_refresh(optimizer)
    assert any(not torch.allclose(drawn[key], before[key], rtol=0.1) for key in drawn)
    if rule == "unit":
        for key, p in module.named_parameters():
            expected = held[key] * drawn[key] / p.detach()
            torch.testing.assert_close(optimizer.state[p]["velocity"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("powers", [{"velocity": 3}, {"velocity": 1.0}, {"velocity": True}, {"velocity": "1"}])
def test_powers_out_of_range_are_errors(powers: Any) -> None:
    module, x, _ = problem(BASES["sgd"])
    with pytest.raises(ValueError, match="state_powers must be whole numbers from -2 to 2"):
        EquivalentClassOptimizer(UsersSGD(module.parameters(), lr=0.1), scaling_group(module, x), state_powers=powers)


# Low precision --------------------------------------------------------------------------------------------------------

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
#: An eps that float16 can hold: with the usual one the plain optimizers divide zero by zero there.
QUIET: dict[str, Make] = {
    "sgd": lambda params: optim.SGD(params, lr=0.05),
    "adam": lambda params: optim.Adam(params, lr=0.01, eps=1e-3),
    "adamw": lambda params: optim.AdamW(params, lr=0.01, eps=1e-3, weight_decay=0.0),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.01, eps=1e-3),
}


@LOW
@RULES
@pytest.mark.parametrize("name", QUIET)
def test_weights_of_half_precision_do_not_drift_where_gradients_are_zero(
    name: str, rule: str, dtype: torch.dtype
) -> None:
    module, x, y = problem(Base(QUIET[name]), dtype)
    base = QUIET[name](module.parameters())
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=None)
    train(module, optimizer, x, y, range(4))  # so that no path, and no unit, has a scale of one
    for p in module.parameters():
        p.grad.zero_()
        if "exp_avg" in base.state[p]:
            base.state[p]["exp_avg"].zero_()
    before = copy.deepcopy(module)
    for _ in range(100):
        optimizer.step()
    assert same_bits(module, before)


def displacement(make: Make, rule: str | None, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Where weight matrices start, and how far they move in steps of about two units in the last place of bfloat16."""
    module, x, _ = problem(Base(make), torch.bfloat16, seed)
    module, x = module.to(dtype), x.to(dtype)
    optimizer: Optimizer = make(module.parameters())
    if rule is not None:
        group = scaling_group(module, x)
        optimizer = EquivalentClassOptimizer(
            optimizer, group, rule=rule, refresh_interval=None, representative="current"
        )

    def flat() -> Tensor:
        return torch.cat([p.double().flatten() for p in weights_of(module).values() if p.ndim == 2])

    start = flat()
    torch.manual_seed(seed)
    means = [torch.randn(p.shape) for p in module.parameters()]
    for _ in range(20):
        for p, mean in zip(module.parameters(), means, strict=True):
            p.grad = (mean + 0.3 * torch.randn(p.shape)).bfloat16().to(dtype)
        optimizer.step()
    return start, flat() - start


@pytest.mark.parametrize(
    ("rule", "make", "same_length"),
    [
        ("path", lambda params: optim.SGD(params, lr=0.002), lambda params: optim.SGD(params, lr=0.002)),
        ("unit", lambda params: optim.SGD(params, lr=0.01), lambda params: optim.SGD(params, lr=0.002)),
        ("path", lambda params: optim.Adam(params, lr=0.002), lambda params: optim.Adam(params, lr=0.002)),
        ("unit", lambda params: optim.Adam(params, lr=0.002), lambda params: optim.Adam(params, lr=0.002)),
    ],
)
def test_small_steps_in_bfloat16_go_where_they_go_in_float64(rule: str, make: Make, same_length: Make) -> None:
    """As well as those of the plain base, that round weights once where ours round three times; to neither side."""

    def compare(kind: Make, chosen: str | None) -> tuple[float, float, float]:
        pairs = [
            (displacement(kind, chosen, torch.bfloat16, seed), displacement(kind, chosen, torch.float64, seed)[1])
            for seed in range(2)
        ]
        start = torch.cat([at for (at, _), _ in pairs])
        exact = torch.cat([way for _, way in pairs])
        off = torch.cat([way for (_, way), _ in pairs]) - exact
        size = exact.abs().mean()
        return tuple(float(value.mean() / size) for value in (off.abs(), off * exact.sign(), off * start.sign()))

    error, along, outward = compare(make, rule)
    assert error < 3 * compare(same_length, None)[0]
    assert abs(along) < 0.08
    assert abs(outward) < 0.08


def everything(module: nn.Module, optimizer: EquivalentClassOptimizer) -> Any:
    return copy.deepcopy((module.state_dict(), optimizer.state_dict()))


def assert_same(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(first, second) if isinstance(first, Tensor) else first == second


@RULES
@pytest.mark.parametrize("name", ["nesterov", "adamw", "asgd", "rprop"])
def test_a_step_that_a_scaler_skips_changes_no_bit(name: str, rule: str) -> None:
    module, x, y = problem(BASES[name], torch.float32)
    optimizer = wrap(name, module, x, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipped = 0
    for step in range(9):
        optimizer.zero_grad()
        scaler.scale(loss_of(module, *batches(x, y, step))).backward()
        bad = step in (0, 3, 5)  # before the first step, when a refresh is due, and between two
        if bad:
            module[2].weight.grad[1, 2] = torch.inf
        before, scale = everything(module, optimizer), scaler.get_scale()
        if step % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            assert_same(before, everything(module, optimizer))
            skipped += 1
        else:
            assert not torch.equal(module[0].weight, before[0]["0.weight"])
    assert skipped == 3


@RULES
@pytest.mark.parametrize("name", ["nesterov", "adamw", "fused", "asgd"])
def test_a_scaler_that_skips_no_step_makes_no_difference(name: str, rule: str) -> None:
    modules = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), None):
        module, x, y = problem(BASES["adam"], torch.float32)
        if name == "fused":  # the plain optimizer unscales gradients itself
            base = optim.AdamW(module.parameters(), lr=0.01, fused=True)
            optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=3)
        else:
            optimizer = wrap(name, module, x, rule)
        for step in range(6):
            optimizer.zero_grad()
            loss = loss_of(module, *batches(x, y, step))
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None and step % 2:
                scaler.unscale_(optimizer)
            if step % 2:
                nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        modules.append(module)
    for p, q in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@RULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_under_autocast_weights_of_float32_move_as_by_definition(name: str, dtype: torch.dtype, rule: str) -> None:
    module, x, y = problem(BASES[name], torch.float32)
    optimizer = wrap(name, module, x, rule, max_path_ratio=None)
    exact = DEFINITIONS[rule](BASES[name], copy.deepcopy(module).double(), x.double())
    for step in range(5):
        optimizer.zero_grad()
        rows, targets = batches(x, y, step)
        with torch.autocast("cpu", dtype=dtype):
            output = module(rows)
        assert output.dtype == dtype
        (output.float() - targets).square().mean().backward()
        gradients = {key: p.grad.double() for key, p in module.named_parameters()}
        optimizer.step()
        exact.step(gradients, refresh=step % 3 == 0)
        assert error_of(module, exact) < BOUND[torch.float32]
        assert all(p.dtype == torch.float32 for p in module.parameters())


# Sparse gradients -----------------------------------------------------------------------------------------------------


def with_embedding() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(7, 4, sparse=True), *mlp(4, 6, 3)).double()
    return module, torch.randint(0, 7, (64,)), torch.randn(64, 3, dtype=torch.float64)


@RULES
@pytest.mark.parametrize("kind", ["one_group", "two_groups"])
def test_an_embedding_with_sparse_gradients_takes_the_steps_of_the_plain_base(kind: str, rule: str) -> None:
    module, x, y = with_embedding()
    groups = {
        "one_group": list(module.parameters()),
        "two_groups": [{"params": [module[0].weight], "lr": 0.1}, {"params": list(module[1:].parameters())}],
    }
    base = optim.SGD(groups[kind], lr=0.1)
    optimizer = EquivalentClassOptimizer(base, scaling_group(module, x), rule=rule, refresh_interval=3)
    assert optimizer.group.num_units == 6
    for step in range(7):
        optimizer.zero_grad()
        loss_of(module, *batches(x, y, step)).backward()
        gradient = module[0].weight.grad
        assert gradient.is_sparse
        expected = nn.Parameter(module[0].weight.detach().clone())
        expected.grad = gradient.clone()
        optim.SGD([expected], lr=0.1).step()
        hidden = module[1].weight.detach().clone()
        optimizer.step()
        assert torch.equal(module[0].weight, expected)
        assert module[0].weight.grad is gradient
        assert not torch.equal(module[1].weight, hidden)


@RULES
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_embedding_may_have_sparse_adam_beside_the_optimizer_of_the_rest(wrapped: bool, rule: str) -> None:
    module, x, y = with_embedding()
    scaling_group(module, x).balance_()
    twin = nn.Parameter(module[0].weight.detach().clone())
    plain = optim.SparseAdam([twin], lr=0.05)
    sparse: Optimizer = optim.SparseAdam([module[0].weight], lr=0.05)
    if wrapped:
        sparse = EquivalentClassOptimizer(sparse, scaling_group(module, x), rule=rule, refresh_interval=2)
    rest = EquivalentClassOptimizer(
        optim.AdamW(module[1:].parameters(), lr=0.01), scaling_group(module, x), rule=rule, refresh_interval=3
    )
    for step in range(5):
        module.zero_grad()
        loss_of(module, *batches(x, y, step)).backward()
        twin.grad = module[0].weight.grad.clone()
        before = weights_of(module)
        for optimizer in (sparse, rest, plain):
            optimizer.step()
        assert torch.equal(module[0].weight, twin)
        assert all(not torch.equal(p, before[key]) for key, p in module.named_parameters())
    assert int(rest.usable_units().sum()) == 6
