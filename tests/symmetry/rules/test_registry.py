"""All rules together, and what happens to operations that have none."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_ecopt.symmetry.rules import RULES
from tests.symmetry.rules import (
    test_attention,
    test_cases,
    test_complex_numbers,
    test_contractions,
    test_factories,
    test_gradients,
    test_images,
    test_indexing,
    test_normalization,
    test_pointwise,
    test_reductions,
    test_views,
)
from tests.symmetry.rules.ops import Op, find

FAMILIES = [
    test_attention,
    test_cases,
    test_complex_numbers,
    test_contractions,
    test_factories,
    test_gradients,
    test_images,
    test_indexing,
    test_normalization,
    test_pointwise,
    test_reductions,
    test_views,
]

# Operations of other devices, which are called by hand, and names that no operation here has.
OUT_OF_REACH = {
    "convolution_overrideable",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm_elemt",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    "convolution_backward_overrideable",
    "cudnn_batch_norm_backward",
    "miopen_batch_norm_backward",
    "batch_norm_backward",
    "_fused_rms_norm_backward",
    "_cudnn_rnn",
    "mkldnn_rnn_layer",
    "_adaptive_avg_pool1d",
    "max_unpool1d",
    "fractional_max_pool1d",
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rpartition("_")[2])
def test_every_rule_is_tested_with_its_family(family: ModuleType) -> None:
    own = {name for name, rule in RULES.items() if rule.__module__.endswith(family.__name__.rpartition("_")[2])}
    assert own
    assert own - {op.name for op in family.OPS} - OUT_OF_REACH == set()


def test_every_rule_is_tested() -> None:
    tested = {op.name for family in FAMILIES for op in family.OPS}
    assert set(RULES) - tested - OUT_OF_REACH == set()
    assert set(RULES) >= OUT_OF_REACH
    assert not tested & OUT_OF_REACH


# What no rule may let through ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda h: torch.from_numpy(h.detach().numpy()), id="numpy"),
        pytest.param(lambda h: torch.tensor(h.tolist()), id="tolist"),
        pytest.param(lambda h: torch.tensor([[float(h.sum())]] * 8), id="float"),
        pytest.param(lambda h: h.view(torch.float32).nan_to_num(), id="view as another type"),
        pytest.param(lambda h: h.half().view(torch.bfloat16), id="view as another type of the same size"),
        pytest.param(lambda h: h.view(torch.int64).view(torch.float64), id="view there and back"),
        pytest.param(lambda h: torch.view_as_real(h.to(torch.complex128)), id="complex"),
        pytest.param(lambda h: torch.bucketize(h, torch.tensor([-0.5, 0.0, 0.5])), id="bucketize"),
        pytest.param(lambda h: h.round(decimals=1), id="round"),
        pytest.param(lambda h: h.argsort(1), id="argsort"),
        pytest.param(lambda h: h.softmax(1), id="softmax"),
        pytest.param(lambda h: h.view(8, 2, 2).permute(2, 1, 0).T.T.T, id="reversed axes"),
        pytest.param(lambda h: torch.as_strided(h, (8, 2), (4, 2)), id="as_strided"),
        pytest.param(lambda h: h.data, id="data"),
        pytest.param(lambda h: h.unfold(1, 2, 1), id="unfold"),
        pytest.param(lambda h: torch.cat([h[:, :1].add_(1), h], 1), id="written into a view"),
        pytest.param(lambda h: torch.zeros_like(h).index_add_(1, torch.tensor([1, 2, 1, 0]), h), id="index_add"),
        pytest.param(lambda h: torch.einsum("bi,bj->bij", h, h), id="einsum"),
        pytest.param(lambda h: F.normalize(h), id="normalize"),
        pytest.param(lambda h: F.alpha_dropout(h, 0.5), id="alpha dropout"),
        pytest.param(lambda h: F.dropout1d(h[:, :, None], 0.5), id="channel dropout"),
        pytest.param(lambda h: F.pad(h[:, None], (1, 1), "circular"), id="circular padding"),
        pytest.param(lambda h: F.pixel_shuffle(h[:, :, None, None], 2), id="pixel shuffle"),
        pytest.param(lambda h: h.masked_select(h > 0).sum().expand(8, 1), id="masked_select"),
        pytest.param(lambda h: h.gather(1, h.argmax(1, keepdim=True)), id="gather"),
        pytest.param(lambda h: torch.addcmul(h, h, h), id="addcmul"),
        pytest.param(lambda h: torch.lerp(h, h.roll(1, 1), 0.3), id="lerp"),
        pytest.param(lambda h: torch.sparse.mm(torch.eye(8, dtype=h.dtype).to_sparse(), h), id="sparse"),
        pytest.param(lambda h: torch.vmap(lambda row: row.cumsum(0))(h), id="vmap"),
    ],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_nothing_that_changes_the_function_gets_through(call: Callable[[Tensor], Tensor], inference: bool) -> None:
    find(Op("", lambda m, h: call(h), inference=inference))
