"""A release is made in one way, and a version, a name and an address stand in one place, or are the same in all."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import lightning_ecopt

ROOT = Path(__file__).parents[1]
PREPARED = {
    "lightning_ecopt/__init__.py": '"""The package."""\n\n__version__ = "0.1.0"\n',
    "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [0.1.0] - 2026-12-01\n\n### Added\n\n- All.\n",
    "pyproject.toml": 'Homepage = "https://github.com/some/where"\nreplacement = "https://raw.githubusercontent.com/some/where/"',
    "CITATION.cff": 'repository-code: "https://github.com/some/where"\n',
}


@pytest.fixture
def check_release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_release", ROOT / ".ci" / "check_release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mistakes(check_release: ModuleType, folder: Path, **changed: str) -> list[str]:
    """What is said of a prepared release in which a text has been replaced by another, file by file."""
    for name, text in PREPARED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, change in changed.items():
        path = folder / {"version": "lightning_ecopt/__init__.py", "changelog": "CHANGELOG.md"}.get(name, name)
        old, new = change.split(" -> ")
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return list(check_release.mistakes(folder, "v0.1.0", "some/where"))


def test_a_release_that_is_prepared_is_let_through(check_release: ModuleType, tmp_path: Path) -> None:
    assert mistakes(check_release, tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"version": "0.1.0 -> 0.1.1"}, ["the tag is v0.1.0 and __version__ is 0.1.1", "no section ## [0.1.1]"]),
        (
            {"version": "0.1.0 -> 0.1.0.dev0"},
            ["take the suffix away", "the tag is v0.1.0", "no section ## [0.1.0.dev0]"],
        ),
        ({"changelog": "## [Unreleased]\n\n -> "}, ["keep an empty section [Unreleased] on top"]),
        ({"changelog": " - 2026-12-01 -> "}, ["CHANGELOG.md has no section ## [0.1.0] - YYYY-MM-DD"]),
        (
            {"pyproject.toml": "github.com/some -> github.com/any"},
            ["pyproject.toml has links to any/where, some/where"],
        ),
        (
            {"CITATION.cff": "some/where -> some/elsewhere"},
            ["CITATION.cff has links to some/elsewhere: put some/where"],
        ),
        ({"CITATION.cff": "https://github.com/some/where -> "}, ["CITATION.cff has links to no repository"]),
    ],
)
def test_a_release_that_is_not_prepared_is_refused(
    changed: dict[str, str], expected: list[str], check_release: ModuleType, tmp_path: Path
) -> None:
    found = mistakes(check_release, tmp_path, **changed)
    assert len(found) == len(expected)
    assert all(words in line for line, words in zip(found, expected, strict=True))


def test_the_program_exits_with_the_mistakes(check_release: ModuleType) -> None:
    with pytest.raises(SystemExit, match=f"the tag is v999 and __version__ is {lightning_ecopt.__version__}"):
        check_release.main(["--tag", "v999"])


def test_all_files_name_the_same_repository(check_release: ModuleType) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (home,) = re.findall(r'^Homepage = "https://github.com/(.+)"$', project, flags=re.MULTILINE)
    assert [line for line in check_release.mistakes(ROOT, "v0", home) if "links to" in line] == []


def test_the_changelog_begins_with_what_is_not_released(check_release: ModuleType) -> None:
    assert [line for line in check_release.mistakes(ROOT, "v0", None) if "on top" in line] == []


def test_the_version_stands_in_one_place() -> None:
    """Other files that are read by people or programs do not repeat it."""
    version = lightning_ecopt.__version__
    names = ("pyproject.toml", "CITATION.cff", "mkdocs.yml", "README.md", "docs/index.md")
    assert [name for name in names if version in (ROOT / name).read_text()] == []


def test_the_readme_has_links_that_work_in_a_clone() -> None:
    """On PyPI they are absolute: ``test_distribution.py``."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
    own = [link for link in links if not link.startswith("https://")]
    assert len(own) > 25
    assert [link for link in own if not (ROOT / link).is_file()] == []
