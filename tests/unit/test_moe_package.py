"""The package's public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import moe

pytestmark = pytest.mark.unit


def test_every_public_name_is_there() -> None:
    assert set(moe.__all__) == set(moe._HOME)
    for name in moe.__all__:
        assert getattr(moe, name).__name__ == name
    assert set(moe.__all__) <= set(dir(moe))
    with pytest.raises(AttributeError, match="module 'moe' has no attribute 'Transfomer'"):
        moe.Transfomer  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, moe, moe.errors; print([m for m in ('torch', 'pydantic', 'tokenizers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_importing_everything_touches_no_device_and_no_optional_package() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import moe; [getattr(moe, name) for name in moe.__all__]\n"
        "import torch; print(torch.cuda.is_initialized())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
