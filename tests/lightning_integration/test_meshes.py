"""Networks whose parameters are cut along any axis, over a mesh of any dimensions, are trained as whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lightning_integration import mesh_script as script
from tests.lightning_integration.runs import launch
from tests.selection import full

SIZES = (2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """For each number of processes the results of all ranks."""
    folder = tmp_path_factory.mktemp("meshes")
    for size in SIZES:
        launch("mesh_script", folder, size)
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


def size_of(layout: str) -> int:
    return torch.Size(script.LAYOUTS[layout][0]).numel()


@pytest.fixture(scope="module")
def whole() -> dict[str, dict[str, Any]]:
    """The training of one process that holds everything."""
    return {base: script.train_whole(base) for base in script.BASES}


@full
@pytest.mark.parametrize(("layout", "base"), script.RUNS)
def test_training_is_that_of_one_process(found: Any, whole: Any, layout: str, base: str) -> None:
    for rank in found[size_of(layout)]:
        own = rank[f"{layout} {base}"]
        assert own["weights"].keys() == whole[base]["weights"].keys()
        for name, weight in whole[base]["weights"].items():
            assert float((own["weights"][name] - weight).abs().max()) <= 1e-12 * float(weight.abs().max()), name
        torch.testing.assert_close(own["imbalance"], whole[base]["imbalance"], rtol=1e-12, atol=0)


@full
@pytest.mark.parametrize(("layout", "base"), script.RUNS)
def test_all_ranks_have_the_same_bits(found: Any, layout: str, base: str) -> None:
    first, *others = (rank[f"{layout} {base}"]["weights"] for rank in found[size_of(layout)])
    for other in others:
        assert all(torch.equal(other[name], weight) for name, weight in first.items())


@full
@pytest.mark.parametrize(("layout", "base"), script.RUNS)
def test_a_step_takes_three_sums_and_gathers_nothing(found: Any, layout: str, base: str) -> None:
    for rank in found[size_of(layout)]:
        for collectives in rank[f"{layout} {base}"]["collectives"]:
            assert collectives.keys() == {"c10d.allreduce_"}
        assert [sum(of.values()) for of in rank[f"{layout} {base}"]["collectives"]][1::2] == [3, 3]  # no refresh


@full
def test_what_is_cut_is_not_held_whole(found: Any) -> None:
    whole = sum(p.numel() for p in script.build()[1].parameters.values())
    held = [rank["two dimensions sgd"]["held"] for rank in found[4]]
    assert sum(held) == whole
    assert max(held) < 0.3 * whole


@full
@pytest.mark.parametrize("name", ["both", "replicas", "first", "second", "strided", "few", "copy", "plain"])
def test_each_element_counts_once(found: Any, name: str) -> None:
    for rank in found[4]:
        assert (rank["counted"][name] == 1).all()


@full
def test_what_cannot_be_added_up_is_refused_by_name(found: Any) -> None:
    for rank in found[4]:
        assert rank["refusals"]["partial"].startswith("net.weight is placed as (Partial(sum), Shard(dim=0))")
        assert "requires_grad_(False)" in rank["refusals"]["partial"]
        assert rank["refusals"]["apart"].startswith("two is sharded over the ranks [")
        assert rank["refusals"]["apart"].endswith("over one mesh, or over dimensions of one mesh.")


@full
def test_a_mesh_of_some_ranks_needs_none_of_the_others(found: Any) -> None:
    assert [rank["some"] is None for rank in found[4]] == [False, False, True, True]
    assert found[4][0]["some"].tolist() == found[4][1]["some"].tolist() == [3.0, 3.0]
