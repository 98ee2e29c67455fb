"""Networks and data of the accuracy benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.benchmarks.small import ImagesAndText
from tests.selection import full

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import attention
import tasks

pytestmark = full

IMAGES: dict[str, dict[str, Any]] = {
    "mlp": {"inputs": 256, "hidden": 2, "width": 4, "bias": True},
    "vgg": {"channels": 1, "width": 4},
    "plain": {"channels": 1, "width": 4},
    "resnet": {"channels": 1, "width": 4},
}
VIT = {"channels": 1, "size": 16, "patch": 4, "width": 8, "depth": 2, "heads": 2}
DECODER = {"width": 16, "depth": 2, "heads": 2, "context": 8, "outputs": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ImagesAndText(tmp_path_factory.mktemp("data")).folder


@pytest.mark.parametrize("name", list(IMAGES))
def test_networks_have_as_many_outputs_as_classes_and_know_their_initialisations(name: str) -> None:
    net = tasks.NETWORKS[name](**IMAGES[name], init="he", outputs=7)
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    with pytest.raises(ValueError, match="xavier"):
        tasks.NETWORKS[name](**IMAGES[name], init="xavier")


def test_plain_nets_have_their_layers() -> None:
    for depth in (18, 34):
        net = tasks.NETWORKS["plain"](3, 4, "he", depth=depth)
        assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in net.modules()) == depth
    with pytest.raises(ValueError, match="50"):
        tasks.NETWORKS["plain"](3, 4, "he", depth=50)


def test_a_vision_transformer_sees_all_patches() -> None:
    net = attention.vit(**VIT, outputs=7)
    x = torch.randn(2, 1, 16, 16, requires_grad=True)
    logits = net(x)
    assert logits.shape == (2, 7)
    logits[0, 0].backward()
    assert x.grad is not None
    assert bool((x.grad[0] != 0).all())
    assert not x.grad[1].any()
    with pytest.raises(ValueError, match="multiple of patch"):
        attention.vit(**{**VIT, "patch": 5})


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu", "relu2"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_decoders_do_not_see_the_future_but_where_tokens_stand(norm: str, feed_forward: str, positions: str) -> None:
    torch.manual_seed(0)
    net = attention.decoder(**DECODER, norm=norm, feed_forward=feed_forward, positions=positions).double()
    tokens = torch.randint(7, (1, 8))
    logits = net(tokens).detach()
    assert logits.shape == (1, 8, 7)
    other = tokens.clone()
    other[0, 5] = (tokens[0, 5] + 1) % 7
    torch.testing.assert_close(net(other)[:, :5], logits[:, :5])
    assert bool((net(other) != logits)[:, 5:].all())
    # The last of four tokens tells apart in which order the two before it came.
    swapped = torch.tensor([[3, 1, 2, 3], [3, 2, 1, 3]])
    last = net(swapped)[:, -1]
    assert not torch.allclose(last[0], last[1], atol=1e-6)


def test_rotary_positions_are_relative() -> None:
    """The product of a query and a key depends on how far apart they are."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).expand(2, 6, 8)
    products = attention.rotate(q) @ attention.rotate(k).T
    for apart in range(-5, 6):
        diagonal = products.diagonal(apart)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention.rotate(q).norm(dim=1), q.norm(dim=1), rtol=1e-5, atol=1e-5)


def test_initialisations_of_transformers() -> None:
    torch.manual_seed(0)
    net = attention.decoder(64, 2, 4, 8, outputs=65, init="gpt2")
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
        else:
            assert bool((parameter == float(name.endswith("weight"))).all()), name
    default = attention.decoder(64, 2, 4, 8, outputs=65)
    assert float(default.tokens.weight.detach().std()) == pytest.approx(1, rel=0.1)
    for option in ("norm", "feed_forward", "positions", "init"):
        with pytest.raises(ValueError, match=f"{option} must be one of .*'none'"):
            attention.decoder(**DECODER, **{option: "none"})


def test_data_that_are_not_there_or_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"houses\.npz"):
        tasks.load_images(tmp_path, "houses", 4, 10, 10)
    with pytest.raises(ValueError, match="400 training images"):
        tasks.load_images(folder, "mnist", 4, 400, 10)
    with pytest.raises(ValueError, match="no multiple of 3"):
        tasks.load_images(folder, "mnist", 3, 10, 10)
    with pytest.raises(FileNotFoundError, match=r"novel\.txt"):
        tasks.load_text(tmp_path, "novel", 8)
    with pytest.raises(ValueError, match="2000 characters"):
        tasks.load_text(folder, "alphabet", 100)


def test_training_validation_and_test_images_are_apart_and_standardised(folder: Path) -> None:
    data = tasks.load(str(folder), "cpu", dataset="mnist", size=4, num_train=200, num_validation=100)
    assert isinstance(data, tasks.Images)
    assert data.train[0].shape == (200, 1, 4, 4)
    assert data.outputs == 10
    assert len(data.validation[1]) == len(data.test[1]) == 100
    assert abs(float(data.train[0].mean())) < 1e-5
    both = torch.cat([data.train[0], data.validation[0]]).flatten(1)
    assert len(both.unique(dim=0)) == 300
    seen = torch.cat([x for x, _ in data.epoch(50, torch.Generator())]).flatten(1)
    assert torch.equal(seen.unique(dim=0), data.train[0].flatten(1).unique(dim=0))
    assert sum(len(y) for _, y in data.held_out("test")) == 100


def test_augmented_images_are_shifted_and_mirrored() -> None:
    image = torch.arange(1.0, 65).view(1, 1, 8, 8)
    data = tasks.Images((image.repeat(300, 1, 1, 1), torch.zeros(300).long()), (image,), (image,), 10, augment=True)
    (x, _) = next(iter(data.epoch(300, torch.Generator().manual_seed(0))))
    padded = nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    windows = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    expected = torch.stack([one for window in windows for one in (window, window.flip(1))]).flatten(1)
    assert torch.equal(x.flatten(1).unique(dim=0), expected.unique(dim=0))


def test_a_text_is_divided_in_order_and_labels_come_next(tmp_path: Path) -> None:
    characters = "".join(np.random.default_rng(0).choice(list("abcdefgh"), 1000))
    (tmp_path / "text.txt").write_text(characters)
    data = tasks.load(str(tmp_path), "cpu", text="text", context=8)
    assert isinstance(data, tasks.Text)
    assert data.outputs == 8
    numbers = torch.tensor(["abcdefgh".index(character) for character in characters])
    assert torch.equal(torch.cat([data.train, data.validation, data.test]), numbers)
    assert (len(data.train), len(data.validation), len(data.test)) == (900, 50, 50)
    x, y = next(iter(data.epoch(16, torch.Generator().manual_seed(0))))
    assert torch.equal(x[:, 1:], y[:, :-1])
    windows = data.train.unfold(0, 9, 1)
    assert all(bool((windows == torch.cat([a, b[-1:]])).all(1).any()) for a, b in zip(x, y, strict=True))
    held = torch.cat([labels.flatten() for _, labels in data.held_out("validation")])
    assert torch.equal(held, data.validation[1:49])
