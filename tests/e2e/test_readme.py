"""Every command and every program in the README, in its order, as a reader would paste them.

Training is made small by options added at the end of its command; ports are made free ones. Nothing else is changed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.harness import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = (
    "data.tokenizer.kind=bytes data.validation_fraction=0.1 model.dim=32 model.num_layers=2 model.moe.hidden_dim=32"
    " train.steps=2 train.seq_len=64 train.global_batch=4 optim.warmup_steps=1 eval.interval=0 eval.sample_interval=0"
    " eval.final_sequences=8 eval.sample_tokens=8 track.tensorboard=false"
)


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks that can be run."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


def commands(block: str) -> list[str]:
    """Lines of a bash block, continued ones joined; comments are left to bash."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


class Reader:
    """A folder that looks like the clone, and a shell in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "launch").symlink_to(ROOT / "launch")
        (folder / "my_folder").mkdir()
        for number in range(12):
            text = "".join(f"Note {number}: the {i}th line of a folder of my own.\n" for i in range(40))
            (folder / "my_folder" / f"note{number}.txt").write_text(text, encoding="utf-8")
        self.port = free_port()
        self.server: subprocess.Popen[str] | None = None
        binaries = str(Path(sys.executable).parent)
        path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PATH": path}

    def shell(self, command: str) -> None:
        command = command.replace(":8000", f":{self.port}")
        program = command.split()[0]
        if program == "make":
            assert self._run(f"make -C {ROOT} --dry-run {command.split()[1]}")
        elif program == "source":
            assert command.split()[1] == ".venv/bin/activate"
        elif program.startswith("RUN="):
            run = self._run(f"{command}; echo $RUN").strip()
            assert (self.folder / run / "model" / "config.json").is_file()
            self.environment["RUN"] = run
        elif "serve" in command.split()[:2]:
            self._serve(command)
        elif "train" in command.partition("#")[0]:
            line, hash_, comment = command.partition("#")
            self._run(f"{line} {SMALL if '--config' in line else ''} {hash_}{comment}")
        else:
            printed = self._run(command)
            assert printed
            # A sampled text may end by itself at any token.
            finished = any(f'"finish_reason":"{reason}"' in printed for reason in ("length", "stop"))
            assert program != "curl" or finished, printed

    def python(self, program: str) -> None:
        file = self.folder / "program.py"
        file.write_text(
            program.replace(":8000", f":{self.port}").replace("RUN/", f"{self.environment['RUN']}/"), encoding="utf-8"
        )
        assert self._run(f"{sys.executable} program.py")

    def close(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            printed = self.server.communicate(timeout=60)[0]
            assert self.server.returncode in (0, 130), printed

    def _run(self, command: str) -> str:
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout

    def _serve(self, command: str) -> None:
        line = f"exec {command.partition('#')[0]} --port {self.port}"
        self.server = subprocess.Popen(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self.server.poll() is None, self.server.communicate()[0]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server did not get ready in 90 s")


def test_a_reader_can_paste_every_block_in_order(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    try:
        for language, text in blocks():
            if language == "python":
                reader.python(text)
            else:
                for command in commands(text):
                    reader.shell(command)
    finally:
        reader.close()
    assert reader.server is not None, "the README serves a model"


def test_files_that_the_readme_links_to_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert "docs/ARCHITECTURE.md" in links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_folders_in_the_readme_table_exist() -> None:
    folders = re.findall(r"^\| `([a-z]+/)` \|", README, flags=re.MULTILINE)
    assert len(folders) >= 6
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder
