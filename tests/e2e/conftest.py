"""A small corpus for every test that trains."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(10):
        lines = [
            f"Act {number}, line {i}: the {i * number} quick foxes jump over {i % 7} lazy dogs." for i in range(60)
        ]
        (folder / f"play{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
