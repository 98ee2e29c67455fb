"""Formulas as MathML, which browsers show by themselves: no script, and none that is loaded from elsewhere."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Replace what the extension ``arithmatex`` has marked."""
    return FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    formula = unescape(found[2]).strip()
    if found[1] == "div":
        return f'<div class="formula">{convert(formula, display="block")}</div>'  # a long one scrolls by itself
    return convert(formula, display="inline")
