"""A trace changes the process and the module while it runs, and leaves both as they were, whatever ends it."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_ecopt import ECSGD, scaling_group
from lightning_ecopt.common.shared import Shared
from lightning_ecopt.symmetry import GroupFromModuleCalls, GroupFromNextCall, KnownGroup, isolation, threads
from tests.networks import mlp
from tests.selection import few

X = torch.eye(4)
KINDS = few([KeyboardInterrupt, SystemExit, GeneratorExit, ValueError], [KeyboardInterrupt, ValueError])


def process() -> dict[str, Any]:
    """All that the table of ``isolation`` says of the process and the thread."""
    return {
        "dispatch modes": tuple(_get_current_dispatch_mode_stack()),
        "function modes": tuple(_get_current_function_mode_stack()),
        "attention": torch.backends.mha.get_fastpath_enabled(),
        "stance": eval_frame._stance,
        "Thread.start": threading.Thread.start,
        "Module.__call__": nn.Module.__call__,
        "module hooks": (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)),
        "log": list(isolation._LOG.filters),
        "cuDNN": torch.backends.cudnn.enabled,
        "cuDNN's choice": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "lifting": torch._C._only_lift_cpu_tensors(),
        "gradients": torch.is_grad_enabled(),
        "traces of the thread": tuple(threads.here.entries),
        "waiting": (dict(isolation._waiting), dict(isolation._awaited)),
    }


def randomness() -> tuple[Any, ...]:
    numpy = np.random.get_state()
    torchs = tuple(torch.get_rng_state().tolist()), tuple(map(id, torch.cuda._lazy_seed_tracker.get_calls()))
    return random.getstate(), (numpy[0], tuple(numpy[1]), *numpy[2:]), *torchs


def state(module: nn.Module) -> list[tuple[Any, ...]]:
    """All that the table says of a module: attributes and what is in them, by identity, and values."""
    found: list[tuple[Any, ...]] = []
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            content = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else value
            found.append((name, key, id(value), content))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found += [(name, t.requires_grad, None if t.grad is None else id(t.grad), t.tolist()) for name, t in tensors]
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(few_objects: None) -> Iterator[None]:
    gc.collect()
    before = process()
    yield
    gc.collect()
    assert process() == before


class Ended(nn.Module):
    """Changes all that it can, and is ended by an exception at one place of its call."""

    PLACES = ("at the start", "inside a part", "between parts", "in an operation", "at the end")

    def __init__(self, place: str, kind: type[BaseException] | None, *, real: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), mlp(6, 5, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []
        self.array = np.zeros(2)
        self.place, self.kind, self.real = place, kind, real
        self.last[1].register_forward_pre_hook(lambda *_: self.end("inside a part"))

    def end(self, place: str) -> None:
        if place == self.place and self.kind is not None:
            raise self.kind("ended")

    def forward(self, x: Tensor) -> Tensor:
        self.end("at the start")
        if self.real:
            assert float(x.sum()) > 0  # which a fake tensor has no answer to
        self.calls += 1
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1)
        self.array += random.random() + np.random.rand()
        h = self.first(x)
        self.seen.append(h)
        self.end("between parts")
        if self.place == "in an operation" and self.kind is not None:
            h = Ending.apply(h, self.kind)
        y = self.last(h + 0 * torch.rand(()))
        self.new = y
        self.end("at the end")
        return y


class Ending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: type[BaseException]) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            x * 2
            raise kind("ended")


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize("place", Ended.PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_traced_call_leaves_nothing(kind: type[BaseException], place: str, real: bool) -> None:
    module = Ended(place, kind, real=real)
    before = process(), randomness(), state(module)
    with pytest.raises(kind, match="ended"):
        scaling_group(module, X)
    assert (process(), randomness(), state(module)) == before


@pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])
def test_a_trace_leaves_nothing(real: bool) -> None:
    module = Ended("at the end", None, real=real)
    module(X).sum().backward()
    before = process(), randomness(), state(module)
    scaling_group(module, X)
    assert (process(), randomness(), state(module)) == before


@pytest.mark.parametrize("place", Ended.PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_the_awaited_call_of_a_method_leaves_nothing_but_the_wait(
    kind: type[BaseException], place: str
) -> None:
    module = Ended(place, kind)
    expected = Ended(place, None)
    pending = GroupFromNextCall(module, "forward")
    before = process()
    with pytest.raises(kind, match="ended"):
        module(X)
    assert process() == before
    assert pending.group is None
    module.kind = None
    module(X)
    assert pending.group is not None
    assert pending.group.num_units == scaling_group(expected, X).num_units
    assert "forward" not in vars(module)


@pytest.mark.parametrize("place", Ended.PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_an_awaited_call_of_modules_leaves_nothing_but_the_wait(
    kind: type[BaseException], place: str
) -> None:
    module = Ended(place, kind)
    pending = GroupFromModuleCalls(module.parameters())
    before = process()
    with pytest.raises(kind, match="ended"):
        module(X)
    assert process() == before
    module.kind = None
    module(X)
    assert pending.group is not None
    assert pending.group.unseen == ()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_a_hook_of_the_outermost_call_leaves_nothing(kind: type[BaseException]) -> None:
    def end(*_: Any) -> None:
        raise kind("ended")

    for register in (nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook):
        module = mlp(4, 6, 2)
        pending = GroupFromModuleCalls(module.parameters())
        before = process()
        handle = register(module, end)
        with pytest.raises(kind, match="ended"):
            module(X)
        assert process() == before
        handle.remove()
        module(X)
        assert pending.group is not None
        assert pending.group.num_units == 6


def test_torch_logs_no_error_of_a_trace_with_fake_tensors_but_those_of_other_threads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, logged = threading.Event(), threading.Event()

    def log() -> None:
        begun.wait(20)
        isolation._LOG.error("theirs")
        logged.set()

    def meet() -> None:
        begun.set()
        logged.wait(20)

    other = threading.Thread(target=log)
    other.start()
    isolation._LOG.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            scaling_group(Calling(meet), torch.ones(3, 5))
    finally:
        isolation._LOG.removeHandler(caplog.handler)
        other.join()
    assert {record.message for record in caplog.records} == {"theirs"}


# Waiting --------------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_nobody_holds_waits_no_longer() -> None:
    before = process()
    optimizer = ECSGD(mlp(4, 6, 2).parameters(), lr=0.1)
    assert nn.Module.__call__ is not before["Module.__call__"]
    del optimizer
    gc.collect()
    assert process() == before


def test_the_last_one_that_waits_gives_the_call_back() -> None:
    original = nn.Module.__call__
    one, other = (GroupFromModuleCalls(mlp(4, 6, 2).parameters()) for _ in range(2))
    one.cancel()
    one.cancel()
    assert nn.Module.__call__ is not original
    other.cancel()
    assert nn.Module.__call__ is original


def test_waiting_spares_what_someone_else_has_put_there_since(monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Module.__call__
    pending = GroupFromModuleCalls(mlp(4, 6, 2).parameters())
    between = nn.Module.__call__

    def theirs(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return between(self, *args, **kwargs)

    nn.Module.__call__ = theirs  # type: ignore[method-assign]
    try:
        pending.cancel()
        assert nn.Module.__call__ is theirs
        assert scaling_group(mlp(4, 6, 2), X).num_units == 6
        assert nn.Module.__call__ is theirs
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


def test_keywords_of_any_name_reach_the_module() -> None:
    class Named(nn.Module):
        def forward(self, module: Tensor, call: float, original: float) -> Tensor:
            return module * call * original

    module = nn.Sequential(mlp(4, 6, 2), Named())
    pending = GroupFromModuleCalls(module.parameters())
    whole = Named()
    whole.net = module[0]
    assert torch.equal(whole(module=X, call=2.0, original=3.0), 6 * X)
    pending.cancel()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_waits_for_calls_of_its_own_parameters(copied: Callable[[Any], Any]) -> None:
    module = mlp(4, 6, 2)
    pending = GroupFromModuleCalls(module.parameters())
    twin, own = copied((module, pending))
    twin(X)
    assert pending.group is None
    assert own.group is not None
    assert set(map(id, own.group.parameters.values())) == set(map(id, twin.parameters()))
    pending.cancel()


def test_modules_are_pickled_scripted_and_traced_symbolically_while_somebody_waits() -> None:
    module = mlp(4, 6, 2)
    pending = GroupFromModuleCalls(module.parameters())
    with torch.no_grad():  # nobody waits for such calls
        expected = module(X)
    assert torch.equal(pickle.loads(pickle.dumps(module))(X), expected)
    assert [node.op for node in torch.fx.symbolic_trace(module).graph.nodes].count("call_module") == 3
    with pytest.warns(DeprecationWarning, match="script"):
        assert torch.equal(torch.jit.script(module)(X), expected)
    module(X)
    assert pending.group is not None
    assert pending.group.num_units == 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * 2


@pytest.mark.parametrize(
    "form", ["wrapped", "in place", "part", "method", "called before", "wrapped while it is waited for"]
)
def test_a_compiled_module_is_traced_while_somebody_waits_and_compiles_afterwards(form: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    module: Any = Block()
    called: Any = module
    if form == "in place":
        module.compile(backend=counter)
    elif form == "part":
        called = nn.Sequential(torch.compile(module, backend=counter, fullgraph=True), nn.Identity())
    elif form == "method":
        module.forward = torch.compile(module.forward, backend=counter)
    elif form != "wrapped while it is waited for":
        called = torch.compile(module, backend=counter, fullgraph=True)
    if form == "called before":
        called(X)
    compiled = counter.frame_count
    pending = GroupFromModuleCalls(module.parameters())
    if form == "wrapped while it is waited for":
        called = torch.compile(module, backend=counter, fullgraph=True)
    expected = called(X)
    assert counter.frame_count == compiled  # it ran uncompiled
    assert pending.group is not None
    assert pending.group.num_units == 6
    torch.testing.assert_close(called(X), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_compiled_function_breaks_its_graph_at_a_module_that_is_waited_for() -> None:
    torch._dynamo.reset()
    module = Block()
    pending = GroupFromModuleCalls(module.parameters())
    assert torch.equal(torch.compile(lambda x: module(x) + 1, backend="eager")(X), module(X) + 1)
    assert pending.group is not None
    assert pending.group.num_units == 6
    torch._dynamo.reset()


def test_other_compiled_functions_stay_whole_while_somebody_waits() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    pending, other = GroupFromModuleCalls(Block().parameters()), Block()
    function = torch.compile(lambda x: other(x) + 1, backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(function(X), other(X) + 1)
    assert counter.frame_count == 1
    pending.cancel()
    torch.testing.assert_close(function(X), other(X) + 1)
    torch._dynamo.reset()


def test_a_known_group_is_there_and_cannot_be_cancelled() -> None:
    group = scaling_group(mlp(4, 6, 2), X)
    known = KnownGroup(group)
    known.cancel()
    assert known.settle() is known.group is group
    assert known.missing == ""


# Several traces -------------------------------------------------------------------------------------------------------


class Calling(nn.Module):
    """Calls a function, then a network."""

    def __init__(self, function: Callable[[], object], *, real: bool = False) -> None:
        super().__init__()
        self.net = mlp(4, 6, 2)
        self.__dict__["function"] = function
        self.real = real

    def forward(self, x: Tensor) -> Tensor:
        self.function()
        if self.real:
            assert float(x.sum()) > 0
        return self.net(x)


@pytest.mark.parametrize("outer", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize("inner", [False, True], ids=["fake", "real"])
def test_a_trace_inside_a_trace(outer: bool, inner: bool) -> None:
    found = []
    module = Calling(lambda: found.append(scaling_group(Calling(list, real=inner), torch.ones(2, 4)).num_units))
    module.real = outer
    before = process(), randomness()
    if outer or not inner:  # a real call cannot be made among fake tensors
        assert scaling_group(module, X).num_units == 6
        assert found[-1] == 6
    assert (process(), randomness()) == before


class Meeting:
    """Makes two threads overlap: the first one out waits until the other one is in, and the other way round."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20)

    def wait(self) -> None:
        self.barrier.wait()
        random.random(), np.random.rand(), torch.rand(())


def in_two_threads(first: Callable[[], object], second: Callable[[], object]) -> list[BaseException]:
    failures: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return failures


def once(function: Callable[[], object]) -> Callable[[], object]:
    """Call a function the first time only: a call that fails among fake tensors is made again with real ones."""
    functions = iter([function])
    return lambda: next(functions, lambda: None)()


@pytest.mark.parametrize("real", [(False, False), (True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("first_out", [0, 1])
def test_two_traces_at_once_in_two_threads(real: tuple[bool, bool], first_out: int) -> None:
    found = []
    meeting, leaving = Meeting(), threading.Event()

    def meet(number: int) -> None:
        meeting.wait()
        if number != first_out:
            leaving.wait(20)

    modules = [Calling(once(lambda number=number: meet(number)), real=real[number]) for number in range(2)]  # type: ignore[misc]
    before = process(), randomness()

    def trace(number: int) -> None:
        found.append(scaling_group(modules[number], X).num_units)
        leaving.set()

    assert not in_two_threads(lambda: trace(0), lambda: trace(1))
    assert found == [6, 6]
    assert (process(), randomness()) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_that_is_ended_while_another_one_goes_on(kind: type[BaseException]) -> None:
    meeting, ended, found = Meeting(), threading.Event(), []
    meet = once(meeting.wait)

    def end() -> None:
        meet()
        raise kind("ended")

    def go_on() -> None:
        meeting.wait()
        ended.wait(20)

    ending, going_on = Calling(end), Calling(once(go_on))
    before = process(), randomness()

    def first() -> None:
        try:
            scaling_group(ending, X)
        finally:
            ended.set()

    failures = in_two_threads(first, lambda: found.append(scaling_group(going_on, X).num_units))
    assert [type(failure) for failure in failures] == [kind]
    assert found == [6]
    assert (process(), randomness()) == before


def test_modules_and_threads_of_others_are_no_business_of_a_trace() -> None:
    """Module calls that began before the trace and end during it, on another thread, and threads started there."""
    inside, traced, found = threading.Event(), threading.Event(), []
    modes: list[int] = []

    def look() -> None:
        modes.append(len(_get_current_dispatch_mode_stack()))
        thread = threading.Thread(target=lambda: modes.append(len(_get_current_dispatch_mode_stack())))
        thread.start()
        thread.join()

    other = Calling(lambda: (inside.set(), traced.wait(20), look()))

    def trace() -> None:
        inside.wait(20)
        module = Calling(once(lambda: (traced.set(), time.sleep(0.2))))
        found.append(scaling_group(module, X).num_units)

    assert not in_two_threads(lambda: other(X), trace)
    assert found == [6]
    assert modes == [0, 0]


@pytest.mark.parametrize("kind", [None, KeyboardInterrupt, ValueError])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_of_the_call_is_traced_and_leaves_nothing_on_itself(kind: type[BaseException] | None) -> None:
    seen: list[tuple[int, int]] = []

    def count() -> int:
        return len(threads.here.entries)

    class Threaded(threading.Thread):
        def run(self) -> None:
            seen.append((count(), len(_get_current_dispatch_mode_stack())))
            inner = threading.Thread(target=lambda: seen.append((count(), 0)))
            inner.start()
            inner.join()
            if kind is not None:
                raise kind

        def _bootstrap_inner(self) -> None:
            super()._bootstrap_inner()  # type: ignore[misc]
            seen.append((count(), len(_get_current_dispatch_mode_stack())))

    def function() -> None:
        thread = Threaded()
        thread.start()
        thread.join()

    assert scaling_group(Calling(function), X).num_units == 6
    assert seen == [(1, 1), (1, 0), (0, 0)]


def test_two_threads_that_call_one_awaited_module() -> None:
    module, meeting = Calling(lambda: meeting.wait()), Meeting()
    pending = GroupFromModuleCalls(module.parameters())
    assert not in_two_threads(lambda: module(X), lambda: module(X))
    assert pending.group is not None
    assert pending.group.num_units == 6


def test_a_collection_while_a_switch_is_made_does_not_block() -> None:
    """Whoever enters a change makes garbage whose collection leaves it, in the same thread."""
    log: list[str] = []

    class Change:
        def __enter__(self) -> None:
            log.append("made")

        def __exit__(self, *_: object) -> None:
            log.append("taken back")

    def make() -> Change:
        return Change()

    shared = Shared(make)
    shared.enter()
    with shared._lock:  # as in a collection while the lock is held
        shared.leave()
    assert log == ["made", "taken back"]
    with shared(), shared():
        assert log[2:] == ["made"]
    assert log[2:] == ["made", "taken back"]


def test_a_change_that_fails_counts_no_user() -> None:
    def fail() -> Any:
        raise KeyboardInterrupt

    shared = Shared(fail)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            shared.enter()
    assert shared._users == 0
