"""Compiles ``passes.c``, with ``vectors.c`` and ``looks.c`` in it, once on each machine, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCE = Path(__file__).with_name("passes.c")
INCLUDED = SOURCE.with_name("vectors.c"), SOURCE.with_name("looks.c")
FLAGS = ("-O3", "-shared", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
#: By what torch says of the processor. Compilers know what all processors of other kinds are able to.
OF_PROCESSOR = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
}
#: Tried in this order; the second is for compilers without threads, such as Apple's.
OF_THREADS = ("-fopenmp", "-fopenmp-simd")
#: How many elements a thread must have to be worth its start.
FOR_A_THREAD = 1 << 16
TYPES = {torch.float32: "float", torch.float64: "double"}


class Library(NamedTuple):
    """The functions of ``passes.c``, by type of the tensors; and the process that has loaded them."""

    update: Mapping[torch.dtype, Callable[..., None]]
    sums: Mapping[torch.dtype, Callable[..., None]]
    copy_elements: Mapping[torch.dtype, Callable[..., int]]
    clipping: Mapping[torch.dtype, Callable[..., int]]
    free_gradient: Mapping[torch.dtype, Callable[..., None]]
    allocate: Mapping[torch.dtype, Callable[..., int]]
    step: Mapping[torch.dtype, Callable[..., int]]
    path_step: Mapping[torch.dtype, Callable[..., int]]
    both_sides: Mapping[torch.dtype, Callable[..., None]]
    rescale: Mapping[torch.dtype, Callable[..., None]]
    magnitudes: Mapping[torch.dtype, Callable[..., None]]
    process: int

    def threads(self, elements: int) -> int:
        """How many threads work on so many elements.

        The threads of a forked process are those of its parent, and do not answer.
        """
        most = torch.get_num_threads() if os.getpid() == self.process else 1
        return min(max(1, elements // FOR_A_THREAD), most)

    def can_share(self, sizes: Sequence[int]) -> bool:
        """Whether threads that share whole tensors of such sizes take no longer than operations on one after another.

        Operations read memory several times, some four, but all threads work on each tensor.
        """
        return max(sizes, default=0) * self.threads(sum(sizes)) <= 4 * sum(sizes)


def compiler() -> list[str] | None:
    """The command of the C compiler: ``$CC``, or the first of ``cc``, ``gcc`` and ``clang`` that there is."""
    if sys.platform == "win32":
        return None
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation mark without an end names none
        return None
    return next((name for name in ([named] if named else [["cc"], ["gcc"], ["clang"]]) if shutil.which(name[0])), None)


def load() -> Library:
    """Load the library; where that has not been done before, compile it, which takes one or two seconds.

    It is kept in ``$XDG_CACHE_HOME/lightning_ecopt``, by default ``~/.cache/lightning_ecopt``, or not at all if that
    cannot be written, or if another user can write there, too.

    Raises:
        OSError: if there is no C compiler, or if it fails.
    """
    found = _load()
    if isinstance(found, OSError):
        raise found
    return found


@functools.cache  # also what has failed, so that it is not tried at every refresh
def _load() -> Library | OSError:
    command = compiler()
    if command is None:
        return OSError("there is no C compiler on the path (install gcc or clang, or let the variable CC name one)")
    flags = (*FLAGS, *OF_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ()))
    facts = ([path.read_bytes() for path in (SOURCE, *INCLUDED)], command, flags, sys.platform, os.uname().machine)
    name = f"passes-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_ecopt"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(cache)
        return _functions(_kept(cache / name, command, flags))
    except (OSError, RuntimeError):
        pass  # no home, a folder that cannot be written, or a library of another system
    try:
        with tempfile.TemporaryDirectory() as folder:  # what is loaded does not need its file any more
            return _functions(_compile(Path(folder) / name, command, flags))
    except OSError as error:
        return error


def _check_owner(folder: Path) -> None:
    """Raise unless this user alone can put a library into a folder: what is there is run."""
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others can write to {folder}")


def _kept(path: Path, command: Sequence[str], flags: Sequence[str]) -> Path:
    """The library at a path, which is compiled if it is not there; other processes find all of it or nothing."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = _compile(Path(folder) / path.name, command, flags)
            with made.open("rb") as file:  # a power cut must not leave a part, which kills the process that loads it
                os.fsync(file.fileno())
            os.replace(made, path)
    return path


def _compile(path: Path, command: Sequence[str], flags: Sequence[str]) -> Path:
    for threads in OF_THREADS:
        run = subprocess.run(
            [*command, *flags, threads, "-o", str(path), str(SOURCE), "-lm"], capture_output=True, text=True
        )
        if run.returncode == 0:
            return path
    raise OSError(f"{shlex.join(command)} says: {run.stderr.strip()[:500]}")


def _functions(path: Path) -> Library:
    library = ctypes.CDLL(str(path))
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    tables = [pointer, pointer, number, pointer, number]  # blocks, items, how many, addresses, tensors of each block

    def of(name: str, arguments: Sequence[Any], result: Any = None) -> Mapping[torch.dtype, Callable[..., Any]]:
        try:
            found = {dtype: library[f"{name}_{kind}"] for dtype, kind in TYPES.items()}
        except AttributeError as error:  # the compiler was told to hide them, or to change their names
            raise OSError(f"the library that was compiled has no such function: {error}") from None
        for function in found.values():
            function.argtypes, function.restype = arguments, result
        return found

    return Library(
        of("update", [*tables, pointer, number]),
        of("sums", [*tables, number, pointer, number, number, number]),  # so many of the addresses are read
        of("copy_elements", [pointer, pointer, number, pointer, number], number),
        of("clipping", [pointer, real, *[pointer] * 7], number),
        of("free_gradient", [pointer] * 6),
        of("allocate", [pointer] * 5, number),
        of("step", [*tables, pointer, pointer, real, pointer, number], number),
        of("path_step", [*tables, pointer, *tables[:3], *[pointer] * 5, number], number),
        of("both_sides", [pointer, number, pointer, real, pointer, pointer, number]),
        of("rescale", [pointer, number, pointer, pointer, number]),
        of("magnitudes", [number, pointer, pointer, number, pointer, number]),
        os.getpid(),
    )
