"""What pip would install: every recipe and the report's page, and each recipe a config that loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launch.config import TrainConfig
from launch.config_file import dump_config, load_config

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy of the tree, so that the clone stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "runs", ".cache")
    for name in ("gates", "moe", "parallel", "serve", "launch", "tests", "benchmarks", "docker", "csrc"):
        if (ROOT / name).is_dir():  # git keeps no empty folders
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=source,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (built,) = folder.glob("moeyard-*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_holds_five_packages_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"gates", "launch", "moe", "parallel", "serve"}


def test_the_wheel_holds_every_file_that_the_packages_read(wheel: list[str]) -> None:
    """Every file in a package that is no Python is data that something opens: leaving one out breaks only installs."""
    data = {
        str(path.relative_to(ROOT))
        for package in ("gates", "moe", "parallel", "serve", "launch")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert "launch/configs/tiny.yaml" in data
    assert sorted(data - set(wheel)) == []


def test_the_wheel_holds_the_console_script_and_the_licence(wheel: list[str]) -> None:
    names = {name.partition(".dist-info/")[2] for name in wheel if ".dist-info/" in name}
    assert {"entry_points.txt", "licenses/LICENSE"} <= names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_on_one_and_two_ranks_and_survives_a_round_trip(recipe: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        config = load_config(str(recipe), world_size=ranks).config
        assert config.check(ranks) == []
    assert load_config(recipe.stem).config == config, "the bare name finds the same recipe"
    assert config != TrainConfig()
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(again)).config == config


def test_there_is_a_recipe_for_the_first_run() -> None:
    assert "tiny" in {recipe.stem for recipe in RECIPES}
