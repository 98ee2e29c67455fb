"""What a step of an optimizer allocates, launches and holds."""

from __future__ import annotations

import gc
import itertools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import profile, supported_activities

from lightning_ecopt import EquivalentClassOptimizer

ELSEWHERE = (nn.Module, type, types.ModuleType, types.CodeType, types.FrameType, str, bytes)  # holds nothing of its own


def usage(step: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Bytes that a step allocates at its peak, and its launches."""
    memory: Any = torch.get_device_module(device)
    before = 0
    if device.type != "cpu":
        memory.synchronize(device)
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
    with profile(activities=supported_activities(), profile_memory=device.type == "cpu") as profiled:
        step()
        memory.synchronize(device)
    events = profiled.events()
    if device.type == "cpu":
        return cpu_peak(profiled), sum(outermost(event) for event in events if event.cpu_parent is None)
    host = {event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU}
    launched = [event for event in events if event.name not in host]  # annotations are on both
    return memory.max_memory_allocated(device) - before, len(launched)


def outermost(event: Any) -> int:
    """Operations that are not part of others, in an event of the profiler; and compiled functions."""
    if "::" in event.name:
        return 1
    return event.name.startswith("Torch-Compiled Region") + sum(map(outermost, event.cpu_children))


def cpu_peak(profiled: profile) -> int:
    """The highest running total of the allocations."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def held_bytes(optimizer: EquivalentClassOptimizer, net: nn.Module) -> int:
    """Of all that can be reached from the optimizer, each storage once; not of the network or of the base's state."""
    tensors = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    tensors += [entry for entries in optimizer.state.values() for entry in entries.values()]
    known = {_place(tensor) for tensor in tensors if isinstance(tensor, Tensor)}
    held: dict[Any, int] = {}
    seen: set[int] = set()
    waiting: list[Any] = [optimizer]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, ELSEWHERE):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            held[_place(item)] = item.untyped_storage().nbytes()
        elif isinstance(item, np.ndarray):
            held[item.__array_interface__["data"][0]] = item.nbytes
        elif isinstance(item, types.FunctionType):
            waiting += [item.__closure__, item.__defaults__, item.__kwdefaults__]  # its globals belong to its module
        else:
            waiting += gc.get_referents(item)
    return sum(size for place, size in held.items() if place not in known)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
