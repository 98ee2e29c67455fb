from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_ecopt import EquivalentClassOptimizer, scaling_group
from tests.selection import full

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pages  # noqa: E402
import step_cases  # noqa: E402
import step_overhead  # noqa: E402
import step_tables  # noqa: E402
import tasks  # noqa: E402
from step_cases import Case, Extras, Result  # noqa: E402

pytestmark = full

CPU = torch.device("cpu")
START, END = "<!-- step overhead -->", "<!-- /step overhead -->"
PARAMETERS = {
    "mlp-small": 55_050,
    "mlp": 785 * 2048 + 3 * 2049 * 2048 + 2049 * 10,
    "vgg13": 9_413_066,
    "resnet18": 11_173_962,
    "resnet50": 25_557_032,
    "vit-b16": 86_567_656,
    "gpt2": 124_439_808,
}
TINY = step_cases.Network(
    "tiny", lambda: tasks.mlp(16, 1, 8, True, "he"), step_cases.images(4, 1), batch=6, is_cnn=True, has_pause=True
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step_cases.NETWORKS, "tiny", TINY)
    monkeypatch.setattr(step_overhead, "LEAST_SECONDS", 0)


def call(*options: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["step_overhead.py", "--device", "cpu", *map(str, options)])
        step_overhead.main()


def measure(folder: Path, *options: object) -> list[Result]:
    call("--out", folder, "--networks", "tiny", "--runs", 2, "--training-runs", 2, "--batch", 4, *options)
    return list(step_cases.read_results(folder / "step_overhead.jsonl").values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step_cases.NETWORKS, "tiny", TINY)
        patch.setattr(step_overhead, "LEAST_SECONDS", 0)
        measure(folder, "--optimizers", "sgd-m", "adamw")
    return folder


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_networks_have_the_parameters_that_are_known(name: str) -> None:
    network = step_cases.NETWORKS[name]
    with torch.device("meta"):
        net, inputs = network.build(), network.inputs(2)
        outputs = net(inputs)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert outputs.shape[0] == 2
    assert outputs.shape[-1] == {"resnet50": 1000, "vit-b16": 1000, "gpt2": 50257}.get(name, 10)


def test_batches_on_a_gpu_are_of_real_size() -> None:
    found = {}
    for name, network in step_cases.NETWORKS.items():
        with torch.device("meta"):
            found[name] = tuple(network.inputs_on(torch.device("meta")).shape)
    assert found["resnet50"] == (256, 3, 224, 224)
    assert found["vit-b16"] == (128, 3, 224, 224)
    assert found["gpt2"] == (16, 1024)
    assert found["vgg13"] == (512, 3, 32, 32)
    assert step_cases.NETWORKS["gpt2"].inputs_on(CPU).shape == (1, 128)
    assert len(TINY.inputs_on(CPU)) == 128
    assert len(TINY.inputs_on(CPU, 5)) == 5


def test_every_combination_is_measured_with_plausible_figures(folder: Path) -> None:
    results = step_cases.read_results(folder / "step_overhead.jsonl")
    (where,) = pages.read_conditions(folder / "step_overhead.jsonl")
    asked = {
        Case(part, "cpu", "tiny", optimizer, rule, "auto")
        for part in ("step", "training", "pause")
        for optimizer in ("sgd-m", "adamw")
        for rule in ("unit", "path")
    }
    assert set(results) == asked
    for result in results.values():
        assert len(result.base) == len(result.ec) == 2
        assert min(result.base + result.ec) > 0
        assert result.setting in ("fused", "foreach")
        assert (result.waits, result.autocast) == (None, False)
        if result.case.part != "step":
            assert (result.batch, result.extras) == (4 if result.case.part == "training" else None, None)
            continue
        extras = result.extras
        assert extras is not None
        assert extras.units == 8
        assert extras.parameters == 4 * (16 * 8 + 8 + 8 * 10 + 10)
        assert extras.first > min(result.ec)
        launched_by_base, launched = extras.launches
        assert min(extras.tracing, extras.held, launched_by_base) > 0
        assert min(extras.refresh, launched, *extras.peaks) >= 0  # a call of C is no operation of torch
    assert {"torch", "device", "cores", "threads of torch", "OMP_NUM_THREADS", "seed", "runs"} <= set(where)
    assert "--optimizers sgd-m adamw" in where["command"]
    assert str(folder) not in where["command"]


def test_an_interrupted_run_goes_on_with_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "step_overhead.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"training"' not in line or '"path"' not in line) + "\n")
    monkeypatch.delattr(step_overhead, "measure_step")
    before = set(step_cases.read_results(path))
    after = {result.case for result in measure(folder, "--optimizers", "sgd-m", "adamw")}
    assert {(c.part, c.rule, c.optimizer) for c in after - before} == {
        ("training", "path", "sgd-m"),
        ("training", "path", "adamw"),
    }
    monkeypatch.delattr(step_overhead, "measure_training")
    assert len(measure(folder, "--optimizers", "sgd-m", "adamw")) == len(after) == 12


def test_a_case_that_fails_is_named_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(case: Case, *_: object) -> Result:
        raise RuntimeError(f"no memory for {case.rule}")

    monkeypatch.setattr(step_overhead, "measure_step", fails)
    with pytest.raises(SystemExit, match="step cpu tiny sgd-m unit auto: no memory for unit"):
        measure(tmp_path, "--optimizers", "sgd-m", "--rules", "unit", "--parts", "step", "training")
    (result,) = step_cases.read_results(tmp_path / "step_overhead.jsonl").values()
    assert result.case.part == "training"
    assert "training cpu tiny sgd-m unit auto: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "1"], "at least 2"),
        (["--networks", "alexnet"], "invalid choice"),
        (["--rules", "both"], "invalid choice"),
        (["--report"], "no results"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call("--out", tmp_path, *options)
    assert message in capsys.readouterr().err


def test_a_line_of_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_overhead.jsonl"
    path.write_text('{"torch": "2"}\n{"case": {"task": "VGG"}}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .* is no result of this benchmark"):
        step_cases.read_results(path)


def test_parts_and_autocast_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--optimizers", "sgd-m", "--rules", "unit", "--parts", "host", "training", "--autocast"]
    host, training = measure(tmp_path, *chosen)
    assert (host.case.part, host.autocast, training.case.part, training.autocast) == ("host", False, "training", True)
    assert host.waits is None
    (where,) = pages.read_conditions(tmp_path / "step_overhead.jsonl")
    assert "--parts host training" in where["command"]
    assert where["command"].endswith("--autocast")
    shown = capsys.readouterr().out
    assert "Host time of a step, cpu" in shown
    assert "4, bf16" in shown
    assert "Pause" not in shown


# How it measures ------------------------------------------------------------------------------------------------------


def test_base_and_equivalent_form_take_turns() -> None:
    order: list[str] = []
    seconds = step_overhead.alternate([lambda: order.append("base"), lambda: order.append("ec")], CPU, 4)
    assert [len(times) for times in seconds] == [4, 4]
    assert order[-8:] == 4 * ["base", "ec"]
    assert order[: 2 * step_overhead.WARM_UP] == step_overhead.WARM_UP * ["base", "ec"]


def test_short_steps_are_repeated_within_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_overhead, "LEAST_SECONDS", 1.0)
    calls: list[str] = []
    step_overhead.alternate([lambda: calls.append("base")], CPU, 2)
    assert len(calls) == step_overhead.WARM_UP + 1 + 2 * step_overhead.MOST_STEPS


def test_the_host_time_ends_when_the_last_of_a_few_steps_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0])
    events: list[str] = []
    monkeypatch.setattr(step_overhead.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(step_overhead, "synchronize", lambda device: events.append(f"wait, {clock.__length_hint__()}"))
    seconds = step_overhead.until_return(lambda: events.append("step"), CPU)
    assert seconds == 5.0 / step_overhead.FEW_STEPS
    assert events == ["wait, 2", *step_overhead.FEW_STEPS * ["step"], "wait, 0"]


def test_waits_for_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert step_overhead.waits(step, torch.device("cuda")) == step_overhead.FEW_STEPS
    assert modes == ["warn", 0]
    assert step_overhead.waits(step, CPU) is None


def test_the_pause_is_that_of_new_optimizers() -> None:
    net = TINY.build()
    step_overhead.set_gradients(net)
    before = [p.detach().clone() for p in net.parameters()]
    found = step_overhead.measure_pause(result("pause").case, net, "foreach", CPU, 3)
    assert [len(found.base), len(found.ec)] == [3, 3]
    assert min(found.ec) > max(found.base)  # it has traced
    assert all(map(torch.equal, before, net.parameters()))


def test_the_copies_start_with_the_same_weights_and_gradients_and_stay_there() -> None:
    net = TINY.build()
    step_overhead.set_gradients(net)
    other = step_overhead.twin(net)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
        assert p.grad.data_ptr() != q.grad.data_ptr()
    for optimizer in step_cases.OPTIMIZERS.values():
        step = optimizer.make(net, "foreach").step
        for _ in range(20):
            step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


@pytest.fixture
def stepped() -> tuple[nn.Module, EquivalentClassOptimizer]:
    net = TINY.build()
    step_overhead.set_gradients(net)
    base = step_cases.OPTIMIZERS["adamw"].make(net, "foreach")
    optimizer = EquivalentClassOptimizer(base, scaling_group(net, TINY.inputs(2)), rule="unit")
    optimizer.step()
    return net, optimizer


def test_memory_held_is_that_of_all_tensors_put_there(stepped: tuple[nn.Module, EquivalentClassOptimizer]) -> None:
    net, optimizer = stepped
    before = step_overhead.held_bytes(optimizer, net)
    tensor = torch.zeros(1000)
    optimizer.extra = {"deep": [(tensor, tensor[:10])]}  # type: ignore[attr-defined]
    assert step_overhead.held_bytes(optimizer, net) == before + 4000
    other = torch.zeros(500, dtype=torch.double)
    optimizer.closure = lambda: other  # type: ignore[attr-defined]
    assert step_overhead.held_bytes(optimizer, net) == before + 8000
    optimizer.bound = functools.partial(torch.add, torch.zeros(25))  # type: ignore[attr-defined]
    assert step_overhead.held_bytes(optimizer, net) == before + 8100


def test_weights_gradients_and_the_state_of_the_base_are_not_held_beside_it(
    stepped: tuple[nn.Module, EquivalentClassOptimizer],
) -> None:
    net, optimizer = stepped
    assert optimizer.group is not None
    before = step_overhead.held_bytes(optimizer, net)
    known = [*net.parameters(), *(p.grad for p in net.parameters()), *optimizer.state[next(net.parameters())].values()]
    optimizer.extra = [*known, net]  # type: ignore[attr-defined]
    assert step_overhead.held_bytes(optimizer, net) == before
    group = sum(8 * (c.incoming.numel() + c.outgoing.numel()) for c in optimizer.group.couplings)
    assert before > group


def test_the_peak_is_the_most_that_is_allocated_at_one_time() -> None:
    def step() -> Tensor:
        torch.empty(10_000)
        first = torch.empty(3_000)
        second = torch.empty(4_000)
        del first
        return second

    assert step_overhead.usage(step, CPU)[0] == 40_000

    def together() -> None:
        kept = [torch.empty(10_000), torch.empty(20_000)]
        del kept

    assert step_overhead.usage(together, CPU)[0] == 120_000


def test_launches_are_the_outermost_operations() -> None:
    x, layer = torch.zeros(2, 3), nn.Linear(3, 3)
    assert step_overhead.usage(lambda: x.add_(1), CPU)[1] == 1
    assert step_overhead.usage(lambda: layer(x).relu_(), CPU)[1] == 2  # linear is made of t and addmm
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    fused = torch.optim.SGD([parameter], lr=0.1, fused=True)
    assert step_overhead.usage(fused.step, CPU)[1] == 1  # within an annotation of the step


# Tables ---------------------------------------------------------------------------------------------------------------


def result(part: str = "step", optimizer: str = "sgd-m", ratio: float = 1.5, **changes: object) -> Result:
    case = Case(part, "cpu", "tiny", optimizer, "unit", "auto")
    for name in set(changes) & {field.name for field in dataclasses.fields(Case)}:
        case = dataclasses.replace(case, **{name: changes.pop(name)})
    extras = Extras(8, 1000, 0.1, 0.2, 0.5, 10, (100, 112), (1, 9))
    base = [0.25, 0.5, 1.0]
    made = Result(case, "fused", None, base, [ratio * seconds for seconds in base], extras)
    if part != "step":
        made = dataclasses.replace(made, batch=128 if part == "training" else None, extras=None)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (result(ratio=1.5), "met"),
        (result(ratio=1.75), "missed"),
        (result(ratio=1.5625, device="cuda"), "missed"),
        (result(optimizer="adamw", ratio=1.75), "missed"),
        (result(optimizer="adamw", ratio=1.5, device="cuda"), "met"),
        (result(ratio=1.5, network="mlp-small"), ""),
        (result(optimizer="adam", ratio=9.0), ""),
        (result("training", ratio=1.015625), "met"),
        (result("training", ratio=1.03125), "missed"),
        (result("training", ratio=1.03125, batch=2), ""),
        (result("training", ratio=1.03125, network="gpt2"), ""),
        (result("training", ratio=1.015625, network="gpt2", device="cuda"), ""),
        (result("training", ratio=1.015625, network="gpt2", device="cuda", autocast=True), "missed"),
        (result("training", ratio=1.0, network="gpt2", device="cuda", autocast=True), "met"),
        (result("host", ratio=1.0, network="resnet50", device="cuda"), ""),
    ],
)
def test_ratios_are_met_or_missed_where_there_is_a_target(found: Result, verdict: str) -> None:
    assert step_tables.Figures([found]).verdict("ratio", found) == verdict


def test_host_times_and_waits_have_targets_on_a_gpu() -> None:
    quick = result("host", ratio=1.5, network="resnet50", device="cuda", base=[4e-4], ec=[6e-4], waits=0)
    slow = dataclasses.replace(quick, ec=[0.002], waits=3)
    figures = step_tables.Figures([quick, slow])
    assert [figures.judged("host", one) for one in (quick, slow)] == ["0.6 met", "2 missed"]
    assert [figures.judged("waits", one) for one in (quick, slow)] == ["0 met", "3 missed"]
    other = result("host", network="gpt2", device="cuda", ec=[0.002], waits=0)
    assert [figures.judged(figure, other) for figure in ("host", "waits")] == ["2", "0 met"]
    on_cpu = result("host", network="resnet50", ec=[0.002])
    assert [figures.judged(figure, on_cpu) for figure in ("host", "waits")] == ["2", ""]


def test_the_page_about_speed_has_a_row_for_each_figure() -> None:
    found = [
        result(ratio=1.5),
        result(ratio=1.75, network="vgg13"),
        result("training", ratio=1.0),
        result(ratio=3.0, network="mlp-small"),
        result("host", network="resnet50", device="cuda", base=[2.5e-4], ec=[5e-4]),
        result("pause", network="resnet18", base=[0.125, 0.125], ec=[0.5, 0.5]),
        result(ratio=1.5, network="resnet18", device="cuda"),
    ]
    table = step_tables.short_table(step_tables.Figures(found))
    unit = {(row[0], row[1].split(",")[0].split(" of ")[0]): row[2] for row in table.rows}
    assert unit == {
        ("cpu", "step alone"): "1.50 to 1.75, 1 of 2 met",
        ("cpu", "whole training step"): "1.00, 1 of 1 met",
        ("cpu", "small MLP"): "3.000 (3.000 to 3.000)",
        ("cpu", "pause"): "0.38",
        ("cuda", "step alone"): "1.50, 1 of 1 met",
        ("cuda", "whole training step"): "not measured",
        ("cuda", "small MLP"): "not measured",
        ("cuda", "host time"): "0.25 to 0.5 met",
        ("cuda", "pause"): "0.2 if it compiles",
    }
    assert {cell for row in table.rows for cell in row[3:]} == {"not measured"}


def test_memory_is_compared_with_the_parameters_and_the_peak_with_that_of_the_base() -> None:
    found = result()
    figures = step_tables.Figures([found])
    assert figures.judged("held", found) == "1 % met"
    assert figures.judged("peak", found) == "1.2 % met"


def test_a_refresh_is_compared_with_training_steps_of_the_same_optimizer_if_there_are_any() -> None:
    step = result()
    other = result("training", "adamw", base=[0.01], ec=[0.01])
    assert step_tables.Figures([step]).judged("refresh", step) == ""
    assert step_tables.Figures([step, other]).judged("refresh", step) == "10 % missed"
    same = result("training", base=[0.1], ec=[0.1])
    assert step_tables.Figures([step, other, same]).judged("refresh", step) == "1 % met"


def test_the_ratio_is_that_of_neighbouring_runs() -> None:
    found = result(base=[1.0, 2.0, 4.0], ec=[2.0, 2.0, 6.0])
    assert step_tables.Figures([found]).judged("ratio", found) == "1.500 (1.250 to 1.750) met"


def test_the_report_counts_targets_and_replaces_what_pages_say(folder: Path, tmp_path: Path) -> None:
    page, readme = tmp_path / "speed.md", tmp_path / "README.md"
    page.write_text(f"Before\n\n{START}\nold | table\n{END}\n\nAfter\n")
    readme.write_text("Before\n\n<!-- cost -->\nold\n<!-- /cost -->\n")
    report = ["--out", folder, "--report", "--readme", readme, "--speed", page]
    call(*report)
    once, said = page.read_text(), readme.read_text()
    call(*report)
    assert page.read_text() == once
    assert readme.read_text() == said
    assert "old" not in said
    assert said.count("On large networks (cpu) an optimizer step takes ") == 1
    assert once.startswith(f"Before\n\n{START}\n\n| device |  | SGD-M, unit |")
    assert once.endswith(f"|\n\n{END}\n\nAfter\n")
    assert "old" not in once
    assert once.count("\n| cpu | ") == 4
    text = (folder / "STEP_OVERHEAD.md").read_text()
    (folder / "STEP_OVERHEAD.md").unlink()
    call("--out", folder, "--report")
    assert (folder / "STEP_OVERHEAD.md").read_text() == text
    assert page.read_text() == once
    assert str(folder) not in text
    assert "threads of torch 1" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| EC-AdamW")]
    assert [(row[1], row[2], int(row[3]) + int(row[4])) for row in rows] == [("cpu", "1.6", 1), ("cpu", "1.7", 1)]


@pytest.mark.parametrize("text", ["none", "{start}{start}{end}", "{end}{start}", "{start}"])
def test_a_readme_without_a_place_for_the_table_stays_as_it_is(
    text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    text = text.format(start=START, end=END)
    readme.write_text(text)
    with pytest.raises(SystemExit):
        call("--out", folder, "--report", "--speed", readme)
    assert "each once" in capsys.readouterr().err
    assert readme.read_text() == text


def test_results_can_be_read_back(folder: Path) -> None:
    path = folder / "step_overhead.jsonl"
    found = step_cases.read_results(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    stored = [line for line in lines if "case" in line]
    assert [json.loads(json.dumps(dataclasses.asdict(r))) for r in found.values()] == stored
