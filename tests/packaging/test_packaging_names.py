"""Import names: exactly five packages, ours and nobody else's, that hide no module of Python or of another project."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["gates", "launch", "moe", "parallel", "serve"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FIND = PROJECT["tool"]["setuptools"]["packages"]["find"]


def shipped_packages() -> list[str]:
    return find_packages(str(ROOT), include=FIND["include"], exclude=FIND.get("exclude", []))


def test_the_top_level_packages_are_exactly_these_five() -> None:
    assert sorted({name.partition(".")[0] for name in shipped_packages()}) == PACKAGES


def test_every_folder_with_python_in_a_package_is_shipped() -> None:
    folders = {
        str(file.parent.relative_to(ROOT)).replace("/", ".")
        for name in PACKAGES
        for file in (ROOT / name).rglob("*.py")
    }
    assert sorted(folders) == sorted(shipped_packages())


@pytest.mark.parametrize("folder", ["docker", "csrc", "tests", "benchmarks", "docs"])
def test_other_folders_are_no_packages(folder: str) -> None:
    """``docker`` with an ``__init__.py`` would hide the Docker SDK from whoever starts in the clone."""
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_is_found_in_the_clone(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None, f"{name} is a namespace package: its __init__.py is missing"
    assert Path(spec.origin).resolve().parent == ROOT / name


@pytest.mark.parametrize("name", PACKAGES)
def test_no_other_installed_project_owns_our_names(name: str) -> None:
    others = set(importlib.metadata.packages_distributions().get(name, ())) - {"moeyard"}
    assert not others, f"pip uninstall {' '.join(sorted(others))}: it installs another `{name}`"


def test_no_module_of_launch_is_named_like_one_of_python() -> None:
    """``python launch/train.py`` begins with ``launch/`` on the path: a ``launch/profile.py`` would hide Python's."""
    names = {
        path.stem for path in (ROOT / "launch").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert not (names - {"__init__"}) & sys.stdlib_module_names


def test_the_console_script_is_not_a_name_that_others_own() -> None:
    scripts = PROJECT["project"]["scripts"]
    assert scripts == {"moeyard": "launch.cli:main"}
