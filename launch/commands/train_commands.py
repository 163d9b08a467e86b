"""train, eval, export, report, data: from options to a run, and what is done with a run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Train"

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="path.to.option=value", help="Changes to the config, such as gate.k=3 train.steps=200."),
]
Config = Annotated[
    str | None, typer.Option("--config", "-c", metavar="FILE|RECIPE", help="YAML file, or a recipe's name: tiny.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _not_empty(value: str | None) -> str | None:
    if value == "":
        raise typer.BadParameter("it needs auto, or a run or checkpoint folder")
    return value


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("train", rich_help_panel=PANEL)(train)
    app.command("eval", rich_help_panel=PANEL)(evaluate)
    app.command("export", rich_help_panel=PANEL)(export)
    app.command("report", rich_help_panel=PANEL)(report)
    data = typer.Typer(no_args_is_help=True, help="Prepare and describe the text that a config trains on.")
    data.command("prepare")(prepare)
    data.command("show")(show)
    app.add_typer(data, name="data", rich_help_panel=PANEL)


def train(
    context: typer.Context,
    overrides: Overrides = None,
    config: Config = None,
    nproc: Annotated[int, typer.Option("--nproc", "-n", min=1, help="Processes on this machine.")] = 1,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|PATH",
            callback=_not_empty,
            help="Go on with the newest run of this name, or with a run or checkpoint folder.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print shapes, memory, FLOPs and bytes per step; stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on the terminal.")] = False,
) -> int:
    """Train a model; the same as torchrun launch/train.py.

    Example:  moeyard train --config tiny --nproc 2 gate.k=3
    """
    changes = overrides or []
    if resume in (None, "auto"):  # every problem with the options once and before any process starts
        from launch.config_file import load_config

        resolved = load_config(config, changes, world_size=nproc if nproc > 1 else None)
        for note in resolved.notes:
            typer.echo(f"note: {note}", err=True)
        if dry_run and resume is None:
            from launch.estimate import print_dry_run

            print_dry_run(resolved.config, world_size=nproc)
            return 0
    arguments = [f"--config={config}"] * (config is not None) + [f"--resume={resume}"] * (resume is not None)
    arguments += ["--dry-run"] * dry_run + ["--quiet"] * quiet + changes
    if context.find_root().params.get("debug"):
        arguments.insert(0, "--debug")
    if nproc > 1:
        from launch.local_ranks import run_ranks

        return run_ranks(nproc, arguments)
    from launch.train import main

    return main(arguments, program=("moeyard", "train"))


def evaluate(
    path: Annotated[str, typer.Argument(metavar="RUN|MODEL_DIR", help="A run, or an exported model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="path.to.option=value", help="What to measure on, such as eval.final_sequences=64 train.seq_len=64."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on its validation text, in bits per byte."""
    import json

    _refuse_changes_without_effect(overrides or [])
    from launch.evaluate import evaluate_path

    result = evaluate_path(path, overrides or [])
    if as_json:
        print(json.dumps(result))
        return
    print(f"bits per byte  {result['bits_per_byte']:.4f}")
    print(f"loss           {result['loss']:.4f} nats per token")
    print(f"over           {result['tokens']:,} tokens, {result['text_bytes']:,} bytes of text")
    if "surrogate_agreement" in result:
        agreement, served, trained = (result[f"surrogate_{name}"] for name in ("agreement", "max_vio", "batch_max_vio"))
        print(f"routing        as generation does; {agreement:.0%} of pairs as in training,")
        print(f"               max / mean load {1 + served:.2f}, in training {1 + trained:.2f}")


def _refuse_changes_without_effect(changes: list[str]) -> None:
    """gate.k=3 would measure the same model as before and look as if it made no difference."""
    from launch.config_problems import option_paths
    from moe.errors import ConfigError

    options, problems = option_paths(), []
    counting = [
        option
        for option in options
        if (option.startswith("data.") and not option.startswith("data.tokenizer."))
        or option in ("eval.final_sequences", "train.compute_dtype", "train.seq_len")
    ]
    for change in changes:
        path = change.partition("=")[0]
        named = [option for option in options if f"{path}.".startswith(f"{option}.") or option.startswith(f"{path}.")]
        if path.startswith("gate.") or (named and not set(named) & set(counting)):
            why = "changes nothing in an evaluation, which takes the model as it was exported"
            problems.append(f"command line  {path}: {why}. These count: {', '.join(counting)}")
    if problems:
        raise ConfigError(problems)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run directory.")],
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="Which checkpoint; the newest unless given.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Where to; RUN/model unless given.")] = None,
) -> None:
    """Write a checkpoint's model as a Hugging Face directory."""
    from launch.export import export_run

    print(export_run(run, step, out))


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]) -> None:
    """Write RUN/report.html: curves, experts, times and samples on one page."""
    from launch.report import write_report

    print(write_report(run))


def prepare(overrides: Overrides = None, config: Config = None) -> None:
    """Tokenise a config's text into the cache, where training finds it."""
    _prepare(config, overrides, progress=True)


def show(overrides: Overrides = None, config: Config = None, as_json: Json = False) -> None:
    """Show documents, bytes, tokens and shares of a config's text."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from launch.data import PreparedData, describe, summarise

    data = _prepare(config, overrides, progress=not as_json)
    assert isinstance(data, PreparedData)
    if as_json:
        print(json.dumps([asdict(row) for row in summarise(data)], ensure_ascii=False))
    else:
        Console().print(describe(data))


def _prepare(config: str | None, overrides: list[str] | None, *, progress: bool) -> object:
    from launch.config_file import load_config
    from launch.data import prepare_data

    resolved = load_config(config, overrides or []).config
    return prepare_data(resolved.data, seq_len=resolved.train.seq_len, progress=progress)
