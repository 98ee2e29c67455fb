"""Whatever cannot be done is said, with the way out, and nothing is lost."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD

from lightning_ecopt import ECSGD, EquivalentClassOptimizer, ec_sgd, scaling_group
from tests.lightning_integration.modules import (
    EXAMPLE,
    EXAMPLES,
    RULES,
    Batch,
    Classifier,
    batches,
    fit,
    is_clean,
    mlp,
    quiet,
    same,
    sgd,
    train_plainly,
    weights,
    wrapped,
)
from tests.lightning_integration.pipelines import plainly


def refuses(module: Classifier, match: str, error: type[Exception] = MisconfigurationException) -> None:
    """The fit ends with this error, and the module is as it was."""
    before = weights(module)
    with pytest.raises(error, match=match):
        fit(module, quiet())
    assert same(weights(module), before)
    assert is_clean(module)


# Networks without freedoms --------------------------------------------------------------------------------------------


@EXAMPLES
@pytest.mark.parametrize("activation", [nn.GELU, nn.Sigmoid, nn.Tanh, nn.SiLU])
def test_without_freedoms_one_warning_is_given_and_sgd_does_the_rest(
    activation: type[nn.Module], example: Tensor | None
) -> None:
    def smooth() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 12), activation(), nn.Linear(12, 12), activation(), nn.Linear(12, 10))

    ours, plain = Classifier(smooth(), example=example), Classifier(smooth())
    callback = quiet(refresh_interval=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ours, callback, log_every_n_steps=1)
    fit(plain)
    assert len([one for one in caught if "no scaling freedoms" in str(one.message)]) == 1
    assert callback.group is not None
    assert callback.group.num_units == 0
    assert same(weights(ours), weights(plain))
    assert is_clean(ours)


def test_without_freedoms_ec_sgd_warns_once_as_well() -> None:
    def smooth() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))

    ours, plain = Classifier(smooth(), lambda m: ec_sgd(m, lr=0.1, momentum=0.9)), Classifier(smooth())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ours)
    fit(plain)
    assert len([one for one in caught if "no scaling freedoms" in str(one.message)]) == 1
    assert same(weights(ours), weights(plain))


# Parameters -----------------------------------------------------------------------------------------------------------


class Unused(Classifier):
    """Has a layer that no call reaches."""

    def __init__(self, example: Tensor | None) -> None:
        super().__init__(example=example)
        self.idle = nn.Linear(4, 3)


@EXAMPLES
def test_a_parameter_that_the_trace_never_saw_is_named(example: Tensor | None) -> None:
    # With an example it is found before training; in the first step it is the optimizer that finds it.
    module, reference = Unused(example), Classifier(mlp(), example=example)
    module.net.load_state_dict(reference.net.state_dict())
    with pytest.warns(UserWarning, match=r"No traced call has used.*: idle\.weight, idle\.bias\. They are trained"):
        fit(module, quiet())
    fit(reference, quiet())
    assert same(weights(module.net), weights(reference.net))
    assert is_clean(module)


@EXAMPLES
def test_a_parameter_that_the_trace_never_saw_may_be_frozen_or_left_out(example: Tensor | None) -> None:
    frozen, left_out, reference = Unused(example), Unused(example), Classifier(mlp())
    frozen.idle.requires_grad_(False)
    left_out._configure = lambda m: sgd(m.net)
    for module in (frozen, left_out, reference):
        module.net.load_state_dict(mlp().state_dict())
        fit(module, quiet())
    assert same(weights(frozen.net), weights(reference.net))
    assert same(weights(left_out.net), weights(reference.net))


@EXAMPLES
def test_parameters_of_another_module_are_trained_as_ever(example: Tensor | None) -> None:
    class Outside(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(), lambda m: sgd(m.other[0]), example)
            self.other = [mlp(seed=4)]  # out of sight

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.other[0](batch[0]) + self(batch[0]), batch[1])

    ours, plain, other = Outside(), Outside(), mlp(seed=4)
    with pytest.warns(UserWarning, match=r"No traced call has used these parameters.*one of shape \[16, 64\]"):
        fit(ours, quiet())
    fit(plain)
    assert same(weights(ours.other[0]), weights(plain.other[0]))
    assert not same(weights(ours.other[0]), weights(other))
    with pytest.raises(ValueError, match=r"6 of the given parameters .*pass the module that owns all of them"):
        ec_sgd(mlp(), other.parameters(), lr=0.1)


def test_a_group_of_another_module_is_refused() -> None:
    base = sgd(mlp())
    with pytest.raises(ValueError, match="Call scaling_group on the module that this optimizer trains"):
        EquivalentClassOptimizer(base, scaling_group(mlp(), EXAMPLE))


# Optimizers -----------------------------------------------------------------------------------------------------------


@EXAMPLES
def test_an_optimizer_that_computes_gradients_by_itself_is_left_as_it_is(example: Tensor | None) -> None:
    ours, plain = (Classifier(mlp(), lambda m: LBFGS(m.parameters(), lr=0.1), example) for _ in range(2))
    with pytest.warns(UserWarning, match=r"leaves LBFGS as it is\. LBFGS computes gradients several times"):
        fit(ours, quiet())
    fit(plain)
    assert same(weights(ours), weights(plain))


def test_of_two_optimizers_one_may_be_left_as_it_is() -> None:
    class Two(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            for optimizer in self.optimizers():

                def closure(optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(self(batch[0]), batch[1])
                    self.manual_backward(loss)
                    return loss

                optimizer.step(closure)

    module = Two(mlp(), lambda m: (LBFGS(m.net[4].parameters(), max_iter=2), sgd(m.net[:4])), EXAMPLE)
    with pytest.warns(UserWarning, match="leaves LBFGS as it is"):
        run = fit(module, quiet())
    assert [type(optimizer).__name__ for optimizer in run.optimizers] == ["LBFGS", "EquivalentClassOptimizer"]
    assert run.optimizers[1].group.num_units == 16  # those between the first two layers
    assert not same(weights(module), weights(mlp()))


@EXAMPLES
def test_an_optimizer_is_wrapped_once_only(example: Tensor | None) -> None:
    module, reference = (
        Classifier(mlp(), lambda m: ec_sgd(m, lr=0.1, refresh_interval="epoch"), example) for _ in "ab"
    )
    fit(module, quiet())
    fit(reference)
    assert same(weights(module), weights(reference))
    net = mlp()
    group = scaling_group(net, EXAMPLE)
    once = EquivalentClassOptimizer(sgd(net), group)
    with pytest.raises(TypeError, match="wrap it once"):
        EquivalentClassOptimizer(once, group)
    F.cross_entropy(net(batches()[0][0]), batches()[0][1]).backward()
    once.step()
    assert not same(weights(net), weights(mlp()))


# Strategies and loops -------------------------------------------------------------------------------------------------


class OwnDeepSpeed(DeepSpeedStrategy):
    """A strategy of the user's own is refused by what it is, not by its name."""


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, OwnDeepSpeed])
def test_strategies_that_flatten_parameters_are_refused(kind: type) -> None:
    # Their constructors ask for devices and packages that are not everywhere.
    stub = SimpleNamespace(strategy=object.__new__(kind))
    module = Classifier(mlp())
    match = f"{kind.__name__}, whose parameters have lost their shapes: .*strategy='ddp' or ModelParallelStrategy"
    with pytest.raises(MisconfigurationException, match=match):
        quiet().setup(stub, module, "fit")
    assert same(weights(module), weights(mlp()))
    assert is_clean(module)
    for stage in ("validate", "test", "predict"):
        quiet().setup(stub, module, stage)


@pytest.mark.parametrize("kind", [DeepSpeedStrategy])
def test_ec_sgd_refuses_strategies_that_flatten_parameters(kind: type) -> None:
    module = Classifier(mlp())
    module._trainer = SimpleNamespace(strategy=object.__new__(kind))
    match = f"ECSGD does not work with {kind.__name__}, .*strategy='ddp' or ModelParallelStrategy, or return a plain"
    with pytest.raises(MisconfigurationException, match=match):
        ec_sgd(module)


def in_group(net: nn.Module) -> EquivalentClassOptimizer:
    return wrapped(net, sgd(net))


@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
@pytest.mark.parametrize("make", [in_group, ec_sgd, lambda net: ECSGD(net.parameters())])
def test_pieces_that_deepspeed_puts_in_the_place_of_parameters_are_refused(mark: str, make: Any) -> None:
    net = mlp()
    optimizer = make(net)
    flat = nn.utils.parameters_to_vector(net.parameters()).detach().requires_grad_()
    for p in net.parameters():
        setattr(p, mark, None)  # as DeepSpeed does, which steps a piece of all parameters then
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    with pytest.raises(ValueError, match=r"DeepSpeed has put flat pieces .*: use DDP or FSDP2"):
        optimizer.step()
    assert torch.equal(flat, before)


@pytest.mark.parametrize("kind", [ModelParallelStrategy, FSDPStrategy])
def test_a_strategy_whose_parameters_tell_their_shapes_is_not_refused(kind: type) -> None:
    stub = SimpleNamespace(strategy=object.__new__(kind), callbacks=[])
    quiet().setup(stub, Classifier(mlp()), "fit")


class Manual(Classifier):
    def __init__(self, example: Tensor | None = None) -> None:
        super().__init__(mlp(), example=example)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


@RULES
@EXAMPLES
def test_manual_optimization_needs_no_example(rule: str, example: Tensor | None) -> None:
    module, callback = Manual(example), quiet(rule=rule)
    fit(module, callback)
    assert same(weights(module), plainly(rule, first_is_plain=True))
    assert callback.group is not None
    assert callback.group.num_units == 32
    assert is_clean(module)


@EXAMPLES
def test_manual_optimization_with_ec_sgd_needs_no_example_either(example: Tensor | None) -> None:
    module, net = Manual(example), mlp()
    module._configure = lambda m: ec_sgd(m, lr=0.1)
    fit(module)
    optimizer = wrapped(net, SGD(net.parameters(), lr=0.1))
    train_plainly(net, optimizer, batches(), refresh_each_epoch=False, first_is_plain=True)
    assert same(weights(module), weights(net))
    assert is_clean(module)


class Cuts(Classifier):
    """An example that the module cannot take."""

    def __init__(self) -> None:
        super().__init__(mlp(), example=torch.zeros(1, 63))


def test_of_an_example_that_does_not_fit_the_first_step_is_watched() -> None:
    ours, reference = Cuts(), Classifier(mlp())
    with pytest.warns(UserWarning, match=r"example_input_array of Cuts cannot be traced.*(multiplied|size mismatch)"):
        fit(ours, quiet())
    fit(reference, quiet())
    assert same(weights(ours), weights(reference))


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rule", "paths"),
        ("rule", None),
        ("max_path_ratio", -2.0),
        ("max_path_ratio", 0.0),
        ("max_path_ratio", 1.0),
        ("max_path_ratio", math.nan),
        ("max_path_ratio", math.inf),
        ("free_start", -1.0),
        ("implementation", "fastest"),
        ("free_start", 0.0),
        ("free_start", math.nan),
        ("free_start", math.inf),
        ("skeleton", "largest"),
        ("representative", "largest"),
        ("refresh", 0),
        ("refresh", -3),
        ("refresh", 2.5),
        ("refresh", math.nan),
        ("refresh", True),
        ("refresh", "step"),
    ],
)
def test_options_out_of_range_are_refused_by_name(option: str, value: Any) -> None:
    match = rf"^\w+: {option}(_interval)? must be .*got {value!r}"
    with pytest.raises(ValueError, match=match):
        quiet(**{option: value})
    option = {"refresh": "refresh_interval"}.get(option, option)
    net = mlp()
    base, group = sgd(net), scaling_group(net, EXAMPLE)
    with pytest.raises(ValueError, match=match):
        ec_sgd(net, lr=0.1, **{option: value})
    with pytest.raises(ValueError, match=match):
        EquivalentClassOptimizer(base, group, **{option: value})
    assert is_clean(net)
    assert same(weights(net), weights(mlp()))


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"momentum": -0.5}, {"weight_decay": -1.0}, {"nesterov": True}], ids=str
)
def test_options_of_sgd_are_refused_by_sgd(options: dict[str, Any]) -> None:
    net = mlp()
    with pytest.raises(ValueError, match=r"(?i)invalid|nesterov"):
        ec_sgd(net, **options)
    assert is_clean(net)


# Numbers that are none ------------------------------------------------------------------------------------------------


LOGGED = {"unit": ["ecopt/clipped_share"], "path": ["ecopt/min_path_value", "ecopt/max_path_value"]}


class Spoiled(Classifier):
    """The gradient of one step is not finite."""

    def __init__(self, value: float, at: int, example: Tensor | None, configure: Any = None) -> None:
        super().__init__(mlp(), configure, example)
        self.value, self.at = value, at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if self.trainer.global_step == self.at else loss


@RULES
@EXAMPLES
@pytest.mark.parametrize("at", [0, 2], ids=["first step", "later"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_neither_stops_training_nor_spoils_what_is_logged(
    value: float, at: int, example: Tensor | None, rule: str
) -> None:
    module = Spoiled(value, at, example)
    run = fit(module, quiet(rule=rule), log_every_n_steps=1)  # refreshes once after that, too
    assert run.global_step == 8
    assert all(math.isfinite(run.callback_metrics[name]) for name in LOGGED[rule])
    # What SGD does, which is to write such numbers into the weights.
    plain = Spoiled(value, at, None)
    fit(plain)
    assert not all(bool(w.isfinite().all()) for w in weights(plain))
    assert not all(bool(w.isfinite().all()) for w in weights(module))


class Scaled(Spoiled):
    """Skips the step of such a gradient, as loss scalers do."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.global_step == self.at:
            optimizer.zero_grad()


@RULES
@EXAMPLES
def test_training_goes_on_where_the_gradients_of_a_step_are_dropped(example: Tensor | None, rule: str) -> None:
    module: LightningModule = Scaled(math.nan, 2, example)
    run = fit(module, quiet(rule=rule), log_every_n_steps=1)
    assert all(bool(w.isfinite().all()) for w in weights(module))
    assert all(math.isfinite(run.callback_metrics[name]) for name in LOGGED[rule])
