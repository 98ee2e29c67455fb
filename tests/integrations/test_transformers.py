"""Hugging Face's Trainer takes our optimizers by both of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from lightning_ecopt import ECAdamW, EquivalentClassOptimizer, ec_adamw, ec_sgd, scaling_group
from tests.lightning_integration.modules import is_clean, same, same_state, weights
from tests.optim.training import distance
from tests.selection import few

pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which the Trainer needs

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

#: The Trainer collects garbage at each start.
pytestmark = pytest.mark.usefixtures("few_objects")

VOCABULARY, LENGTH, SIZE = 24, 6, 8


def llama(dtype: torch.dtype = torch.float32, hidden_act: str = "silu") -> LlamaForCausalLM:
    """A decoder with grouped queries and gates, of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_act=hidden_act,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def bert() -> BertForSequenceClassification:
    """An encoder with ReLU and dropout, so that random numbers must be taken up, too."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_act="relu",
        max_position_embeddings=LENGTH,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


class Counts(Dataset[dict[str, Any]]):
    """Numbers that go up by 3, to be continued by a language model or told apart by a classifier."""

    def __init__(self, classes: bool = False, batches: int = 4) -> None:
        start = torch.randint(0, VOCABULARY, (SIZE * batches, 1), generator=torch.Generator().manual_seed(1))
        self.x = (start + 3 * torch.arange(LENGTH)) % VOCABULARY
        self.y = start[:, 0] % 3 if classes else self.x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.x[index], "labels": self.y[index], "comment": index}


#: Our optimizer by each of the arguments of the Trainer.
Form = Callable[[nn.Module], dict[str, Any]]
FORMS: dict[str, Form] = {
    "class": lambda model: {"optimizer_cls_and_kwargs": (ECAdamW, {"lr": 0.02, "refresh_interval": 3})},
    "optimizer": lambda model: {"optimizers": (ec_adamw(model, lr=0.02, refresh_interval=3), None)},
}
EACH = pytest.mark.parametrize("form", list(FORMS))


def trainer(
    model: nn.Module,
    form: Form,
    folder: Path,
    *callbacks: Any,
    data: Any = None,
    eval_dataset: Any = None,
    **options: Any,
) -> Trainer:
    """A Trainer that says nothing, for two epochs of four steps."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": SIZE,
        "num_train_epochs": 2,
        "learning_rate": 0.02,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "log_level": "error",
    }
    data = Counts() if data is None else data
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(
        model, arguments, train_dataset=data, eval_dataset=eval_dataset, callbacks=list(callbacks), **form(model)
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def ours(run: Trainer) -> EquivalentClassOptimizer:
    """The optimizer within what accelerate has made of it."""
    assert isinstance(run.optimizer, Optimizer)
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, EquivalentClassOptimizer)
    return optimizer


@EACH
def test_a_language_model_trains(form: str, tmp_path: Path) -> None:
    model = llama()
    start = weights(model)
    run = trainer(model, FORMS[form], tmp_path, max_grad_norm=1.0)
    run.train()
    assert sum(losses(run)[-2:]) < 0.97 * sum(losses(run)[:2])
    assert all(
        bool(p.isfinite().all()) and not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)
    )
    group = ours(run).group
    assert group is not None
    assert group.num_units == scaling_group(model, input_ids=Counts().x[:2], labels=Counts().y[:2]).num_units > 40
    assert is_clean(model)


class Inputs:
    """Takes down which inputs each call of a model had."""

    def __init__(self, model: nn.Module) -> None:
        self.names: list[list[str]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names.append([*sorted(kwargs), *map(str, args)])


@EACH
def test_the_model_gets_the_columns_that_it_would_get_without_us(form: str, tmp_path: Path) -> None:
    def called(one: Form) -> list[list[str]]:
        model = bert()  # whose signature names what it takes, which is how the Trainer knows
        inputs = Inputs(model)
        trainer(model, one, tmp_path, data=Counts(classes=True), num_train_epochs=1).train()
        return inputs.names

    expected = called(lambda model: {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.01})})
    assert "comment" not in expected[0]
    assert {"input_ids", "labels"} <= set(expected[0])
    assert called(FORMS[form]) == expected  # what is watched is no call more


@pytest.mark.parametrize("make", [ec_sgd, ec_adamw])
def test_the_trainer_equals_a_loop(make: Any, tmp_path: Path) -> None:
    model, other = llama(), llama()

    def form(one: nn.Module) -> dict[str, Any]:
        return {"optimizers": (make(one, lr=0.1, refresh_interval=3), None)}

    trainer(model, form, tmp_path, train_sampling_strategy="sequential", max_grad_norm=0.0).train()
    optimizer, data = form(other)["optimizers"][0], Counts()
    for step in range(8):
        rows = torch.arange(step * SIZE, (step + 1) * SIZE) % len(data)
        x, labels = data.x[rows], data.y[rows]
        optimizer.param_groups[0]["lr"] = 0.1 * max(0.0, (8 - step) / 8)  # the Trainer's schedule
        # The Trainer has the loss divided by the number of labels, which it counts.
        other(input_ids=x, labels=labels, num_items_in_batch=torch.tensor(labels[:, 1:].numel())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights(model), weights(other))


@EACH
def test_a_run_is_resumed_bit_identical(form: str, tmp_path: Path) -> None:
    def run(**options: Any) -> Trainer:
        data = Counts(classes=True)
        one = trainer(bert(), FORMS[form], tmp_path, data=data, save_strategy="steps", save_steps=2, seed=2)
        one.train(**options)
        return one

    whole = run()
    for step in (2, 4):  # within an epoch and at its end
        resumed = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(weights(resumed.model), weights(whole.model))
        assert same_state(ours(resumed).state_dict(), ours(whole).state_dict())
        assert losses(resumed) == losses(whole)
        assert is_clean(resumed.model)


#: The name that the option has got.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointed": {CHECKPOINTING: True},
    "evaluated first": {"eval_on_start": True, "eval_strategy": "epoch"},
}


@pytest.mark.parametrize(
    ("options", "form"),
    few(
        [
            ("accumulation", "class"),
            ("plain", "optimizer"),
            ("checkpointed", "class"),
            ("checkpointed", "optimizer"),
            ("evaluated first", "class"),
            ("evaluated first", "optimizer"),
        ],
        2,
    ),
)
def test_a_run_depends_on_the_class_alone(options: str, form: str, tmp_path: Path) -> None:
    x = Counts().x[:2]

    def run(log_scale: float) -> tuple[nn.Module, Trainer]:
        model = llama(torch.float64)
        group = scaling_group(model, input_ids=x)
        group.act_(log_scale * torch.randn(group.num_units, generator=torch.Generator().manual_seed(3)))
        # A norm of gradients from before the first balance would depend on more than the class.
        one = trainer(
            model, FORMS[form], tmp_path, max_grad_norm=0.0, eval_dataset=Counts(batches=1), **OPTIONS[options]
        )
        one.train()
        return model, one

    (model, one), (other, two) = run(0.0), run(1.0)
    torch.testing.assert_close(losses(one), losses(two), rtol=1e-8, atol=0)
    assert distance(Logits(model), Logits(other), x) < 1e-8
    assert is_clean(model)


@EACH
def test_mixed_precision_trains(form: str, tmp_path: Path) -> None:
    model = llama()
    run = trainer(model, FORMS[form], tmp_path, bf16=True)
    run.train()
    assert sum(losses(run)[-2:]) < 0.97 * sum(losses(run)[:2])
    assert ours(run).group is not None


class Logits(nn.Module):
    """A language model as a function of its tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


class Stops(TrainerCallback):  # type: ignore[misc]
    """Ends a run by an exception before its first step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@EACH
def test_a_run_that_ends_before_its_first_step_leaves_a_model_that_works(form: str, tmp_path: Path) -> None:
    model = llama()
    run = trainer(model, FORMS[form], tmp_path, Stops())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    ours(run).stop_watching()
    assert is_clean(model)
    trainer(model, FORMS["class"], tmp_path, num_train_epochs=1).train()


@pytest.mark.parametrize("experts", few(["grouped_mm", "batched_mm", "eager"], 1))
@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_units_of_all_experts_are_found(kind: str, experts: str) -> None:
    """In a mixture of three experts of four units, two heads of two (or four) channels, a width of four."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    common = {"vocab_size": 8, "num_hidden_layers": 1, "num_experts_per_tok": 2, "use_cache": False, **sizes}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind == "mixtral":
        model: nn.Module = MixtralForCausalLM(MixtralConfig(num_local_experts=3, **common, **tokens))
    else:
        own = {"moe_intermediate_size": 4, "num_experts": 3, "head_dim": 4}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**own, **common, **tokens))
    model.config._experts_implementation = experts
    ids = torch.arange(16).view(2, 8) % 8
    group = scaling_group(model, ids)
    # With real tensors, as the loop over experts is traced, no expert must be idle.
    assert group.num_units == (30 if kind == "mixtral" else 34)  # counted as the null space of w * df/dw
    before = model(ids).logits.detach()
    group.act_(torch.linspace(-1, 1, group.num_units))
    assert torch.allclose(model(ids).logits, before, rtol=1e-3, atol=1e-5)


def test_a_decoder_has_twice_as_many_units_without_its_cache() -> None:
    """The gains of its norms, and without keys and values to be kept those of the attention."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    config = GPT2Config(n_positions=LENGTH, n_embd=8, n_layer=2, n_head=2, **tokens)
    model, ids = GPT2LMHeadModel(config), torch.zeros(2, LENGTH, dtype=torch.long)
    assert scaling_group(model, ids).num_units == 4 * 8
    model.config.use_cache = False
    assert scaling_group(model, ids).num_units == 2 * 4 * 8
