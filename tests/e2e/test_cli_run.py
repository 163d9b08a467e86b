"""The life of a run through ``moeyard``: train, look, talk, export, interrupt, continue; and what errors say.

Training, chat and whatever starts ranks are processes of their own; the other commands run in this one, which is
quicker and shows the same.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest

from launch import cli
from moe.checkpoint import load_model
from parallel.checkpoint import find_checkpoint, read_checkpoint
from tests.training_program import ROOT, environment, losses, only_run, options, wait_for_step

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROGRAM = [sys.executable, "-m", "launch.cli"]
STEPS = 8


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def moeyard(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command in this process, with ``stdin`` as its input."""
    for name, value in {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)

    def call(*argv: object, stdin: str | TextIO = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        capsys.readouterr()
        code = cli.main([str(arg) for arg in argv])
        return Result(code, *capsys.readouterr())

    return call


def process(*argv: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, argv)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), input=stdin, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def trained(corpus: Path, work: Path) -> Path:
    """A run of two ranks on this machine, to its end."""
    result = process("train", "--nproc", 2, *options(corpus, work, f"train.steps={STEPS}", "run.name=first"))
    assert result.returncode == 0, result.stdout + result.stderr
    run = only_run(work)
    assert f"step {STEPS}/{STEPS}" in result.stdout
    assert f"serve it with: moeyard serve {run}" in result.stdout
    assert "Traceback" not in result.stderr
    return run


def final_eval(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["kind"] == "eval" and row["final"]]
    return row


def test_eval_repeats_the_final_evaluation_of_the_run(trained: Path, moeyard: Cli) -> None:
    expected = final_eval(trained)
    found = json.loads(moeyard("eval", trained, "--json").out)
    assert found["tokens"] == expected["tokens"]
    assert found["text_bytes"] == expected["text_bytes"]
    for name in ("loss", "bits_per_byte"):  # one rank adds up in another order than two
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    lines = moeyard("eval", trained / "model").out.splitlines()
    assert lines[0] == f"bits per byte  {expected['bits_per_byte']:.4f}"
    assert lines[2] == f"over           {expected['tokens']:,} tokens, {expected['text_bytes']:,} bytes of text"
    fewer = json.loads(moeyard("eval", trained, "eval.final_sequences=2", "--json").out)
    assert fewer["tokens"] == 2 * 32


def test_generate_is_repeatable_by_its_seed(trained: Path, moeyard: Cli) -> None:
    ask = ("generate", trained, "Act 1", "-n", 12, "--temperature", 1, "--seed")
    first = moeyard(*ask, 3)
    assert first.code == 0
    assert first.out.startswith("Act 1")
    assert len(first.out) > len("Act 1\n")
    assert re.fullmatch(r"\[\d+ tokens, [\d,]+ tokens/s\]\n", first.err)
    assert moeyard(*ask, 3).out == first.out
    second = moeyard(*ask, 4, "--quiet")
    assert second.err == ""
    assert second.out != first.out
    assert moeyard(*ask, 3, "--count", 2).out == f"{first.out}\n---\n{second.out}"


def test_generate_reads_a_prompt_from_stdin_or_begins_a_text(trained: Path, moeyard: Cli) -> None:
    ask = ("--temperature", 0, "-n", 6, "-q")
    told = moeyard("generate", trained, "Act 2, line 1", *ask)
    assert moeyard("generate", trained, "-", *ask, stdin="Act 2, line 1").out == told.out
    assert moeyard("generate", trained, *ask).code == 0


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_printed(trained: Path, moeyard: Cli) -> None:
    result = moeyard("generate", trained, "word " * 100)
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: the prompt has 500 tokens; the model's context of 256 leaves no room\n"


def test_a_chat(trained: Path) -> None:
    talk = "Hello there\n/stats\n\n/reset\n/stats\n/what\n/quit\nnever read\n"
    result = process("chat", trained, "-n", 6, "--seed", 1, stdin=talk)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "This model has no chat template" in result.stdout
    before, _, after = result.stdout.partition("(forgotten)")
    assert "model> " in before
    assert re.search(r"2 messages; last prompt \d+ of 256 tokens, first token after [\d.]+ s; [1-6] tokens at ", before)
    assert "0 messages; last prompt 0 of 256 tokens" in after
    assert "(no command /what) /reset" in after
    assert "model> " not in after


def test_a_chat_ends_with_its_input_and_forgets_what_does_not_fit(trained: Path, moeyard: Cli) -> None:
    result = moeyard("chat", trained, "-n", 2, "--seed", 1, stdin=f"{'a' * 150}\n{'b' * 150}\n{'c' * 300}\n")
    assert result.code == 0
    assert result.out.count("model> ") == 3
    assert "(the first 2 messages no longer fit into the context)" in result.out
    assert re.search(r"error: the message has 3\d\d tokens; the model's context is 256", result.out)
    alone = moeyard("chat", trained, "-n", 2, "--system", "Be brief.")
    assert (alone.code, alone.out.count("you> ")) == (0, 1)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # which of them is the locale's choice
def test_a_prompt_that_is_not_utf8(trained: Path, moeyard: Cli, errors: str) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8", errors=errors)
    result = moeyard("generate", trained, "-", stdin=stdin)
    assert result == (2, "", "error: the prompt on stdin is not UTF-8 text\n")


def test_a_chat_goes_on_after_a_line_that_is_no_text(trained: Path, moeyard: Cli) -> None:
    result = moeyard("chat", trained, "-n", 2, "--seed", 1, stdin="a\udcff\nHello\n/stats\n")
    assert result.code == 0
    assert result.out.count("error: that line is not UTF-8 text") == 1
    assert "2 messages; " in result.out


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(
    trained: Path, moeyard: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe.generate import generate

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield next(generate(*args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.conversation.generate", interrupted)
    result = moeyard("chat", trained, "--seed", 1, stdin="Hello\n/stats\n")
    assert result.code == 0
    assert result.out.count("[stopped]") == 1
    assert re.search(r"2 messages; .*; 1 tokens at 0/s", result.out)


def test_ctrl_c_at_the_prompt_of_a_chat_says_how_to_leave(
    trained: Path, moeyard: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter([KeyboardInterrupt(), EOFError()])

    def ask(_prompt: str) -> str:
        raise next(lines)

    monkeypatch.setattr("builtins.input", ask)
    result = moeyard("chat", trained)
    assert result.code == 0
    assert "(/quit leaves)" in result.out


def test_export_to_another_folder_and_of_another_step(trained: Path, moeyard: Cli, tmp_path: Path) -> None:
    result = moeyard("export", trained, "--out", tmp_path / "last")
    assert (result.code, result.out) == (0, f"{tmp_path / 'last'}\n")
    assert moeyard("export", trained, "--step", 4, "--out", tmp_path / "four").code == 0
    own, last, four = (load_model(path) for path in (trained / "model", tmp_path / "last", tmp_path / "four"))
    assert (own.extra["step"], last.extra["step"], four.extra["step"]) == (STEPS, STEPS, 4)
    weights = [loaded.model.state_dict() for loaded in (own, last, four)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not all(weights[0][name].equal(weights[2][name]) for name in weights[0])
    text = [moeyard("generate", path, "Act", "--seed", 1, "-q", "-n", 6).out for path in (trained, tmp_path / "last")]
    assert text[0] == text[1]
    missing = moeyard("export", trained, "--step", 5, "--out", tmp_path / "five")
    assert missing.code == 1
    assert "step_000005 is not a checkpoint folder" in missing.err
    assert not (tmp_path / "five").exists()


def test_report(trained: Path, moeyard: Cli) -> None:
    result = moeyard("report", trained)
    assert (result.code, result.out) == (0, f"{trained / 'report.html'}\n")
    assert "<html" in (trained / "report.html").read_text(encoding="utf-8")


def test_show_latest(trained: Path, moeyard: Cli, tmp_path: Path) -> None:
    for ask in (["--name", "first"], ["--recipe", str(tmp_path / "first.yaml")]):
        (tmp_path / "first.yaml").write_text("run: {name: first}\n")
        lines = moeyard("show-latest", *ask, "--runs", trained.parent).out.splitlines()
        assert f"bits per byte  {final_eval(trained)['bits_per_byte']:.4f} on held-out text, at step {STEPS}" in lines
        assert f"run directory  {trained}" in lines
        assert lines[-1] == f"serve          moeyard serve {trained}"


def test_data_prepare_and_show(corpus: Path, trained: Path, moeyard: Cli, tmp_path: Path) -> None:
    config = options(corpus, tmp_path)
    prepared = moeyard("data", "prepare", *config)
    assert prepared.code == 0
    assert "8 + 2 documents" in prepared.err
    rows = json.loads(moeyard("data", "show", "--json", *config).out)
    assert [(row["side"], row["documents"]) for row in rows] == [("train", 8), ("validation", 2)]
    assert sum(row["text_bytes"] for row in rows) == sum(len(p.read_bytes()) for p in corpus.glob("*.txt"))
    table = moeyard("data", "show", *config)
    assert table.code == 0
    for row in rows:
        assert f"{row['tokens']:,}" in table.out
    assert not (tmp_path / "runs").exists()


def test_one_interrupt_of_the_parent_saves_and_resume_auto_goes_on(corpus: Path, tmp_path: Path) -> None:
    config = options(corpus, tmp_path, "run.name=stopped", "checkpoint.interval=0")
    program = subprocess.Popen(
        [*PROGRAM, "train", "--nproc", "2", *config, "train.steps=100000"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    run = wait_for_step(program, tmp_path, 3)
    program.send_signal(signal.SIGINT)  # to the parent alone, as a supervisor would
    output, _ = program.communicate(timeout=60)
    assert program.returncode == 130, output
    assert "Traceback" not in output
    assert f"--resume {run}" in output
    saved = read_checkpoint(find_checkpoint(run / "checkpoints")).step
    assert saved == max(losses(run)), output
    result = process("train", "--nproc", 2, "--resume", "auto", *config, f"train.steps={saved + 2}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"resumed from {run}/checkpoints/step_{saved:06d}" in result.stdout
    assert only_run(tmp_path) == run
    assert sorted(losses(run)) == list(range(1, saved + 3))
    assert (run / "model" / "config.json").is_file()


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_option_is_told_once_however_many_ranks(corpus: Path, tmp_path: Path) -> None:
    result = process("train", "--nproc", 2, *options(corpus, tmp_path, "optim.lrr=1"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("optim.lrr: unknown option. Did you mean 'lr'?") == 1
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_what_only_the_ranks_can_find_out_is_told_once_too(corpus: Path, tmp_path: Path) -> None:
    result = process("train", "--nproc", 2, *options(corpus, tmp_path, "data.sources=[{source: nowhere}]"))
    assert result.returncode == 2, result.stderr
    assert "SIGTERM" not in result.stderr
    assert result.stderr.count("'nowhere' is neither a known source") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "serve"])
def test_a_folder_that_is_no_run(command: str, moeyard: Cli, tmp_path: Path) -> None:
    result = moeyard(command, tmp_path)
    assert result.code in (1, 2)
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert str(tmp_path) in result.err
    assert re.search("neither a run directory .*nor a", result.err)


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "serve"])
def test_a_model_whose_weights_are_cut_short(command: str, trained: Path, moeyard: Cli, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trained / "model", broken)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    result = moeyard(command, broken, *(["--port", "0"] if command == "serve" else []))
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {weights} is truncated or damaged")


def test_a_run_that_was_never_exported_says_how(trained: Path, moeyard: Cli, tmp_path: Path) -> None:
    run = tmp_path / "first-20260101-000000"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("model"))
    result = moeyard("generate", run)
    assert result.code == 2
    assert f"make one with: moeyard export {run}" in result.err
    assert moeyard("export", run).code == 0
    assert moeyard("generate", run, "-n", 2).code == 0
