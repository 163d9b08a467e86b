"""The C++ ops of ``csrc``: found, built and loaded when they are first asked for, never at import.

Generating text multiplies few rows with many weights, so it is bound by reading weights; these ops read them as fast as
the memory gives them (``benchmarks/serve/native_ops.py``). Without sources (only a clone or an editable install has
them), without a compiler, or after a failed build there are none: callers compute with torch, and the reason is told.

The build is one call of the C++ compiler against torch's stable ABI (``torch/csrc/stable``), some ten seconds of one
core. ``torch.utils.cpp_extension.load`` would need ninja and setuptools, and the lock file that it leaves behind when
it is killed stops every later process. The library has the code for every level of CPU and chooses at run time, so its
name depends on the sources, the compiler's flags, torch and the architecture, not on the CPU's flags.

Environment: ``MOEYARD_NATIVE=0`` turns the ops off; ``MOEYARD_NATIVE_CACHE`` is where libraries are kept (default
``~/.cache/moeyard/native``); ``CXX`` is the compiler.

Shape suffixes: N rows, D width, O outputs, E experts, F hidden width, G = 2 F; of attention as in
:mod:`moe.ops.paged_attention`, C blocks of a table.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe.errors import UserError

LOG = logging.getLogger("moeyard.moe.native")
SOURCES = Path(__file__).resolve().parents[2] / "csrc"
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")
"""What a CPU can do, each more than the one before; as in csrc/rows/kernels.h."""
DTYPES = (torch.bfloat16, torch.float32)

# Rows of one matrix up to which the ops were not slower than torch's GEMM held to the same instructions (native_ops.py
# with ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS and ATEN_CPU_CAPABILITY; 256 was the most that was tried). fp32 could
# have more on AMD, where MKL is slow: these leave room for Intel.
_FEW_ROWS = {
    torch.bfloat16: {"plain": 4, "avx2": 256, "avx512": 256, "avx512_bf16": 64, "amx": 256},
    torch.float32: {"plain": 4, "avx2": 16, "avx512": 32, "avx512_bf16": 32, "amx": 32},
}
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # nothing newer than torch 2.10
)
_COMPILERS = ("c++", "g++", "clang++")
_LONGEST_BUILD_S = 300.0
_ENVIRONMENT = ("MOEYARD_NATIVE", "MOEYARD_NATIVE_CACHE", "XDG_CACHE_HOME", "HOME", "CXX", "PATH")


@dataclass(frozen=True)
class NativeOps:
    """The loaded ops. A row's result is the same bits whatever rows stand beside it, and on any number of threads.

    All take bf16 or fp32 on the CPU, add up in fp32 and return the dtype of the rows; they have no gradient. ``level``
    is one of :data:`LEVELS` that this CPU has; None takes the best.

    Attributes:
        path: the library.
        best_level: of this CPU.
    """

    path: Path
    best_level: str

    def levels(self) -> tuple[str, ...]:
        """Every level that this CPU has."""
        return LEVELS[: LEVELS.index(self.best_level) + 1]

    def few_rows(self, dtype: torch.dtype) -> int:
        """Most rows times one matrix for which these ops are meant: more are bound by arithmetic, torch's strength."""
        return _FEW_ROWS[dtype][self.best_level]

    def expert_mlp(
        self, rows_ND: Tensor, w_gate_up_EGD: Tensor, w_down_EDF: Tensor, load_E: Tensor, level: str | None = None
    ) -> Tensor:
        """(N, D) rows sorted by expert, ``load_E[e]`` of them (int64) for expert e -> (N, D): SwiGLU of all experts.

        Gate, up projection, silu and their product are fp32; the hidden layer is rounded to the rows' dtype once.

        Raises:
            RuntimeError: shapes, dtypes, devices or loads do not fit together; says which.
        """
        y_ND: Tensor = torch.ops.moeyard.expert_mlp.default(rows_ND, w_gate_up_EGD, w_down_EDF, load_E, _number(level))
        return y_ND

    def linear_rows(self, x_ND: Tensor, w_OD: Tensor, level: str | None = None) -> Tensor:
        """(N, D) -> (N, O): ``x_ND @ w_OD.T``.

        Raises:
            RuntimeError: shapes, dtypes or devices do not fit together; says which.
        """
        y_NO: Tensor = torch.ops.moeyard.linear_rows.default(x_ND, w_OD, _number(level))
        return y_NO

    def attend_singles(
        self,
        q_BHd: Tensor,
        k_PbGd: Tensor,
        v_PbGd: Tensor,
        table_BC: Tensor,
        length_B: Tensor,
        level: str | None = None,
    ) -> Tensor:
        """(B, H, d) single queries of as many sequences -> (B, H, d): softmax attention over a paged cache.

        Sequence b attends to its first ``length_B[b]`` positions, in the blocks ``table_BC[b]`` (int64 both). All is
        computed in fp32.

        Raises:
            RuntimeError: shapes, dtypes or devices do not fit together, or a block does not exist; says which.
        """
        arguments = (q_BHd, k_PbGd, v_PbGd, table_BC, length_B, _number(level))
        out_BHd: Tensor = torch.ops.moeyard.attend_singles.default(*arguments)
        return out_BHd


class NativeOpsChoice(NamedTuple):
    """The ops, or None, and why."""

    ops: NativeOps | None
    reason: str


class _UnavailableError(Exception):
    """There are no native ops here; the text is the reason."""


_lock = threading.Lock()
_loaded: NativeOps | None = None
_choices: dict[tuple[str | None, ...], NativeOpsChoice] = {}


def native_ops() -> NativeOps | None:
    """The ops of :func:`choose_native_ops`."""
    return choose_native_ops().ops


def choose_native_ops() -> NativeOpsChoice:
    """The ops and where they are from, or None and why there are none; decided and logged once.

    The first call on a machine builds them: some ten seconds. Processes that come meanwhile wait for that build.
    """
    with _lock:
        environment = tuple(os.environ.get(name) for name in _ENVIRONMENT)
        if environment not in _choices:
            _choices[environment] = _choose()
        return _choices[environment]


def choose_native_ops_for(
    dtype: torch.dtype, device: torch.device | str, wanted: bool | None = None
) -> NativeOpsChoice:
    """The ops for tensors of ``dtype`` on ``device``; where they could not be used, nothing is built.

    Args:
        wanted: False: none. None: where there are some.

    Raises:
        UserError: ``wanted`` is True and there are none; says why.
    """
    if wanted is False:
        return NativeOpsChoice(None, "turned off by name")
    obstacle = obstacle_to_native(dtype, torch.device(device))
    choice = NativeOpsChoice(None, obstacle) if obstacle else choose_native_ops()
    if wanted and choice.ops is None:
        raise UserError(f"native ops cannot compute here: {choice.reason}")
    return choice


def obstacle_to_native(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the ops do not take tensors of ``dtype`` on ``device``; None where they do."""
    if dtype in DTYPES and device.type == "cpu":
        return None
    return f"they take float32 and bfloat16 on cpu, not {str(dtype).removeprefix('torch.')} on {device.type}"


def runs_native(x: Tensor, *weights: Tensor) -> bool:
    """Whether the ops take these: on the CPU, of one dtype that they know, and nobody wants a gradient."""
    if x.dtype not in DTYPES or x.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        return False
    return all(w.dtype == x.dtype and w.device == x.device for w in weights)


def _choose() -> NativeOpsChoice:
    global _loaded  # a process can register the ops only once, whatever its environment becomes
    if os.environ.get("MOEYARD_NATIVE", "1").strip().lower() in ("0", "off", "no", "false"):
        return NativeOpsChoice(None, f"disabled by MOEYARD_NATIVE={os.environ['MOEYARD_NATIVE']}")
    try:
        _loaded = _loaded or _load(_library())
    except _UnavailableError as reason:
        LOG.info("no native ops: %s", reason)
        return NativeOpsChoice(None, str(reason))
    except (OSError, RuntimeError) as error:
        text = f"build failed: {error}"
        LOG.warning("native ops: %s; computing with torch", text)
        return NativeOpsChoice(None, text)
    return NativeOpsChoice(_loaded, f"C++ for {_loaded.best_level} in {_loaded.path}")


def _number(level: str | None) -> int:
    return -1 if level is None else LEVELS.index(level)


def _load(library: Path) -> NativeOps:
    torch.ops.load_library(str(library))
    return NativeOps(library, LEVELS[torch.ops.moeyard.cpu_level.default()])


def _library() -> Path:
    """The built library; builds it if it is not there yet."""
    if not (SOURCES / "expert_mlp.cpp").exists():
        raise _UnavailableError("no sources: csrc is only in a clone or an editable install")
    if sys.platform != "linux":
        raise _UnavailableError(f"they are only built on Linux, this is {sys.platform}")
    sources = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("rows/*.cpp")])
    key = hashlib.sha256(repr((torch.__version__, platform.machine(), _FLAGS)).encode())
    for path in sorted([*sources, *SOURCES.glob("*.h"), *SOURCES.glob("rows/*.h")]):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = _cache()
    library = cache / f"moeyard-{key.hexdigest()[:20]}.so"
    if library.exists():
        return library
    compiler = _compiler()
    cache.mkdir(parents=True, exist_ok=True)
    with _file_lock(library.with_suffix(".lock")):
        if not library.exists():  # nobody else built it while we waited
            LOG.warning("building native ops with %s: some ten seconds, once", compiler[0])
            _build(compiler, sources, library)
    return library


def _cache() -> Path:
    if asked := os.environ.get("MOEYARD_NATIVE_CACHE"):
        return Path(asked).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeyard" / "native"


def _compiler() -> list[str]:
    """The command that compiles C++."""
    if asked := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(asked[0]) is None:
            raise _UnavailableError(f"no compiler: CXX={asked[0]} cannot be run")
        return asked
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise _UnavailableError(f"no compiler: none of {', '.join(_COMPILERS)} is on the PATH")


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when a process dies."""
    import fcntl  # not on Windows

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: list[str], sources: list[Path], library: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        built = Path(folder) / library.name
        command = [*compiler, *_FLAGS, f"-I{torch_folder / 'include'}", *map(str, sources), "-o", str(built)]
        command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_BUILD_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{compiler[0]} took over {error.timeout:.0f} s") from error
        if result.returncode:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
            wrong = [line for line in lines if "error" in line.lower()] or lines[-1:]
            raise RuntimeError(wrong[0] if wrong else f"{compiler[0]} ended with code {result.returncode}")
        os.replace(built, library)  # whole or not there
