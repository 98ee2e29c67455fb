"""Rules for recurrent networks that a library runs as one operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt.symmetry import scaling_group
from lightning_ecopt.symmetry.equations import Equations
from lightning_ecopt.symmetry.labels import FIXED, ParameterView
from lightning_ecopt.symmetry.rules import RULES
from tests.symmetry.helpers import assert_complete, directions, normal
from tests.symmetry.rules.ops import directly


class _Recurrent(nn.Module):
    """Hidden features, a recurrent network, a linear map."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.network = nn.Linear(2, 4), nn.LSTM(4, 3, **options)
        self.last = nn.Linear(6 if options.get("bidirectional") else 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.network(self.first(x).relu())[0])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="one layer"),
        pytest.param({"num_layers": 2}, id="two layers"),
        pytest.param({"bidirectional": True}, id="both directions"),
        pytest.param({"num_layers": 2, "bidirectional": True, "bias": False}, id="without bias"),
        pytest.param({"batch_first": True}, id="batch first"),
    ],
)
def test_a_layer_as_one_operation_has_the_freedoms_of_its_parts(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, rule, met = _Recurrent(**options), RULES["mkldnn_rnn_layer"], []
    monkeypatch.setitem(RULES, "mkldnn_rnn_layer", lambda call: met.append(call) or rule(call))
    fused = scaling_group(module, torch.zeros(5, 3, 2))
    assert len(met) == options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert fused.num_units == 4
    assert_complete(module.double(), normal((5, 3, 2)))
    taken_apart = scaling_group(module, torch.zeros(5, 3, 2, dtype=torch.float64))
    assert len(met) == options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    torch.testing.assert_close(directions(fused), directions(taken_apart))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_accelerators_network_lets_input_channels_scale_and_grounds_the_rest(bidirectional: bool, layers: int) -> None:
    count = layers * (2 if bidirectional else 1)
    first = range(count // layers)  # numbers of the layers that read the input
    shapes = {"ih": (12, 4), "hh": (12, 3), "b": (12,), "c": (12,)}
    equations = Equations(
        {f"{name}{k}": shape for k in range(count) for name, shape in shapes.items()} | {"v": (5, 2, 4)}
    )
    weights = {
        f"{name}{k}": (torch.zeros(shape), ParameterView.whole(f"{name}{k}", shape))
        for k in range(count)
        for name, shape in shapes.items()
    }
    features = equations.fresh((1, 1, 4))
    state = equations.fresh((1, 1, 3))
    hidden = torch.zeros(count, 2, 3)
    labels = directly(
        "_cudnn_rnn",
        equations,
        (torch.zeros(5, 2, 3 * len(first)), hidden.clone(), hidden.clone(), torch.zeros(0), torch.zeros(0)),
        {"input": (torch.zeros(5, 2, 4), features), "hx": (hidden, state), **weights},
        weight=[tensor for tensor, _ in weights.values()],
        weight_stride0=4,
        bidirectional=bidirectional,
        cx=None,
        dropout_state=None,
    )
    assert [ids.ndim for ids in labels] == [3, 3, 3, 1, 1]
    assert all((ids == FIXED).all() for ids in labels)
    np.testing.assert_array_equal(np.unique(np.concatenate([ids for _, ids in equations.fixings])), state.ravel())
    assert not equations.equalities
    for name in weights:
        (use,) = equations.uses[name]
        assert (use.incoming == FIXED).all()
        expected = features.ravel() if name.startswith("ih") and int(name[2:]) in first else [FIXED]
        np.testing.assert_array_equal(use.outgoing.ravel(), expected)
