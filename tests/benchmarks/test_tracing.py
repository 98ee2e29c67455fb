from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lightning_ecopt import scaling_group
from tests.selection import full

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import architectures  # noqa: E402
import tracing  # noqa: E402

pytestmark = full

PARAMETERS = {
    "resnet50": 25_557_032,
    "vit-b16": 86_567_656,
    "swin-t": 28_288_354,
    "mixer-b16": 59_880_472,
    "gmlp-s16": 19_422_656,
    "halonet": 127_048,
    "residual-1000": 1000 * 64 * 65,
    "gpt2": 124_439_808,
    "llama-7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", list(architectures.ARCHITECTURES))
def test_architectures_have_the_parameters_that_are_known(name: str) -> None:
    architecture = architectures.ARCHITECTURES[name]
    with torch.device("meta"):
        net, example = architecture.build(), architecture.example()
        outputs = net(example)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    expected = {"residual-1000": (1, 64), "gpt2": (1, 16, 50257), "llama-7b": (1, 16, 32000)}
    assert tuple(outputs.shape) == expected.get(name, (1, 1000))


def test_shifted_windows_do_not_look_beyond_the_edge_of_the_image() -> None:
    torch.manual_seed(0)
    attention = architectures.WindowAttention(8, 2, size=14, window=7, shift=3)
    x = torch.randn(1, 14, 14, 8)
    assert torch.equal(attention.image(attention.windows(x), 1, 14), x)
    changed = x.clone()
    changed[:, 0, 0] += 10  # wrapping puts it next to the far sides
    differs = (attention(changed) - attention(x)).abs().amax(-1)[0] > 1e-6
    assert differs[:3, :3].all()
    assert not differs[3:].any()
    assert not differs[:, 3:].any()


@pytest.mark.parametrize("turned", [0, 3])
def test_rotary_scores_depend_on_distances_alone(turned: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.double).expand(2, 1, 1, 6, 8)
    scores = architectures.rotate(q) @ architectures.rotate(k).transpose(-2, -1)
    assert scores[0, 0].diagonal(turned) == pytest.approx(scores[0, 0, 0, turned].item(), rel=1e-4)
    assert scores[0, 0, 0, 1] != pytest.approx(scores[0, 0, 0, 2])


def test_integers_are_those_of_the_index_arrays() -> None:
    net = architectures.residual(layers=6, width=3)
    group = scaling_group(net, torch.randn(1, 3))
    listed = {id(ids): ids.numel() for c in group.couplings for ids in (c.incoming, c.outgoing)}
    assert tracing.count_integers(group) >= sum(listed.values()) > 0


def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    before = tracing.peak_memory(reset=True)
    torch.ones(2**24)
    peak = tracing.peak_memory()
    assert peak - before > 2**25 or not Path("/proc/self/clear_refs").exists()
    if Path("/proc/self/clear_refs").exists():
        assert tracing.peak_memory(reset=True) < peak


def cost(name: str, seconds: list[float], forward: list[float] | None = None) -> tracing.Cost:
    return tracing.Cost(name, 10, 1000, 50, 4.0, seconds, [0.5] if forward is None else forward, 3 * 2**20)


def test_targets_are_met_or_missed_by_the_median() -> None:
    costs = [
        cost("resnet50", [0.5, 0.75, 9.0]),
        cost("swin-t", [1.0, 2.5, 3.0]),
        cost("gpt2", [1.0]),
        cost("llama-7b", [20.0], []),
    ]
    text = tracing.report(costs, " --repeats 3", {"torch": "2"})
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert rows["| ResNet-50"] == (
        "| ResNet-50 | 1,000 | 10 | 50 | 5 % | 5.0 | 4 | 0.75 (0.5 to 9) | 1 | met | 0.5 (0.5 to 0.5) | 1.5 | 3 |"
    )
    assert "| 2.5 (1 to 3) | 2 | missed |" in rows["| Swin-T"]
    assert "met" not in rows["| GPT-2"]
    assert "missed" not in rows["| GPT-2"]
    assert "| 20 | met |  |  |" in rows["| Llama-7B, meta device"]
    header, rule = (line.count("|") for line in text.splitlines() if line.startswith(("| architecture", "|---")))
    assert {header, rule} == {line.count("|") for line in rows.values()}
    assert "tracing.py --out FOLDER --repeats 3\n" in text
    assert "with torch 2." in text


def test_one_architecture_is_traced_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--only", "residual-1000", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tracing.py", *options])
    tracing.main()
    where, line = map(json.loads, (tmp_path / "tracing.jsonl").read_text().splitlines())
    assert {"torch", "numpy", "python", "device", "cores", "OMP_NUM_THREADS"} <= set(where)
    found = tracing.Cost(**line)
    assert found.parameters == PARAMETERS["residual-1000"]
    assert found.units == 64 * 500  # the stream and what is inside of each block
    assert found.integers > 0
    assert found.peak > 0
    assert len(found.seconds) == len(found.forward) == 1
    text = (tmp_path / "TRACING.md").read_text()
    assert tracing.row(found) in text
    assert "--repeats 1 --only residual-1000" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--repeats", "0"], "at least 1"), ([], "--out is needed"), (["--only", "alexnet"], "invalid choice")],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tracing.py", *options])
    with pytest.raises(SystemExit):
        tracing.main()
    assert message in capsys.readouterr().err


def test_a_failure_is_named_after_the_others_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def traced(name: str, repeats: int) -> tracing.Cost:
        if name == "gpt2":
            raise RuntimeError("gpt2 failed")
        return cost(name, repeats * [1.0])

    monkeypatch.setattr(tracing, "measure_apart", traced)
    monkeypatch.setattr(sys, "argv", ["tracing.py", "--out", str(tmp_path), "--repeats", "2"])
    with pytest.raises(SystemExit, match="gpt2 failed"):
        tracing.main()
    assert len((tmp_path / "tracing.jsonl").read_text().splitlines()) == len(PARAMETERS)
    assert "Llama-7B" in (tmp_path / "TRACING.md").read_text()
    assert "residual-1000: 1 (1 to 1) s met" in capsys.readouterr().out
