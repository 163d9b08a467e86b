"""Imports ask for nothing that a laptop lacks: no GPU, no compiler, no optional package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gates", "moe", "parallel", "serve", "launch")
OPTIONAL = ("ray", "fastapi", "uvicorn", "prometheus_client", "wandb", "pyarrow", "datasets", "transformers", "triton")
# What stands behind `moeyard serve` may need the serve extra; serve.hosts.embedded checks for it before importing.
NEEDS_SERVE_EXTRA = ("serve.http", "serve.hosts.server", "serve.hosts.ray_app", "serve.protocol")
PROLOGUE = f"""
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
# Any use of a device is a bug: with this, the first one raises.
NO_CUDA = """
import torch
def touched(*args, **kwargs):
    raise AssertionError("CUDA was touched by an import")
torch.cuda._lazy_init = touched
torch.cuda.is_available = touched
torch.cuda.device_count = touched
"""


def python(program: str) -> str:
    """Run a program in a fresh interpreter from the clone; its output."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules(package: str) -> list[str]:
    """Every module of a package by its dotted name, without programs that only run as files."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_every_module_imports_without_extras_and_without_touching_a_device() -> None:
    names = [name for package in PACKAGES for name in modules(package) if not name.startswith(NEEDS_SERVE_EXTRA)]
    assert {"gates.topk", "moe.layer", "parallel.topology", "serve.hosts.embedded", "launch.train"} <= set(names)
    program = f"{PROLOGUE}{NO_CUDA}\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    program += f"print(sorted(set({OPTIONAL!r}) & set(sys.modules)))"
    assert python(program).strip() == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_imports_alone(package: str) -> None:
    python(f"{PROLOGUE}importlib.import_module({package!r})")


def test_lower_layers_do_not_pull_in_higher_ones() -> None:
    allowed = {"gates": set(), "moe": {"gates"}, "parallel": {"gates", "moe"}, "serve": {"gates", "moe"}}
    for package, lower in allowed.items():
        program = f"import sys, {package}\nprint(*sorted(set({PACKAGES!r}) & set(sys.modules)))"
        assert set(python(program).split()) <= lower | {package}


def test_the_extra_that_is_missing_is_named_with_its_mend() -> None:
    program = f"""{PROLOGUE}
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {OPTIONAL!r} else real(name, package)
from moe.errors import UserError
from serve.hosts.embedded import serve_model
try:
    serve_model("nowhere")
except UserError as error:
    print(error)
"""
    assert python(program).strip() == (
        "serving needs fastapi, uvicorn, prometheus_client: pip install 'moeyard[serve]'"
    )


def test_torch_distributed_and_ray_stay_where_they_belong() -> None:
    """Lint enforces it too; this holds for imports inside functions of every file that is shipped."""
    for package in ("gates", "moe", "serve"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    assert not name.startswith("torch.distributed"), path
                    assert name.partition(".")[0] != "ray" or path.name == "ray_app.py", path
