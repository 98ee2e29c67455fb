"""Refuses to publish what is not prepared for a release: ``python .ci/check_release.py --tag v0.1.0``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def mistakes(root: Path, tag: str, repository: str | None) -> Iterator[str]:
    """Yield what is missing, and what to do.

    Args:
        root: folder of the repository.
        tag: of the release.
        repository: ``owner/name`` of the repository on GitHub that publishes; ``None`` if that is not to be checked.
    """
    source = (root / "lightning_ecopt" / "__init__.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"__version__ is {version}: take the suffix away before the tag is set"
    if tag != f"v{version}":
        yield f"the tag is {tag} and __version__ is {version}: a tag is v and the version"
    headings = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    if headings[0] != "[Unreleased]":
        yield f"CHANGELOG.md begins with {headings[0]}: keep an empty section [Unreleased] on top"
    if not any(re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading) for heading in headings):
        yield f"CHANGELOG.md has no section ## [{version}] - YYYY-MM-DD"
    for name in ("pyproject.toml", "CITATION.cff"):
        addresses = set(
            re.findall(r"https://(?:raw\.githubusercontent|github)\.com/([\w.-]+/[\w.-]+)", (root / name).read_text())
        )
        if repository is not None and addresses != {repository}:
            yield f"{name} has links to {', '.join(sorted(addresses)) or 'no repository'}: put {repository} there"


def main(arguments: list[str] | None = None) -> None:
    """Exit with code 1 and a line for each mistake, if there is one."""
    parser = argparse.ArgumentParser(description="Check that a release is prepared.")
    parser.add_argument("--tag", required=True, help="of the release, such as v0.1.0")
    parser.add_argument("--repository", help="owner/name on GitHub that the links of the package must have")
    options = parser.parse_args(arguments)
    found = list(mistakes(ROOT, options.tag, options.repository))
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
