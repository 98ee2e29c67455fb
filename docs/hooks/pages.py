"""Pages of the site that are made of files outside of ``docs/``, so that nothing is written twice.

Links to these files, as a reader of the repository has them, become links to the pages.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from notebooks import converted

ROOT = Path(__file__).parents[2]
BENCHMARKS, TUTORIALS = "examples/benchmarks", "examples/tutorials"
#: Files of the repository, and the pages that they become.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{
        f"{BENCHMARKS}/{name}.md": f"evidence/{name}.md"
        for name in ("RESULTS", "SETTINGS", "AUTHORS", "STEP_OVERHEAD", "TRACING", "GRADIENT_CHECK", "COMMUNICATION")
    },
    f"{BENCHMARKS}/epyc/STEP_OVERHEAD.md": "evidence/epyc/STEP_OVERHEAD.md",
    **{f"{BENCHMARKS}/{path.name}": f"evidence/{path.name}" for path in sorted((ROOT / BENCHMARKS).glob("*.png"))},
    **{f"{TUTORIALS}/{path.name}": f"tutorials/{path.stem}.md" for path in sorted((ROOT / TUTORIALS).glob("*.ipynb"))},
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        if not source.endswith(".ipynb"):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
            continue
        text, pictures = converted(ROOT / source)
        files.append(File.generated(config, page, content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    if here.startswith("evidence/"):
        page.meta.setdefault("hide", ["toc"])  # tables of many columns
    folder = os.path.dirname(SOURCES.get(here, f"docs/{here}"))

    def link(found: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(folder, found[1]))
        to = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        return found[1] if to is None else os.path.relpath(to, os.path.dirname(here) or ".")

    return LINK.sub(link, markdown)
