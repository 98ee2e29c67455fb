"""``ecopt`` (or ``python -m lightning_ecopt``) prints the freedoms of any model that can be imported."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_ecopt.symmetry import scaling_group

EXAMPLES = """\
examples:
  ecopt torchvision.models:resnet18 --input 1,3,224,224
  ecopt torchvision.models:resnet18 --input 1,3,224,224 --unit 5
  ecopt my.models:Decoder.small --args '{"depth": 4}' --input tokens=1,16:int64 --eval
"""


@dataclass(frozen=True)
class Input:
    """One tensor that the model is called with.

    Args:
        text: what the user typed.
        name: of the argument, ``None`` if it is given by position.
        shape: of the tensor.
        dtype: of the tensor.

    Example: ``tokens=1,16:int64`` gives the name ``"tokens"``, the shape ``(1, 16)`` and ``torch.int64``.
    """

    text: str
    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def parse(cls, text: str) -> Input:
        """Read ``[NAME=]SIZE,SIZE,...[:DTYPE]``."""
        match = re.fullmatch(r"(?:(\w+)=)?(\d+(?:,\d+)*)(?::(\w+))?", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form [NAME=]SIZE,SIZE,...[:DTYPE]")
        name, sizes, dtype = match.groups(default="")
        found = getattr(torch, dtype or "float32", None)
        if not isinstance(found, torch.dtype):
            raise argparse.ArgumentTypeError(f"{dtype!r} in {text!r} is no dtype of torch, such as float32 or int64")
        return cls(text, name or None, tuple(int(size) for size in sizes.split(",")), found)

    def make(self, device: torch.device) -> Tensor:
        """Make a tensor of normally distributed numbers, or of zeros if the type is not a floating point type."""
        floating = self.dtype.is_floating_point or self.dtype.is_complex
        return (torch.randn if floating else torch.zeros)(self.shape, dtype=self.dtype, device=device)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line that says what is wrong; argparse would print the usage, too."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="ecopt",
        description="Print which hidden units of a model can be rescaled without changing what it computes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="MODULE:FACTORY",
        help="a callable that returns an nn.Module, or an nn.Module, as the module to import and a dotted path in it",
    )
    parser.add_argument(
        "--input",
        metavar="[NAME=]SHAPE[:DTYPE]",
        type=Input.parse,
        action="append",
        default=[],
        help="an argument of the model's call, such as 1,3,224,224 or mask=1,16:bool; repeat it for several. "
        "Integers are zeros, float32 is the default",
    )
    parser.add_argument(
        "--args", metavar="JSON", type=_keywords, help="keyword arguments of the factory, as a JSON object"
    )
    parser.add_argument("--unit", metavar="N", type=int, help="describe unit N instead of printing the table")
    parser.add_argument("--eval", action="store_true", help="trace in evaluation mode")
    parser.add_argument(
        "--real", action="store_true", help="build the model for real, not on the meta device, where it has no weights"
    )
    return parser


def _keywords(text: str) -> dict[str, Any]:
    """Read the JSON object of ``--args``."""
    try:
        keywords = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(keywords, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object, such as {{"depth": 4}}')
    return keywords


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: by default those that the process was started with.

    Raises:
        SystemExit: with code 2 and one line on standard error, if there is no such model, it cannot be built, it
            cannot be called with these inputs or there is no such unit.

    Example::

        main(["torchvision.models:resnet18", "--input", "1,3,224,224"])
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    found = _find(parser, options.model)
    on_meta = not options.real and not isinstance(found, nn.Module)
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        module = _build(parser, options, found, on_meta)
        if options.eval:
            module.eval()
        state = next(itertools.chain(module.parameters(), module.buffers()), torch.empty(0))
        try:
            tensors = [(given.name, given.make(state.device)) for given in options.input]
            group = scaling_group(
                module, *(x for name, x in tensors if not name), **{name: x for name, x in tensors if name}
            )
        except Exception as error:
            inputs = " ".join(f"--input {given.text}" for given in options.input) or "no --input"
            way_out = "adapt the inputs" + (", or try --real if it needs values" if on_meta else "")
            parser.error(f"{options.model} cannot be called with {inputs}: {_line(error)}; {way_out}")
    if options.unit is None:
        group.summary()
        return
    try:
        print(group.describe(options.unit))
    except IndexError as error:
        parser.error(str(error))


def _find(parser: _Parser, model: str) -> Any:
    """Import the object that ``MODULE:FACTORY`` names, or exit and suggest similar names."""
    name, _, path = model.partition(":")
    if not name or not path:
        parser.error(f"{model!r} is not of the form MODULE:FACTORY, such as torchvision.models:resnet18")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as python -m does, and a console script does not
    try:
        found = importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            parser.error(f"there is no module {error.name!r}: install it, or run this where it is")
        parser.error(f"{name} cannot be imported: {_line(error)}")
    where = name
    for part in path.split("."):
        if not hasattr(found, part):
            names = {name.lower(): name for name in dir(found)}
            close = [names[name] for name in difflib.get_close_matches(part.lower(), names, 3)]
            parser.error(f"{where} has no attribute {part!r}" + (f": is it {' or '.join(close)}?" if close else ""))
        found, where = getattr(found, part), f"{where}.{part}"
    if not isinstance(found, nn.Module) and not callable(found):
        parser.error(f"{model} is {_article(found)}: name an nn.Module, or a callable that returns one")
    return found


def _build(parser: _Parser, options: argparse.Namespace, found: Any, on_meta: bool) -> nn.Module:
    """Call the factory with ``--args``; a module is taken as it is."""
    if isinstance(found, nn.Module):
        if options.args is not None:
            parser.error(f"{options.model} is a module already: leave --args out, or name the class")
        return found
    try:
        module = found(**(options.args or {}))
    except Exception as error:
        where = " on the meta device" if on_meta else ""
        way_out = "give its arguments with --args" + (", or try --real if it needs values" if on_meta else "")
        parser.error(f"{options.model} cannot be built{where}: {_line(error)}; {way_out}")
    if not isinstance(module, nn.Module):
        parser.error(f"{options.model} returned {_article(module)}: name a callable that returns an nn.Module")
    return module


def _line(error: Exception) -> str:
    """Write the type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _article(value: Any) -> str:
    """Write the type of a value with its article: ``an int``, ``a Tensor``."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


if __name__ == "__main__":
    main()
