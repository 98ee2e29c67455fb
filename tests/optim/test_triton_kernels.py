"""The passes through Triton do what the plain ones do: in its interpreter, and on a GPU if there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.selection import full

pytestmark = full

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_script.py")
ROOT = SCRIPT.parents[2]
Found = dict[str, list[str]]


def run(task: str, of: str, cache: Path) -> Found:
    """What is wrong, by the names of the checks."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": str(int(of == "cpu")),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, str(SCRIPT), task, of]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(
    scope="module",
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run("compare", request.param, tmp_path_factory.mktemp("cache"))


def test_sums_are_those_of_the_plain_version_in_every_layout(compared: Found) -> None:
    assert compared["sums"] == []


def test_lines_that_are_too_long_have_longer_items(compared: Found) -> None:
    assert compared["items_as_long_as_lines"] == []


def test_steps_are_those_of_the_plain_version_in_every_layout(compared: Found) -> None:
    assert compared["updates"] == []


def test_coefficients_are_vectors_columns_tensors_or_numbers(compared: Found) -> None:
    assert compared["coefficients_in_every_form"] == []


def test_each_optional_coefficient_can_be_left_out(compared: Found) -> None:
    assert compared["coefficients_left_out"] == []


def test_what_is_not_finite_spreads_as_in_the_plain_version(compared: Found) -> None:
    assert compared["what_is_not_finite"] == []


def test_blocks_may_differ_in_their_dtypes(compared: Found) -> None:
    assert compared["dtypes_side_by_side"] == []


def test_rows_may_have_no_elements(compared: Found) -> None:
    assert compared["rows_without_elements"] == []


def test_gradients_may_move_in_memory_from_step_to_step(compared: Found) -> None:
    assert compared["tensors_in_other_places"] == []


def test_sums_have_the_same_bits_again(compared: Found) -> None:
    assert compared["the_same_bits_again"] == []


def test_rows_may_be_billions_of_elements_apart(compared: Found) -> None:
    assert compared["offsets_beyond_32_bits"] == []


def test_parameters_of_billions_of_elements_need_no_launches_of_their_own(compared: Found) -> None:
    assert compared["parameters_of_billions_of_elements"] == []


def test_as_many_kernels_are_launched_for_ten_times_as_many_blocks(compared: Found) -> None:
    assert compared["launches"] == []


def test_autograd_sees_which_tensors_have_changed(compared: Found) -> None:
    assert compared["versions"] == []


@pytest.mark.skipif(torch.version.hip is not None, reason="this Triton compiles for other GPUs")
def test_every_kernel_compiles_to_coalesced_accesses_without_a_gpu(tmp_path: Path) -> None:
    assert run("compile", "90", tmp_path) == {"compiled": []}
