"""Muon and AdamW in one optimizer, and which parameters are whose."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lightning_ecopt import ECAdamW, ECMuon, EquivalentClassOptimizer, MuonAdamW, ec_muon, scaling_group
from lightning_ecopt.optim.muon import hidden_matrices
from tests.networks import mlp
from tests.optim.training import (
    RULES,
    batches,
    loss_of,
    needs_muon,
    problem,
    rescaled,
    same_bits,
    through_a_file,
    train,
)


def parts(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices but the last, and all else."""
    own = list(module.parameters())
    matrices = [p for p in own if p.ndim == 2][:-1]
    return matrices, [p for p in own if all(p is not matrix for matrix in matrices)]


def groups(module: nn.Module) -> list[dict[str, Any]]:
    matrices, others = parts(module)
    return [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]


def names(module: nn.Module, optimizer: optim.Optimizer) -> list[str]:
    """Of the parameters that are Muon's."""
    name_of = {id(p): name for name, p in module.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]


# The steps of the two -------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 1e-2}, {}),
    "options": (
        {"weight_decay": 0.1, "momentum": 0.8, "nesterov": False, "ns_steps": 3, "betas": (0.8, 0.9), "amsgrad": True},
        {"weight_decay": 0.1, "momentum": 0.8, "nesterov": False, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"},
        {"weight_decay": 0.1, "betas": (0.8, 0.9), "amsgrad": True},
    ),
    "two rates": (
        {"adjust_lr_fn": "original", "adamw_lr": 0.003, "ns_coefficients": (3.0, -4.0, 2.0), "foreach": True},
        {"adjust_lr_fn": "original", "weight_decay": 1e-2, "ns_coefficients": (3.0, -4.0, 2.0)},
        {"lr": 0.003, "foreach": True},
    ),
}


@needs_muon
@pytest.mark.parametrize("case", OPTIONS)
def test_steps_are_those_of_the_two_by_themselves(case: str) -> None:
    own, muons, adamws = OPTIONS[case]
    module, x, y = problem(4, 8, 6, 3)
    other = copy.deepcopy(module)
    both = MuonAdamW(module.parameters(), lr=0.01, **own)
    matrices, others = parts(other)
    two = optim.Muon(matrices, **{"lr": 0.01, **muons}), optim.AdamW(others, **{"lr": 0.01, **adamws})
    for step in range(6):
        for one in (module, other):
            one.zero_grad()
            loss_of(one, *batches(x, y, step)).backward()
        for optimizer in (both, *two):
            optimizer.step()
    assert same_bits(module, other)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        (held,) = (optimizer.state[q] for optimizer in two if q in optimizer.state)
        assert both.state[p].keys() == held.keys()
        assert all(torch.equal(both.state[p][entry], held[entry]) for entry in held)


@needs_muon
def test_defaults_are_those_of_adamw_and_muon() -> None:
    """But for the rate of Muon, which is adjusted to AdamW's, its decay and its eps."""
    parameters = inspect.signature(MuonAdamW).parameters
    for kind, but in ((optim.Muon, {"weight_decay", "adjust_lr_fn", "eps"}), (optim.AdamW, set())):
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in parameters and name not in {"params", *but}:
                assert parameters[name].default == parameter.default, name
    ours = inspect.signature(ECMuon).parameters
    assert all(ours[name].default == parameter.default for name, parameter in parameters.items() if name != "lr")
    assert ours["lr"].default == inspect.signature(ECAdamW).parameters["lr"].default
    assert list(ours)[: len(parameters)] == list(parameters)
    assert parameters["weight_decay"].default == inspect.signature(ECAdamW).parameters["weight_decay"].default


@needs_muon
def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    module, x, y = problem(4, 8, 3)
    optimizer = MuonAdamW(module.parameters(), lr=0.01)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses.append(loss_of(module, x, y))
        losses[-1].backward()
        return losses[-1]

    for _ in range(20):
        assert optimizer.step(closure) is losses[-1]
    assert len(losses) == 20
    assert losses[-1] < losses[0]


SCHEDULES: dict[str, Callable[[optim.Optimizer], Any]] = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 5),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.01, total_steps=20),
    "one of each": lambda optimizer: LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.1]),
}


@needs_muon
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers_reach_both(schedule: str, recwarn: pytest.WarningsRecorder) -> None:
    module, x, y = problem(4, 8, 6, 3)
    optimizer = MuonAdamW(module.parameters(), lr=0.01)
    scheduler = SCHEDULES[schedule](optimizer)
    for step in range(3):
        before = copy.deepcopy(module)
        train(module, optimizer, x, y, range(step, step + 1))
        for group, own, old in zip(optimizer.param_groups, parts(module), parts(before), strict=True):
            assert all(p is q for p, q in zip(group["params"], own, strict=True))
            twin = optim.Muon(old, lr=1.0) if group["use_muon"] else None
            if twin is not None:  # an orthogonal step of rms 0.2 lr, but for the decay
                for p, q in zip(own, old, strict=True):
                    rms = (p - q * (1 - group["lr"] * 0.01)).square().mean().sqrt()
                    assert 0.7 < float(rms) / (0.2 * group["lr"]) < 1.3
        rates = [group["lr"] for group in optimizer.param_groups]
        scheduler.step()
        assert all(group["lr"] != rate for group, rate in zip(optimizer.param_groups[:1], rates, strict=False))
    assert not [one for one in recwarn if "lr_scheduler" in str(one.message)]


# Checkpoints and copies -----------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[nn.Module, optim.Optimizer], tuple[nn.Module, optim.Optimizer]]] = {
    "deepcopy": lambda module, optimizer: copy.deepcopy((module, optimizer)),
    "pickle": lambda module, optimizer: pickle.loads(pickle.dumps((module, optimizer))),
}


def from_a_checkpoint(module: nn.Module, optimizer: optim.Optimizer) -> tuple[nn.Module, optim.Optimizer]:
    saved = through_a_file(optimizer.state_dict())
    other = copy.deepcopy(module)
    made = MuonAdamW(groups(other), lr=0.5, momentum=0.1)
    made.load_state_dict(saved)
    return other, made


@needs_muon
@pytest.mark.parametrize("way", [*COPIES, "checkpoint"])
def test_a_copy_goes_on_with_the_same_bits(way: str) -> None:
    module, x, y = problem(4, 8, 6, 3)
    optimizer = MuonAdamW(module.parameters(), lr=0.01, adamw_lr=0.003, amsgrad=True)
    train(module, optimizer, x, y, range(4))
    other, made = COPIES.get(way, from_a_checkpoint)(module, optimizer)
    assert train(module, optimizer, x, y, range(4, 8)) == train(other, made, x, y, range(4, 8))
    assert same_bits(module, other)


@needs_muon
def test_a_checkpoint_may_lack_options_but_not_whose_a_group_is() -> None:
    module, x, y = problem(4, 8, 6, 3)
    optimizer = MuonAdamW(groups(module), lr=0.01)
    train(module, optimizer, x, y, range(2))
    state = optimizer.state_dict()
    old = copy.deepcopy(state)
    for group in old["param_groups"]:
        del group["decoupled_weight_decay"], group["ns_coefficients"]
    optimizer.load_state_dict(old)
    train(module, optimizer, x, y, range(2, 4))
    for group in state["param_groups"]:
        del group["use_muon"]
    with pytest.raises(ValueError, match="saved by another optimizer"):
        optimizer.load_state_dict(state)
    train(module, optimizer, x, y, range(4, 6))  # nothing has changed


# Whose a parameter is -------------------------------------------------------------------------------------------------


@needs_muon
def test_a_group_that_is_added_is_divided() -> None:
    module = mlp(4, 8, 6, 3)
    optimizer = MuonAdamW(module[4].parameters(), lr=0.01)
    assert names(module, optimizer) == []
    optimizer.add_param_group({"params": module[0].parameters(), "lr": 0.1})
    optimizer.add_param_group({"params": module[2].weight})
    assert names(module, optimizer) == ["0.weight", "2.weight"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1, 0.1, 0.01]


@needs_muon
def test_a_group_that_is_added_gets_the_rate_of_its_kind() -> None:
    module = mlp(4, 8, 6, 3)
    optimizer = MuonAdamW(module[4].parameters(), lr=0.02, adamw_lr=0.001)
    optimizer = copy.deepcopy(optimizer)
    optimizer.add_param_group({"params": module[0].parameters()})
    rates = {group["use_muon"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {True: 0.02, False: 0.001}


@needs_muon
def test_parameters_may_come_with_names_and_in_groups_without_marks() -> None:
    module = mlp(4, 8, 6, 3)
    assert names(module, MuonAdamW(module.named_parameters())) == ["0.weight", "2.weight"]
    decayed, others = ([p for p in module.parameters() if p.ndim == ndim] for ndim in (2, 1))
    optimizer = MuonAdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    assert names(module, optimizer) == ["0.weight", "2.weight"]
    found = [(group["use_muon"], len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(True, 2, 0.01), (False, 1, 0.01), (False, 3, 0.0)]


WRONG: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "a vector": (
        lambda m: MuonAdamW([{"params": m.parameters(), "use_muon": True}]),
        ValueError,
        "a group with use_muon=True has a parameter of shape [8]: put it into a group with use_muon=False",
    ),
    "half": (
        lambda m: MuonAdamW([{"params": m[0].parameters(), "use_muon": False}, {"params": m[2].parameters()}]),
        ValueError,
        "Say it in all of them",
    ),
    "momentum": (lambda m: MuonAdamW(m.parameters(), momentum=-1.0), ValueError, "momentum"),
    "betas": (lambda m: MuonAdamW(m.parameters(), betas=(1.0, 0.9)), ValueError, "beta"),
    "adjust": (lambda m: ec_muon(m, adjust_lr_fn="rms"), ValueError, "rms"),
    "none": (lambda m: MuonAdamW([]), ValueError, "empty parameter list"),
    "a tensor": (lambda m: MuonAdamW(m[0].weight), TypeError, "iterable"),
    "a set": (lambda m: MuonAdamW([{"params": set(m.parameters())}]), TypeError, "ordered"),
    "twice": (
        lambda m: MuonAdamW([*groups(m), {"params": [m[0].weight], "use_muon": False}]),
        ValueError,
        "more than one parameter group",
    ),
    "others": (lambda m: ec_muon(m, mlp(2, 2).parameters()), ValueError, "not parameters of Sequential"),
}


@needs_muon
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_an_error(case: str) -> None:
    make, kind, message = WRONG[case]
    with pytest.raises(kind, match=re.escape(message)):
        make(mlp(4, 8, 6, 3))


def test_without_muon_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(optim, "Muon", raising=False)
    for make in (lambda: MuonAdamW(mlp(2, 2).parameters()), lambda: ec_muon(mlp(2, 2))):
        with pytest.raises(RuntimeError, match=r"torch 2\.9 or later"):
            make()


class Decoder(nn.Module):
    """Embeddings, positions, attention of both forms, gates and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(6, 8))
        self.embed = nn.Embedding(11, 8)
        self.norm1, self.norm2 = nn.RMSNorm(8), nn.RMSNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.teacher = nn.Linear(8, 11).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.norm2(x)
        return self.head(x + self.down(F.relu(self.gate(y)) * self.up(y)))


HIDDEN = ["attention.in_proj_weight", "attention.out_proj.weight", "gate.weight", "up.weight", "down.weight"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, nonlinearity="relu")
        self.head = nn.Linear(4, 2)
        self.bag = nn.EmbeddingBag(5, 3)


class Functional(nn.Module):
    """All weights are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1, self.weight2, self.weight3 = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))


SPLITS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp": (lambda: mlp(4, 8, 6, 3), ["0.weight", "2.weight"]),
    "one layer": (lambda: nn.Linear(4, 3), []),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), mlp(8, 4, 3)), ["2.0.weight"]),
    "decoder": (Decoder, HIDDEN),
    "tied decoder": (lambda: Decoder(tied=True), HIDDEN),
    "recurrent": (Recurrent, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
    "embedding alone": (lambda: nn.Embedding(3, 2), []),
    "several in one layer": (Functional, ["weight1", "weight2"]),
    "layers that share": (lambda: nn.Sequential(mlp(4, 8, 8), *shared(nn.Linear(8, 8))), ["0.0.weight", "0.2.weight"]),
}


def shared(layer: nn.Linear | nn.Embedding) -> tuple[nn.Module, nn.Linear]:
    """A layer, and another of the same matrix."""
    head = nn.Linear(*reversed(layer.weight.shape))
    head.weight = layer.weight
    return layer, head


def parts_of(**layers: nn.Module) -> nn.ModuleDict:
    """A module with layers of these names, in this order."""
    return nn.ModuleDict(layers)


EMBED, TIED = shared(nn.Embedding(9, 8))
#: What the module alone does not tell: the last matrix that it has registered is taken for the head.
ONE_HEAD: dict[str, tuple[nn.Module, list[str]]] = {
    "first": (parts_of(head=nn.Linear(8, 3), body=mlp(4, 8, 8)), ["head.weight", "body.0.weight"]),
    "first, ahead of a layer with several": (
        parts_of(head=nn.Linear(8, 3), body=nn.RNN(4, 8, 2)),
        ["head.weight", "body.weight_ih_l0", "body.weight_hh_l0", "body.weight_ih_l1"],
    ),
    "two": (
        parts_of(body=mlp(4, 8, 8), policy=nn.Linear(8, 3), value=nn.Linear(8, 1)),
        ["body.0.weight", "body.2.weight", "policy.weight"],
    ),
    "tied, and another": (
        parts_of(embed=EMBED, body=mlp(8, 9, 8), head=TIED, value=nn.Linear(8, 1)),
        ["body.0.weight", "body.2.weight"],
    ),
    "tied, ahead of hidden layers": (parts_of(embed=EMBED, head=TIED, body=mlp(8, 9, 8)), ["body.0.weight"]),
    "an embedding itself": (parts_of(embed=EMBED, body=mlp(8, 9, 8)), ["body.0.weight"]),
}


@needs_muon
@pytest.mark.parametrize("heads", ONE_HEAD)
def test_one_matrix_is_taken_for_the_head_and_groups_tell_otherwise(heads: str) -> None:
    module, expected = ONE_HEAD[heads]
    assert names(module, ec_muon(module)) == expected
    hidden = {name: p for name, p in module.named_parameters() if "body" in name and p.ndim == 2}
    others = [p for name, p in module.named_parameters() if name not in hidden]
    told = [{"params": others, "use_muon": False}, {"params": hidden.values(), "use_muon": True}]
    assert names(module, ec_muon(module, told)) == list(hidden)


@needs_muon
def test_the_order_of_groups_tells_the_head_only_where_no_module_does() -> None:
    module = mlp(4, 8, 6, 3)
    head_first = [{"params": module[k].parameters(), "lr": 0.1**k} for k in (4, 2, 0)]
    assert names(module, ec_muon(module, head_first)) == ["2.weight", "0.weight"]
    head_first = [{"params": module[k].parameters()} for k in (4, 2, 0)]
    assert names(module, MuonAdamW(head_first)) == ["4.weight", "2.weight"]


@needs_muon
def test_of_some_parameters_the_head_is_the_last_of_these() -> None:
    """As of one network of two, each with its own optimizer; or where the head itself is frozen."""
    module = parts_of(generator=mlp(4, 8, 6, 3), critic=mlp(3, 8, 1))
    of_generator = ["generator.0.weight", "generator.2.weight"]
    assert names(module, ec_muon(module, module["generator"].parameters())) == of_generator
    module["critic"].requires_grad_(False)
    assert names(module, ec_muon(module)) == of_generator


@needs_muon
@pytest.mark.parametrize("case", SPLITS)
def test_muon_has_the_matrices_of_hidden_layers(case: str) -> None:
    make, expected = SPLITS[case]
    module = make()
    optimizer = ec_muon(module)
    assert names(module, optimizer) == expected
    trained = [p for p in module.parameters() if p.requires_grad]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trained}
    assert len(held) == len(trained)


@needs_muon
def test_groups_of_the_user_stay_or_are_divided() -> None:
    module = Decoder()
    given: list[Mapping[str, Any]] = [{"params": [module.head.weight], "use_muon": True}]
    assert names(module, ec_muon(module, given)) == ["head.weight"]
    optimizer = ec_muon(module, [{"params": [*module.gate.parameters(), *module.head.parameters()], "lr": 0.1}])
    assert [(group["use_muon"], group["lr"]) for group in optimizer.param_groups] == [(True, 0.1), (False, 0.1)]
    assert names(module, optimizer) == ["gate.weight"]


def test_the_choice_needs_no_muon() -> None:
    module = Decoder()
    chosen = hidden_matrices(module)([p for p in module.parameters() if p.requires_grad])
    assert [name for name, p in module.named_parameters() if id(p) in chosen] == HIDDEN


# The class alone ------------------------------------------------------------------------------------------------------


@needs_muon
@RULES
def test_a_run_of_a_decoder_depends_on_the_class_alone(rule: str) -> None:
    torch.manual_seed(0)
    module = Decoder().double()
    x = torch.randint(11, (16, 6))
    y = torch.randint(11, (16 * 6,))
    other = rescaled(module, x[:2], 0.5)
    runs = []
    for one in (module, other):
        optimizer = ec_muon(one, lr=0.01, rule=rule, refresh_interval=4)
        optimizer.bind(scaling_group(one, x[:2]))
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(one(x).flatten(0, 1), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append(torch.stack(losses))
    assert runs[0][-1] < runs[0][0] - 0.1
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-8, atol=0)


@needs_muon
@pytest.mark.parametrize("is_muon", [True, False])
def test_a_state_of_the_rule_from_a_base_that_treats_matrices_otherwise_is_taken_up(is_muon: bool) -> None:
    """Sizes of rows are those of the checkpoint only where they mean the same."""
    module, x, y = problem(4, 8, 6, 3)

    def make(use_muon: bool) -> Any:
        matrices, others = parts(module)
        base = MuonAdamW([{"params": matrices, "use_muon": use_muon}, {"params": others, "use_muon": False}], lr=0.01)
        return EquivalentClassOptimizer(base, scaling_group(module, x))

    before, new, after = make(not is_muon), make(is_muon), make(is_muon)
    train(module, before, x, y, range(3))
    new.start()
    after.load_rule_state(copy.deepcopy(before.rule_state()))
    train(module, after, x, y, range(3, 6))
    fresh, resumed = (each._session.stage.rule for each in (new, after))
    assert resumed._own.shape == fresh._own.shape
    assert bool(((resumed._own >= 0.1) & (resumed._own <= 10)).all())
    if is_muon:  # one number for each matrix
        kept = resumed._own[resumed._whole]
        assert len(kept.unique()) <= 2


@needs_muon
@pytest.mark.parametrize("is_muon", [False, True])
def test_a_state_with_magnitudes_in_place_of_step_sizes_is_taken_up(is_muon: bool) -> None:
    """As version 0.1.0 saved it."""
    module, x, y = problem(4, 6, 5, 3)

    def make() -> Any:
        matrices, others = parts(module)
        base = MuonAdamW([{"params": matrices, "use_muon": is_muon}, {"params": others, "use_muon": False}], lr=0.01)
        return EquivalentClassOptimizer(base, scaling_group(module, x))

    before, after = make(), make()
    train(module, before, x, y, range(3))
    state = copy.deepcopy(before.rule_state())
    own = state.pop("own")
    reference = 2.0 * torch.ones_like(own) if is_muon else torch.tensor(2.0, dtype=own.dtype)
    after.load_rule_state({**state, "rho": 2.0 * own, "reference": reference})
    train(module, after, x, y, range(3, 4))
    assert torch.equal(after.rule_state()["own"], own)
    assert len(own.unique()) > 3


@needs_muon
@pytest.mark.parametrize("size", [1e-14, 1e14])
def test_sizes_beyond_their_type_do_not_spoil_weights(size: float) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    with torch.no_grad():
        net[0].weight.mul_(size)
        net[1].weight.mul_(size)
    base = MuonAdamW([{"params": [net[1].weight], "use_muon": True}, {"params": [net[3].weight], "use_muon": False}])
    optimizer = EquivalentClassOptimizer(base, scaling_group(net, x))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(8) % 3).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in net.parameters())
