"""A training step is watched to its end: whatever its losses read is held fixed, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim import optimizer as of_all
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_sgd, scaling_group
from lightning_ecopt.symmetry import GroupFromNextCall, ScalingGroup, threads
from lightning_ecopt.symmetry.trace import select_parameters, trace
from tests.networks import mlp
from tests.selection import few
from tests.symmetry.helpers import assert_complete, directions

Loss = Callable[[Any, Tensor], Tensor]
Y = torch.arange(6) % 3


@pytest.fixture(autouse=True)
def nothing_is_left(few_objects: None) -> Iterator[None]:
    run = torch.autograd._engine_run_backward
    yield
    assert torch.autograd._engine_run_backward is run
    assert not of_all._global_optimizer_pre_hooks
    assert not of_all._global_optimizer_post_hooks
    assert not _get_current_dispatch_mode_stack()
    assert not threads.here.entries
    assert not threads.here.begun


class Parts(nn.Module):
    """A classifier, a generator and a discriminator; ``forward`` computes all losses."""

    def __init__(self, losses: Sequence[Loss]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = nn.Sequential(*mlp(4, 6, 5), nn.LeakyReLU(0.2)), nn.Linear(5, 3)
        self.G, self.D = mlp(2, 5, 4), nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 5), nn.ReLU())
        self.judge = nn.Linear(5, 1)
        self.losses = losses
        self.automatic_optimization = True

    def forward(self, x: Tensor) -> Any:
        return [loss(self, x) for loss in self.losses]

    def training_step(self, x: Tensor) -> Tensor:
        return sum(self(x), torch.zeros(()))


def classify(m: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(m.head(m.encoder(x)), Y)


def functional(m: Any, x: Tensor) -> Tensor:
    own = {name: p.abs() if name == "0.weight" else p for name, p in m.encoder.named_parameters()}
    return F.cross_entropy(m.head(functional_call(m.encoder, own, (x,))), Y)


def noise(x: Tensor) -> Tensor:
    return x[:, :2].cos()


def discriminate(m: Any, x: Tensor) -> Tensor:
    return F.softplus(m.judge(m.D(m.G(noise(x)).detach()))).mean() - m.judge(m.D(x)).mean()


def generate(m: Any, x: Tensor) -> Tensor:
    return F.softplus(-m.judge(m.D(m.G(noise(x))))).mean()


def match(m: Any, x: Tensor) -> Tensor:
    return F.mse_loss(m.D(m.G(noise(x))), m.D(x))


def slope(m: Any, x: Tensor) -> Tensor:
    x = torch.lerp(x, m.G(noise(x)).detach(), 0.3).requires_grad_()
    (g,) = torch.autograd.grad(m.judge(m.D(x)).sum(), x, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean()


def reweighted(m: Any, x: Tensor) -> Tensor:
    loss = classify(m, x)
    (g,) = torch.autograd.grad(loss, m.head.weight, retain_graph=True)
    return loss * (1 + g.norm())


#: Losses, and how many units remain in (encoder, G, D) of 11, 5 and 11.
FACES: dict[str, tuple[list[Loss], tuple[int, int, int]]] = {
    "forward": ([classify, generate, discriminate], (11, 5, 11)),
    "loss on hidden features": ([classify, lambda m, x: F.mse_loss(m.encoder(x), x[:, :1].expand(6, 5))], (6, 0, 0)),
    "loss on some hidden features": ([classify, lambda m, x: m.encoder(x)[:, 1:3].square().sum()], (9, 0, 0)),
    "loss on the first layer": ([lambda m, x: m.encoder[:2](x).exp().mean(), classify], (5, 0, 0)),
    "penalty on one weight": ([classify, lambda m, x: m.encoder[2].weight.abs().sum()], (1, 0, 0)),
    "penalty on a bias": ([lambda m, x: m.encoder[0].bias.square().sum(), classify], (5, 0, 0)),
    "penalty on all weights of a part": (
        [classify, discriminate, lambda m, x: sum(p.square().sum() for p in m.D.parameters())],
        (11, 5, 0),
    ),
    "orthogonal columns": ([classify, lambda m, x: (m.head.weight.T @ m.head.weight - torch.eye(5)).norm()], (6, 0, 0)),
    "call with other parameters": ([functional], (11, 0, 0)),
    "weight outside of its module": ([classify, lambda m, x: F.linear(x, m.encoder[0].weight).exp().mean()], (5, 0, 0)),
    "weight in another place": (
        [lambda m, x: F.linear(F.linear(x, m.encoder[0].weight).relu(), m.encoder[2].weight).relu().square().mean()],
        (6, 0, 0),
    ),
    "feature matching": ([discriminate, match], (0, 5, 6)),
    "feature matching of both layers": (
        [discriminate, match, lambda m, x: F.l1_loss(m.D[:2](m.G(noise(x))), m.D[:2](x))],
        (0, 5, 0),
    ),
    "perceptual loss of a frozen part": (
        [classify, lambda m, x: m.head(m.encoder(m.G(noise(x)))).exp().mean()],
        (11, 5, 0),
    ),
    "weight by the norm of a gradient": ([reweighted], (6, 0, 0)),
}


def units(group: ScalingGroup) -> tuple[int, int, int]:
    """How many units have incoming weights in the encoder, the generator and the discriminator."""
    return tuple(  # type: ignore[return-value]
        sum(
            any(name.startswith(part) and power > 0 for name, power in s.powers) * len(s.units)
            for s in group.unit_sets()
        )
        for part in ("encoder", "G", "D")
    )


def watched(module: nn.Module, x: Tensor) -> ScalingGroup:
    pending = GroupFromNextCall(module, "training_step")
    module.training_step(x)
    assert pending.group is not None
    pending.cancel()
    return pending.group


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FACES)
def test_what_a_loss_reads_is_held_fixed(name: str) -> None:
    losses, expected = FACES[name]
    group = watched(Parts(losses), X)
    assert units(group) == expected
    assert group.fingerprint() == scaling_group(Parts(losses), X).fingerprint()


@pytest.mark.parametrize("name", few(list(FACES), ["feature matching", "penalty on one weight"]))
def test_the_units_are_all_freedoms_of_the_losses(name: str) -> None:
    if name != "weight by the norm of a gradient":  # whose loss is no function of weights alone
        assert_complete(
            Parts(FACES[name][0]).double(), lambda g, size: (size * torch.randn(6, 4, generator=g).double(),)
        )


# Manual optimization --------------------------------------------------------------------------------------------------


def by_method(loss: Tensor, parameters: list[Tensor]) -> None:
    loss.backward()


def by_function(loss: Tensor, parameters: list[Tensor]) -> None:
    torch.autograd.backward(loss)


def by_list(loss: Tensor, parameters: list[Tensor]) -> None:
    torch.autograd.backward([loss, 2 * loss], [torch.ones(()), torch.ones(())])


def by_hand(loss: Tensor, parameters: list[Tensor]) -> None:
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        p.grad = gradient


def by_edge(loss: Tensor, parameters: list[Tensor]) -> None:
    torch.autograd.backward((torch.autograd.graph.get_gradient_edge(loss),), (torch.ones(()),))


def with_graph(loss: Tensor, parameters: list[Tensor]) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


class Manual(Parts):
    """One backward pass and one step of an optimizer for each loss; what is computed in between is new each time."""

    def __init__(self, losses: Sequence[Loss], backward: Any = by_method, make: Any = None) -> None:
        super().__init__(losses)
        self.automatic_optimization, self.backward = False, backward
        make = make or (lambda parameters: SGD(parameters, lr=0.1, weight_decay=0.1, momentum=0.9))
        self.optimizers = [make(list(self.parameters())) for _ in losses]

    def training_step(self, x: Tensor) -> None:  # type: ignore[override]
        for loss, optimizer in zip(self.losses, self.optimizers, strict=True):
            optimizer.zero_grad()
            self.backward(loss(self, x), list(self.parameters()))
            optimizer.step()


@pytest.mark.parametrize("name", FACES)
def test_it_is_watched_through_backward_passes_and_steps(name: str) -> None:
    losses, _ = FACES[name]
    module = Manual(losses)
    before = [p.detach().clone() for p in module.parameters()]
    group = watched(module, X)
    assert group.fingerprint() == scaling_group(Parts(losses), X).fingerprint()
    plain = Manual(losses)
    plain.training_step(X)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("backward", [by_function, by_list, by_hand, by_edge, with_graph])
def test_a_backward_pass_may_be_begun_in_any_way(backward: Any) -> None:
    losses, expected = FACES["feature matching"]
    group = watched(Manual(losses, backward), X)
    # Of an edge of the graph nobody can tell the tensor, so all that it comes from is held fixed.
    assert units(group) == ((0, 0, 0) if backward is by_edge else expected)


@pytest.mark.parametrize("losses", [[slope], [classify, slope], [classify, slope, discriminate]])
def test_a_penalty_on_slopes_is_part_of_the_loss(losses: list[Loss]) -> None:
    expected = scaling_group(Parts(losses), X)
    for module in (Parts(losses), Manual(losses)):
        assert watched(module, X).fingerprint() == expected.fingerprint()


class TwoPhases(SGD):
    """Moves weights up and down again, as SAM does."""

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for p in self.param_groups[0]["params"] if p.grad is not None]).norm()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.state[p]["old"] = p.data.clone()
                p.add_(p.abs() * p.grad * 0.05 / (norm + 1e-12))

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data = self.state[p]["old"]
        self.step()


class Sharp(Manual):
    def training_step(self, x: Tensor) -> None:
        optimizer = TwoPhases(self.parameters(), lr=0.1)
        for phase in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            sum(loss(self, x) for loss in self.losses).backward()
            phase()


class Closures(Manual):
    def training_step(self, x: Tensor) -> None:
        for loss, optimizer in zip(self.losses, self.optimizers, strict=True):

            def closure(loss: Any = loss, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                value = loss(self, x)
                value.backward()
                return value

            optimizer.step(closure)


def lbfgs(parameters: list[Tensor]) -> Optimizer:
    return LBFGS(parameters, max_iter=3, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("name", few(list(FACES), ["forward", "penalty on one weight", "feature matching"]))
@pytest.mark.parametrize("kind", [Sharp, Closures, lambda losses: Closures(losses, make=lbfgs)])
def test_steps_of_any_optimizer_say_nothing_and_their_closures_all(kind: Any, name: str) -> None:
    losses, expected = FACES[name]
    assert units(watched(kind(losses), X)) == expected


class Looks(Manual):
    """Does with gradients what people do."""

    def training_step(self, x: Tensor) -> None:
        norms, optimizer = [], self.optimizers[0]
        for loss in self.losses:
            self.D.requires_grad_(loss is not generate)
            loss(self, x).backward()
            self.D.requires_grad_(True)
        own = [p for p in self.parameters() if p.grad is not None]
        norms = [p.grad.norm() / (1e-6 + p.grad.abs().max()) for p in own]
        total = torch.stack(norms).mean()
        if nn.utils.clip_grad_norm_(own, 0.1) > 10 or total.item() < 0:
            return
        nn.utils.clip_grad_value_(own, 0.1)
        for p in own:
            p.grad.mul_(0.5).clamp_(-1, 1)
            p.grad = torch.where(p.grad.isfinite(), p.grad, 0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def test_what_is_done_with_gradients_costs_nothing() -> None:
    losses, expected = FACES["forward"]
    assert units(watched(Looks(losses), X)) == expected


def twice(m: Any, x: Tensor) -> Tensor:
    classify(m, x).backward()
    return classify(m, x) * (1 + m.head.weight.grad.square().sum())


def along(m: Any, x: Tensor) -> Tensor:
    classify(m, x).backward()
    return classify(m, x) + (m.encoder[0].weight.grad[1] * 3).abs().sum()


def at_the_input(m: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    classify(m, x).backward()
    return classify(m, x.detach() + 0.1 * x.grad)


def at_hidden_values(m: Any, x: Tensor) -> Tensor:
    h = m.encoder(x).detach().requires_grad_()
    F.cross_entropy(m.head(h), Y).backward()
    return classify(m, x) + h.grad[:, 0].exp().mean()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(twice, (6, 0, 0)), (along, (5, 0, 0)), (at_the_input, (11, 0, 0)), (at_hidden_values, (10, 0, 0))],
)
def test_a_gradient_that_gets_into_a_loss_holds_fixed_what_it_depends_on(loss: Loss, expected: tuple[int, ...]) -> None:
    assert units(watched(Manual([classify, loss]), X)) == expected


class Keeps(Manual):
    """Uses values of before a step after it."""

    def __init__(self, keeps: bool) -> None:
        super().__init__([classify])
        self.keeps = keeps

    def training_step(self, x: Tensor) -> None:
        h = self.encoder(x)
        F.cross_entropy(self.head(h), Y).backward()
        self.optimizer.step()
        h = h if self.keeps else self.encoder(x)
        F.cross_entropy(self.head(h.detach()), Y).backward()
        self.optimizer.step()


@pytest.mark.parametrize("keeps", [False, True])
def test_what_is_older_than_a_step_of_ours_is_held_fixed(keeps: bool) -> None:
    module = Keeps(keeps)
    pending = GroupFromNextCall(module, "training_step")
    module.optimizer = EquivalentClassOptimizer(SGD(module.parameters(), lr=0.1), pending)
    module.training_step(X)
    assert pending.group is not None
    assert units(pending.group) == ((6, 0, 0) if keeps else (11, 0, 0))
    pending.cancel()


# What may go wrong ----------------------------------------------------------------------------------------------------


class Fails(Manual):
    def training_step(self, x: Tensor) -> None:
        self.count = getattr(self, "count", 0) + 1
        optimizer = self.optimizers[0]
        if self.count == 1:
            return  # skips the batch
        classify(self, x).backward()
        if self.count == 2:
            raise KeyError("its own")

        def failing(*_: Any) -> None:
            raise ValueError("a hook")

        handle = optimizer.register_step_pre_hook(failing)
        try:
            if self.count == 3:
                with pytest.raises(ValueError, match="a hook"):
                    optimizer.step()
        finally:
            handle.remove()
        optimizer.step()


def test_the_next_step_is_watched_if_one_is_skipped_or_fails() -> None:
    module = Fails([classify])
    pending = GroupFromNextCall(module, "training_step")
    module.training_step(X)
    with pytest.raises(KeyError, match="its own"):
        module.training_step(X)
    assert pending.group is None
    module.count = 3
    module.training_step(X)
    assert pending.group is not None
    assert units(pending.group) == (11, 0, 0)
    pending.cancel()


def test_all_is_held_fixed_if_a_step_fails_and_nobody_says_when_it_was_over() -> None:
    module = Fails([classify])
    module.count = 2
    assert watched(module, X).num_units == 0


class Alternates(Manual):
    """Trains one part in even, another in odd steps."""

    def training_step(self, x: Tensor) -> None:
        self.count = getattr(self, "count", -1) + 1
        loss, optimizer = list(zip(self.losses, self.optimizers, strict=True))[self.count % 2]
        optimizer.zero_grad()
        loss(self, x).backward()
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_parts_that_are_trained_in_turn_are_watched_in_turn() -> None:
    module = Alternates([classify, generate])
    del module.judge.bias
    module.judge.register_parameter("bias", None)
    pending = GroupFromNextCall(module, "training_step")
    parts = [
        [*module.encoder.parameters(), *module.head.parameters()],
        [*module.G.parameters(), *module.D.parameters()],
    ]
    module.optimizers = [EquivalentClassOptimizer(SGD(part, lr=0.1), pending) for part in parts]
    module.judge.requires_grad_(False)
    for _ in range(4):
        module.training_step(X)
    assert not pending.is_waiting
    assert [optimizer.usable_units().sum() for optimizer in module.optimizers] == [11, 15]


# What the report says -------------------------------------------------------------------------------------------------


class Named(Parts):
    def shrink(self) -> Tensor:
        return self.encoder[0].bias.cos().sum()

    def training_step(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        loss = F.cross_entropy(self.head(hidden), Y)
        loss = loss + hidden[:, 0].exp().mean()
        loss = loss + self.shrink()
        return loss + parameters_to_vector(self.D.parameters()).tanh().sum()


def test_what_is_held_fixed_is_named_with_the_line_that_does_it() -> None:
    first = Named.training_step.__code__.co_firstlineno
    shrink = Named.shrink.__code__.co_firstlineno + 1
    group = watched(Named([]), X)
    places = {operation.name: operation.module for operation in group.costs}
    assert {name: places[name] for name in ("exp", "cos", "tanh")} == {
        "exp": f"training_step, line {first + 3}",
        "cos": f"shrink, line {shrink}",
        "tanh": f"training_step, line {first + 5}",
    }


def test_a_line_of_another_file_is_named_with_the_file() -> None:
    Elsewhere = type("Elsewhere", (Named,), {"__module__": "tests.networks"})
    places = {operation.name: operation.module for operation in watched(Elsewhere([]), X).costs}
    assert places["exp"].endswith(f" of {Path(__file__).name}")


# Closures of optimizers that know no module ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACES)
@pytest.mark.parametrize("make", [lambda m: ECSGD(m.parameters(), lr=0.1), lambda m: ec_sgd(m, lr=0.1)])
def test_the_closure_of_the_first_step_is_watched_as_a_whole(make: Any, name: str) -> None:
    losses, expected = FACES[name]
    module = Parts(losses)
    optimizer = make(module)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.training_step(X)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.group is not None
    assert units(optimizer.group) == expected
    assert "forward" not in vars(module)


@pytest.mark.parametrize("base", [SGD, lbfgs])
def test_a_closure_may_be_a_function_of_torch(base: Any) -> None:
    module = Parts([classify])
    pending = GroupFromNextCall(module, "training_step")

    def step(x: Tensor) -> Tensor:
        optimizer = base(list(module.parameters()))
        classify(module, x).backward()
        optimizer.step(partial(F.mse_loss, module.encoder[0].weight, torch.ones(6, 4)))
        return classify(module, x)

    pending.call(step, X)
    assert pending.group is not None
    assert units(pending.group) == (5, 0, 0)
    pending.cancel()


def test_a_closure_that_has_computed_all_before_tells_nothing() -> None:
    module = Parts([classify])
    optimizer = ECSGD(module.parameters(), lr=0.1)
    loss = module.training_step(X)
    loss.backward()
    optimizer.step(lambda: loss)
    assert optimizer.group is not None
    assert units(optimizer.group) == (11, 0, 0)


# Example inputs and a training step -----------------------------------------------------------------------------------


class Positions(nn.Module):
    """A table of positions of which a sequence uses the first rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.table = nn.Linear(3, 6), nn.Parameter(torch.randn(12, 6))
        self.head = mlp(6, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.tokens(x) + self.table[: x.shape[1]]).relu())

    def training_step(self, x: Tensor) -> Tensor:
        return F.mse_loss(self(x), torch.ones(2))


@pytest.mark.parametrize("lengths", [(4, 8), (8, 4), (8, 8), (5, 12)])
def test_an_example_may_be_shorter_or_longer_than_what_is_trained(lengths: tuple[int, int]) -> None:
    module = Positions()
    shown, trained = (torch.randn(2, length, 3) for length in lengths)
    equations = trace(module, select_parameters(module), shown)
    pending = GroupFromNextCall(module, "training_step", equations=equations)
    assert pending.group is not None
    assert pending.group.num_units == 11
    module.training_step(trained)
    assert pending.group.num_units == 11
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("first", [slice(0, 3), slice(2, 5), slice(3, 5)])
@pytest.mark.parametrize("second", [slice(0, 2), slice(1, 5), slice(0, 5, 2)])
def test_uses_of_overlapping_rows_are_never_less_than_what_they_demand(first: slice, second: slice) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [(x @ self.w[part].T).relu() @ self.v[: len(range(5)[part])] for part in (first, second)]

    module = Both().double()
    x = torch.randn(7, 4).double()
    group = scaling_group(module, x)
    before = torch.cat(module(x), 1)
    group.act_(torch.randn(group.num_units).double())
    torch.testing.assert_close(torch.cat(module(x), 1), before)


@pytest.mark.parametrize("name", FACES)
def test_an_example_and_a_training_step_leave_free_what_both_do(name: str) -> None:
    losses, _ = FACES[name]
    module, shown = Parts(losses), Parts(FACES["forward"][0])
    equations = trace(shown, select_parameters(shown), X)
    pending = GroupFromNextCall(module, "training_step", equations=equations)
    assert pending.settle() is not None
    assert units(pending.group) == (11, 5, 11)
    module.training_step(X)
    found, both = directions(pending.settle()), directions(scaling_group(Parts([*FACES["forward"][0], *losses]), X))
    rank = torch.linalg.matrix_rank(torch.cat([found, both], 1))
    assert rank == found.shape[1] == both.shape[1]
