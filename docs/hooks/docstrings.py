"""Docstrings as Markdown: for ``help()`` they have the roles, tables and code blocks of reStructuredText."""

from __future__ import annotations

import ast
import re
from textwrap import dedent, indent
from typing import Any

from griffe import Class, Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`(~?\.?)([^`]+)`")
TABLE = re.compile(r"^( *)(=+  +=[= ]*)\n((?:.+\n)+)\1\2$", flags=re.MULTILINE)
CODE = re.compile(r"^( *)(.*):(?<!\.):\n\n((?:\1 +.*\n?|\n)+)", flags=re.MULTILINE)
MATH = re.compile(r"^( *)\.\. math:: *(.+)$", flags=re.MULTILINE)


class DocstringsAsMarkdown(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            value = obj.docstring.value
            if isinstance(obj, Class) and "{options}" in value:  # put in when the class is made: optim/named.py
                options = ast.literal_eval(str(obj.module["_OPTIONS"].value))
                value = value.replace("    {options}", indent(dedent(options), "    "))
            obj.docstring.value = as_markdown(value)


def as_markdown(text: str) -> str:
    """The text of a docstring in Markdown."""
    text = MATH.sub(r"\1$$\2$$", text)
    text = TABLE.sub(_table, text + "\n")
    text = CODE.sub(_code, text)
    return ROLE.sub(_reference, text).rstrip()


def _reference(found: re.Match[str]) -> str:
    name = found[2].split(".")[-1] if found[1].startswith("~") else found[2]
    return f'<autoref identifier="{found[2]}" optional><code>{name}</code></autoref>'


def _code(found: re.Match[str]) -> str:
    space, title, block = found.groups()
    title = f"**{title}**" if title == "Example" else f"{title}:"
    return f"{space}{title}\n\n{space}```python\n{indent(dedent(block).strip(), space)}\n{space}```\n\n"


def _table(found: re.Match[str]) -> str:
    """A simple table; lines of ``=`` have the widths of the columns, and an empty first cell continues a row."""
    space, line, body = found.groups()
    starts = [place.start() for place in re.finditer("=+", line)]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    for text in body.splitlines():
        text = text.removeprefix(space)
        if set(text) <= {"=", " "}:
            continue
        cells = [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{one} {more}".strip() for one, more in zip(rows[-1], cells, strict=True)]
    if line not in body:  # the table has no heads
        rows.insert(0, [""] * len(starts))
    lines = [f"{space}| {' | '.join(cells)} |" for cells in rows]
    lines.insert(1, f"{space}|{' --- |' * len(starts)}")
    return "\n" + "\n".join(lines) + "\n"
