"""The command line without a model: what it prints, where, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from gates import TopKConfig, gate_names
from launch import cli
from launch.commands import inspect_commands
from launch.config import TrainConfig
from launch.config_file import config_from_values, flatten, load_config, schema
from moe.errors import ConfigError, UserError

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def moeyard(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs the command line in this process, in an empty folder, without colours and wide enough to break no line."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)

    def run(*argv: str) -> Result:
        capsys.readouterr()
        code = cli.main(argv)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def command_paths() -> list[list[str]]:
    """Every command and group of commands, as words."""

    def walk(command: Any, words: list[str]) -> list[list[str]]:
        inner = getattr(command, "commands", {})
        return [words, *(path for name, sub in inner.items() for path in walk(sub, [*words, name]))]

    return walk(typer.main.get_command(cli.app), [])


def test_version(moeyard: Cli) -> None:
    assert moeyard("--version") == Result(0, f"moeyard {version('moeyard')}\n", "")


@pytest.mark.parametrize("words", command_paths(), ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help(moeyard: Cli, words: list[str], option: str) -> None:
    result = moeyard(*words, option)
    assert result.code == 0
    assert result.err == ""
    assert "Usage: " + " ".join(["moeyard", *words]) in result.out
    description = result.out.partition("Usage:")[2].splitlines()[1:]
    assert any(line.strip().endswith((".", ". ")) for line in description), "says nothing about what it does"


def test_the_commands_are_those_that_the_design_names() -> None:
    top = {words[0] for words in command_paths() if words}
    look = {"estimate", "doctor", "show-latest", "gates", "config"}
    assert top == {"train", "eval", "export", "report", "data", "generate", "chat", "serve"} | look


def test_examples_in_help_are_commands_that_work(moeyard: Cli) -> None:
    (example,) = re.findall(r"Example:  moeyard (.*?)\s*$", moeyard("train", "--help").out, flags=re.MULTILINE)
    assert moeyard(*example.split(), "--dry-run").code == 0
    overrides = re.search(r"such as ((?:\S+=\S+ ?)+)", re.sub(r"\s+", " ", moeyard("config", "show", "--help").out))
    assert overrides
    assert moeyard("config", "show", *overrides[1].rstrip(". ").split()).code == 0


def test_help_and_version_load_nothing_heavy() -> None:
    program = (
        "import sys\nfrom launch.cli import main\ncode = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'launch.config', 'matplotlib', 'tokenizers', 'fastapi'} & sys.modules.keys()\n"
        "assert not heavy, heavy\nsys.exit(code)\n"
    )
    for words in ("--help", "--version", "train -h"):
        done = subprocess.run(
            [sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--nprok", "2"], "--nprok"),
        (["gates", "lst"], "lst"),
        (["train", "--nproc", "0"], "--nproc"),
        (["train", "--nproc", "two"], "--nproc"),
        (["eval"], "RUN|MODEL_DIR"),
        (["generate", "x", "--top-p", "0"], "0 is not more than 0 and at most 1"),
        (["generate", "x", "--top-p", "1.5"], "1.5 is not more than 0 and at most 1"),
        (["generate", "x", "--seed", "-1"], "-1 is not from 0 to"),
        (["chat", "x", "--seed", str(2**70)], "is not from 0 to"),
        (["generate", "x", "--temperature", "-1"], "--temperature"),
        (["serve", "x", "--port", "65536"], "--port"),
        (["serve", "x", "--threads", "0"], "--threads"),
        (["doctor", "--port", "99999"], "--port"),
        (["export", "x", "--step", "-1"], "--step"),
        (["train", "--resume", ""], "auto, or a run or checkpoint folder"),
    ],
)
def test_wrong_usage_is_exit_code_2_on_stderr(moeyard: Cli, argv: list[str], text: str) -> None:
    result = moeyard(*argv)
    assert result.code == 2
    assert result.out == ""
    assert "Usage: moeyard" in result.err
    assert text in result.err


@pytest.mark.parametrize("argv", [[], ["gates"], ["config"], ["data"]])
def test_no_command_shows_the_help_and_is_exit_code_2(moeyard: Cli, argv: list[str]) -> None:
    result = moeyard(*argv)
    assert result.code == 2
    assert "Usage: moeyard" in result.out + result.err


# --- errors -----------------------------------------------------------------------------------------------------------


def test_one_problem_is_one_line(moeyard: Cli) -> None:
    result = moeyard("config", "show", "optim.lrr=1")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: command line  optim.lrr: unknown option. Did you mean 'lr'? Known: betas")
    assert result.err.count("\n") == 1


def test_options_are_checked_before_ranks_start_when_resuming_the_newest_run_too(moeyard: Cli) -> None:
    result = moeyard("train", "--nproc", "2", "--resume", "auto", "optim.lrr=1")
    assert result.code == 2
    assert result.err.startswith("error: command line  optim.lrr: unknown option.")  # not "rank 0: error"


def test_several_problems_are_a_list(moeyard: Cli) -> None:
    result = moeyard("train", "--nproc", "2", "data.tokenizer.kind=file", "optim.lr=0", "train.global_batch=3")
    assert result.code == 2
    assert result.err.splitlines() == [
        "error: 3 problems",
        "  command line  optim.lr: must be greater than 0 (given: 0)",
        "  command line  train.global_batch: 3 sequences do not split evenly over 2 ranks",
        "  command line  data.tokenizer.path: goes with kind: file, and kind: file needs it",
    ]


def test_the_exit_code_is_the_errors_own(moeyard: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnError(UserError):
        exit_code = 7

    for error, code, text in ((OwnError("broken"), 7, "error: broken\n"), (UserError(), 1, "error: UserError\n")):

        def fail(*_args: object, error: UserError = error) -> None:
            raise error

        monkeypatch.setattr("launch.config_file.load_config", fail)
        assert moeyard("config", "show") == Result(code, "", text)


@pytest.mark.parametrize("place", ["first", "last"])
def test_debug_shows_the_traceback(moeyard: Cli, place: str) -> None:
    argv = ["config", "show", "a.b=1"]
    with pytest.raises(ConfigError, match="a: unknown section"):
        moeyard(*(["--debug", *argv] if place == "first" else [*argv, "--debug"]))


def test_debug_reaches_the_trainer(moeyard: Cli) -> None:
    argv = ["train", "data.sources=[{source: nowhere}]"]
    assert "'nowhere' is neither a known source" in moeyard(*argv).err
    with pytest.raises(UserError, match="'nowhere' is neither a known source"):
        moeyard(*argv, "--debug")


def test_ctrl_c_is_exit_code_130(moeyard: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.config_file.load_config", interrupted)
    assert moeyard("config", "show") == Result(130, "", "interrupted\n")


def test_a_program_that_is_interrupted_says_so() -> None:
    program = (
        "import os, signal, sys\nimport launch.config_file\nfrom launch.cli import main\n"
        # A test run that a shell has put in the background inherits "ignore".
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "launch.config_file.load_config = lambda *args: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['config', 'show']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_bugs_keep_their_traceback(moeyard: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for bug in (ZeroDivisionError("a bug"), EOFError("a bug"), OSError("a bug")):

        def broken(*_args: object, bug: Exception = bug) -> None:
            raise bug

        monkeypatch.setattr("launch.config_file.load_config", broken)
        with pytest.raises(type(bug), match="a bug"):
            moeyard("config", "show")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "import sys\nfrom launch.cli import main\nsys.exit(main(['config', 'schema']))\n"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)
    process.stderr.close()


def shell(line: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """A shell command; ``$moeyard`` in it is the program."""
    program = f"{sys.executable} -m launch.cli"
    environment = {**os.environ, "moeyard": program, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, check=False, timeout=120)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_without_a_traceback() -> None:
    done = shell("$moeyard config schema > /dev/full")
    assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")


def test_a_full_disk_names_its_file_unless_debugging(moeyard: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a")

    monkeypatch.setattr("launch.config_file.load_config", fail)
    assert moeyard("config", "show") == Result(1, "", "error: No space left on device: runs/a\n")
    with pytest.raises(OSError, match="No space left"):
        moeyard("--debug", "config", "show")


def test_closed_streams_are_no_error() -> None:
    done = shell("$moeyard config schema >&- <&-")
    assert (done.returncode, done.stderr) == (0, b"")


def test_characters_that_the_terminal_lacks_are_shown_as_escapes() -> None:
    done = shell("$moeyard config show eval.sample_prompt=$prompt", PYTHONIOENCODING="ascii", prompt="é☺")
    assert done.returncode == 0, done.stderr
    assert rb"sample_prompt: \xe9\u263a" in done.stdout


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ("gate.k=3", "gate.k"),
        ("gate=topk", "gate"),
        ("model.dim=64", "model.dim"),
        ("train.steps=3", "train.steps"),
        ("eval.interval=3", "eval.interval"),
        ("data.tokenizer.kind=bytes", "data.tokenizer.kind"),
    ],
)
def test_an_evaluation_refuses_changes_that_it_would_not_look_at(moeyard: Cli, change: str, path: str) -> None:
    result = moeyard("eval", "nowhere", change, "train.seq_len=16", "data.sources=[{source: x}]", "eval={}")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(
        f"error: command line  {path}: changes nothing in an evaluation, which takes the model"
    )
    assert "eval.final_sequences" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("exit_codes", "code", "said"),
    [
        ([2, 3], 2, ""),
        ([-15, 2], 2, ""),
        ([-15, 3], 1, ""),
        ([-9, -15], 137, "error: rank 0 was killed by SIGKILL (the system kills processes this way when memory runs"),
        ([-15, -11], 139, "error: rank 1 was killed by SIGSEGV\n"),
        ([-15], 143, "error: rank 0 was killed by SIGTERM\n"),
    ],
)
def test_the_exit_code_of_several_ranks_is_that_of_the_one_that_failed(
    exit_codes: list[int], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from launch.local_ranks import _code_of_first

    failures = {rank: ProcessFailure(rank, 100 + rank, number, "") for rank, number in enumerate(exit_codes)}
    assert _code_of_first(ChildFailedError("train", failures)) == code
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert bool(err) == bool(said)


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["report", "nowhere"], 2, "nowhere is not a folder"),
        (["export", "nowhere"], 2, "nowhere does not exist"),
        (["eval", "nowhere"], 2, "there is no folder nowhere"),
        (["generate", "nowhere", "Hello"], 2, "there is no folder nowhere"),
        (["chat", "nowhere"], 2, "there is no folder nowhere"),
        (["generate", "empty"], 2, "empty is neither a run directory (no config.yaml) nor a model (no config.json)"),
        (["serve", "empty"], 1, "neither a run directory nor an exported model"),
        (["train", "--resume", "nowhere"], 2, "--resume nowhere: there is no such folder"),
        (["train", "tiny"], 2, "Did you mean --config tiny?"),
        (["train", "--config", "tniy"], 2, "Did you mean 'tiny'?"),
        (["data", "show", "data.sources=[{source: nowhere}]"], 2, "'nowhere' is neither a known source"),
        (["show-latest"], 2, "no run named 'tiny' under runs; make one with: moeyard train --config tiny"),
        (["show-latest", "--recipe", "tinny"], 2, "--recipe tinny: there is no such file. Did you mean 'tiny'?"),
        (["show-latest", "--name", "b c"], 2, "make one with: moeyard train --config tiny run.name='b c'"),
    ],
)
def test_things_that_are_not_there(moeyard: Cli, argv: list[str], code: int, text: str) -> None:
    Path("empty").mkdir()
    result = moeyard(*argv)
    assert result.code == code, result
    assert result.err.startswith("error: ")
    assert text in result.err
    assert result.out == ""
    assert [path.name for path in Path().iterdir()] == ["empty"]


# --- looking ----------------------------------------------------------------------------------------------------------


def test_gates_list(moeyard: Cli) -> None:
    result = moeyard("gates", "list")
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "topk Top-k routing: each token visits the k experts with the best scores" in lines
    assert "switch Top-1 routing of the Switch Transformer" in lines, "gates that share a file tell themselves apart"
    assert list(json.loads(moeyard("gates", "list", "--json").out)) == gate_names()


def test_gates_show(moeyard: Cli) -> None:
    result = moeyard("gates", "show", "topk")
    assert result.code == 0
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip().startswith("gate.")}
    assert set(rows) == {f"gate.{name}" for name in TopKConfig.model_fields if name != "name"}
    assert re.search(r"gate\.k +integer >= 1 +2 +experts per token", rows["gate.k"])
    assert "none | learned | fixed | second_choice" in rows["gate.noise"]
    assert "Switch Transformer   k=1 renormalise=false" in result.out
    for noise in ("====", "``", "Shape suffixes"):
        assert noise not in result.out
    assert json.loads(moeyard("gates", "show", "topk", "--json").out) == TopKConfig.model_json_schema()


def test_an_unknown_gate(moeyard: Cli) -> None:
    result = moeyard("gates", "show", "topkk")
    assert result.code == 2
    assert result.err.startswith("error: unknown gate 'topkk'. Did you mean 'topk'? Known: ")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"enum": ["a", "b"]}, "a | b"),
        ({"const": "a"}, "a"),
        ({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}, "number > 0 | null"),
        ({"type": "integer", "minimum": 1, "maximum": 8}, "integer >= 1 <= 8"),
        ({}, "any"),
    ],
)
def test_allowed_values_in_words(field: dict[str, Any], text: str) -> None:
    assert inspect_commands._values(field) == text


def test_config_show_loads_back(moeyard: Cli, tmp_path: Path) -> None:
    result = moeyard("config", "show", "--config", "tiny", "gate.k=3")
    (tmp_path / "out.yaml").write_text(result.out, encoding="utf-8")
    assert load_config("out.yaml").config == load_config("tiny", ["gate.k=3"]).config


def test_config_show_origins(moeyard: Cli, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("train:\n  steps: 7\n", encoding="utf-8")
    result = moeyard("config", "show", "-c", "my.yaml", "--origins", "optim.lr=0.5")
    found = {line.split()[0]: re.split(r"  +", line.strip())[1:] for line in result.out.splitlines()}
    assert found["train.steps"] == ["7", "my.yaml:2"]
    assert found["optim.lr"] == ["0.5", "command line"]
    assert found["run.name"] == ['"run"', "default"]
    assert set(found) == set(flatten(TrainConfig().model_dump(mode="json")))


def test_config_show_json(moeyard: Cli) -> None:
    result = moeyard("config", "show", "--json", "run.name=007")
    assert config_from_values(json.loads(result.out), [], origin="x").run.name == "007"
    both = json.loads(moeyard("config", "show", "--json", "--origins", "run.name=007").out)
    assert both["config"]["run"]["name"] == "007"
    assert both["origins"]["run.name"] == "command line"


def test_config_schema(moeyard: Cli) -> None:
    result = moeyard("config", "schema")
    assert (result.code, json.loads(result.out)) == (0, schema())


def test_estimate(moeyard: Cli) -> None:
    result = moeyard("estimate", "-c", "tiny", "--ranks", "2", "--corpus-tokens", "1000")
    assert result.code == 0
    assert result.out.splitlines()[0].strip() == "tiny: what it needs"
    for word in (
        "parameters",
        "FLOPs per token",
        "memory per rank",
        "traffic per step",
        "checkpoint",
        "epochs of 1,000",
    ):
        assert word in result.out
    found = json.loads(moeyard("estimate", "-c", "tiny", "--ranks", "2", "--json").out)
    assert f"{found['params']['total']:,}" in result.out
    uneven = moeyard("estimate", "--ranks", "3")
    assert uneven.code == 2
    assert "16 sequences do not split evenly over 3 ranks" in uneven.err


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_dry_run_shows_shapes_and_writes_nothing(moeyard: Cli, tmp_path: Path, ranks: str) -> None:
    result = moeyard(
        "train", "--dry-run", "--nproc", ranks, "--config", "tiny", "model.num_layers=2", "model.moe.num_experts=4"
    )
    assert result.code == 0
    assert re.search(r"blocks\.\*\.moe\.experts\.w_gate_EDF +4 x \d+ x \d+ +2 ", result.out)
    assert "Nothing was trained or written." in result.out
    assert f"{ranks} rank(s)" in result.out
    assert list(tmp_path.iterdir()) == []


def test_show_latest_of_runs_in_every_state(moeyard: Cli, tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "mine-20260101-000000"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    ask = ("show-latest", "--name", "mine", "--runs", str(run.parent))
    begun = moeyard(*ask)  # killed before its first row
    assert begun.code == 0
    assert "nothing was logged yet" in begun.out
    assert "it has no checkpoint to go on from" in begun.out
    rows = [
        {"kind": "train", "step": 5, "elapsed_s": 60.0, "tokens_seen": 1234, "imbalance": 1.25},
        {"kind": "eval", "step": 5, "bits_per_byte": 2.5},
        {"kind": "sample", "step": 5, "prompt": "To be", "text": " or\nnot"},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '7\n{"kind": "tr')
    (run / "checkpoints" / "step_000004").mkdir(parents=True)
    lines = moeyard(*ask).out.splitlines()
    assert lines[:3] == ["sample:", "  | To be or", "  | not"]
    assert "trained        5 steps, 1.0 min, 1,234 tokens, imbalance 1.25" in lines
    assert "bits per byte  2.5000 on held-out text, at step 5" in lines
    assert lines[-1] == f"go on          moeyard train --resume '{run}'"
    (run / "model").mkdir()
    (run / "heatmaps").mkdir()
    (run / "heatmaps" / "step_000005.png").touch()
    lines = moeyard(*ask).out.splitlines()
    assert lines[-1] == f"serve          moeyard serve '{run}'"
    assert f"expert loads   {run / 'heatmaps' / 'step_000005.png'}  (1 picture(s))" in lines
