"""gates compare: from options to a comparison of gates."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.train_commands import Config, Overrides


def compare_gates(
    overrides: Overrides = None,
    config: Config = None,
    gates: Annotated[
        str | None,
        typer.Option("--gates", "-g", metavar="A,B,...", help="Only these; all that can be trained, unless given."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", "-s", min=1, help="Runs of each gate.")] = 3,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Processes side by side; one a core (or GPU) unless given."),
    ] = None,
    options: Annotated[
        Path | None,
        typer.Option(
            "--options", metavar="FILE", help="YAML with other options, or more variants: {topk-3: {name: topk, k: 3}}."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to; runs/gates-NAME unless given.")
    ] = None,
) -> int:
    """Train every gate on the same text with the same seeds, and report what each gave and cost.

    Stopped, it goes on where it was when called again. gate.k tells how many experts a token should have.

    Example:  moeyard gates compare --config tiny --gates topk,comet,relu train.steps=300
    """
    from launch.config_file import load_config
    from launch.gate_comparison import compare
    from launch.gate_comparison.variants import choose_variants, read_changes
    from moe.errors import ConfigError

    given = overrides or []
    lost = [text for text in given if text.startswith("gate") and not text.startswith("gate.k=")]
    if lost:
        why = "each gate that is compared has options of its own: --options FILE sets them"
        raise ConfigError([f"command line  {text.partition('=')[0]}: {why}" for text in lost])
    resolved = load_config(config, given, world_size=1)
    for note in resolved.notes:
        typer.echo(f"note: {note}", err=True)
    labels = [label.strip() for label in gates.split(",") if label.strip()] if gates is not None else []
    if gates is not None and not labels:
        raise ConfigError(["--gates: names no gate"])
    variants = choose_variants(resolved.config, labels, read_changes(options) if options else None)
    for name, why in variants.left_out.items():
        typer.echo(f"left out: {name}: {why}", err=True)
    folder = out or Path(resolved.config.run.root) / f"gates-{resolved.config.run.name}"
    command = ["moeyard", *sys.argv[1:]]
    try:
        result = compare(resolved.config, variants, seeds=seeds, out=folder, command=command, jobs=jobs)
    except KeyboardInterrupt:
        typer.echo(f"go on with: {shlex.join(command)}", err=True)
        raise
    print(f"page      {result.html}")
    print(f"Markdown  {result.markdown}")
    for name, why in result.failures.items():
        typer.echo(f"failed: {name}: {why}", err=True)
    return 1 if result.failures else 0
