"""gates, config, estimate, doctor, show-latest: what there is, what it costs, what is wrong."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.commands.gates_compare import compare_gates
from launch.commands.train_commands import Config, Json, Overrides

PANEL = "Look"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    gates = typer.Typer(no_args_is_help=True, help="List gating strategies, show their options, compare them.")
    gates.command("list")(list_gates)
    gates.command("show")(show_gate)
    gates.command("compare")(compare_gates)
    app.add_typer(gates, name="gates", rich_help_panel=PANEL)
    config = typer.Typer(no_args_is_help=True, help="Show a resolved config, or the JSON schema of all options.")
    config.command("show")(show_config)
    config.command("schema")(config_schema)
    app.add_typer(config, name="config", rich_help_panel=PANEL)
    app.command("estimate", rich_help_panel=PANEL)(estimate)
    app.command("doctor", rich_help_panel=PANEL)(doctor)
    app.command("show-latest", rich_help_panel=PANEL)(show_latest)


def list_gates(as_json: Json = False) -> None:
    """List the gates that gate.name can be."""
    from gates import gate_names, gate_type

    summaries = {name: _first_sentence(_about(gate_type(name))) for name in gate_names()}
    if as_json:
        print(json.dumps(summaries))
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        print(f"{name:{width}}  {summary}")
    print("\nOptions of one: moeyard gates show NAME")


def show_gate(name: Annotated[str, typer.Argument(help="The gate's name.")], as_json: Json = False) -> None:
    """Show a gate's options, their defaults and what they mean."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from gates import gate_type
    from moe.errors import ConfigError

    try:
        found = gate_type(name)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    schema = found.config_type.model_json_schema()
    if as_json:
        print(json.dumps(schema))
        return
    console = Console(highlight=False)
    console.print(Text(f"gate {name}", style="bold"))
    print(f"{_about(found)}\n")  # its lines are not broken anew: there may be tables among them
    table = Table(box=None, header_style="dim", padding=(0, 1))
    for column in ("option", "values", "default", "meaning"):
        table.add_column(column, overflow="fold")
    for option, field in schema["properties"].items():
        if option != "name":
            value = field.get("default")
            value = value["name"] if isinstance(value, dict) and "name" in value else value  # a gate within a gate
            default = json.dumps(value) if "default" in field else "required"
            cells = (f"gate.{option}", _values(field), default, field.get("description", ""))
            table.add_row(*map(Text, cells))
    console.print(table)


def show_config(
    overrides: Overrides = None,
    config: Config = None,
    origins: Annotated[bool, typer.Option("--origins", help="Say where each value comes from.")] = False,
    as_json: Json = False,
) -> None:
    """Show every option of a config as training would see it."""
    from launch.config_file import dump_config, flatten, load_config

    resolved = load_config(config, overrides or [])
    values = resolved.config.model_dump(mode="json")
    for note in resolved.notes:
        typer.echo(f"note: {note}", err=True)
    if as_json:
        print(json.dumps({"config": values, "origins": dict(resolved.origins)} if origins else values))
    elif origins:
        lines = [(path, json.dumps(value), resolved.origins[path]) for path, value in flatten(values).items()]
        widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
        for path, value, origin in lines:
            print(f"{path:{widths[0]}}  {value:{widths[1]}}  {origin}")
    else:
        print(dump_config(resolved.config), end="")


def config_schema() -> None:
    """Print the JSON schema of config files, for editors."""
    from launch.config_file import schema

    print(json.dumps(schema(), indent=1))


def estimate(
    overrides: Overrides = None,
    config: Config = None,
    ranks: Annotated[int, typer.Option("--ranks", "-n", min=1, help="Processes that would train.")] = 1,
    corpus_tokens: Annotated[
        int | None, typer.Option("--corpus-tokens", min=1, help="Tokens to train on, to count epochs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Work out parameters, FLOPs, memory, traffic and disk of a config."""
    from launch.config_file import load_config
    from launch.estimate import estimate as work_out
    from launch.estimate import print_estimate

    resolved = load_config(config, overrides or [], world_size=ranks).config
    result = work_out(resolved, world_size=ranks, corpus_tokens=corpus_tokens)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        print_estimate(resolved, result)


def doctor(
    root: Annotated[Path, typer.Option("--runs", help="Where run directories would go.")] = Path("runs"),
    port: Annotated[
        int, typer.Option("--port", "-p", min=1, max=65535, help="The port that serving would take.")
    ] = 8000,
    self_test: Annotated[bool, typer.Option(help="Start two ranks that talk to each other.")] = True,
    as_json: Json = False,
) -> int:
    """Check this machine; every line says how to mend it. Exit code 1 when something essential is missing."""
    from launch import doctor as examination

    findings = examination.examine(root, port, self_test=self_test)
    if as_json:
        print(examination.to_json(findings))
    else:
        _print_findings(findings)
    return examination.exit_code(findings)


def _print_findings(findings: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "info": "dim", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.status, style=styles[finding.status]), finding.check, Text(finding.text))
        if finding.mend:
            table.add_row("", "", Text(f"-> {finding.mend}", style=styles[finding.status]))
    Console(highlight=False).print(table)
    failed = sum(finding.status == "fail" for finding in findings)
    print(f"{failed} problem(s) to mend first" if failed else "ready to train and serve")


def show_latest(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="FILE|RECIPE", help="A config; its run.name is looked for.")
    ] = "tiny",
    name: Annotated[str | None, typer.Option("--name", help="Look for runs of this run.name instead.")] = None,
    root: Annotated[
        Path | None, typer.Option("--runs", help="Where runs are; the recipe's run.root unless given.")
    ] = None,
) -> None:
    """Show the newest run of a name: result, sample, files, and what to do with it."""
    from launch.config_file import find_config, load_config
    from launch.latest_run import describe_latest

    config = load_config(str(find_config(recipe, asked_by=f"--recipe {recipe}"))).config
    begin = f"moeyard train --config {shlex.quote(recipe)}" + (f" run.name={shlex.quote(name)}" if name else "")
    for line in describe_latest(root or Path(config.run.root), name or config.run.name, begin):
        print(line)


def _about(gate: type) -> str:
    """What the gate's author wrote about it, without markup and without the legend of names in its code."""
    import inspect

    from gates import gate_names, gate_type

    alone = sum(gate_type(name).__module__ == gate.__module__ for name in gate_names()) == 1
    module_doc = getattr(inspect.getmodule(gate), "__doc__", None) if alone else None
    text = inspect.cleandoc(module_doc or gate.__doc__ or "")
    paragraphs = [part for part in text.split("\n\n") if not part.startswith("Shape suffixes")]
    return re.sub(r"(?m)^=[= ]+\n?", "", "\n\n".join(paragraphs)).replace("``", "").strip()


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".")


def _values(field: dict[str, Any]) -> str:
    """What a JSON schema allows, in a few words."""
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if "anyOf" in field:
        return " | ".join(_values(part) for part in field["anyOf"])
    kind = str(field.get("type", "any"))
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return " ".join([kind, *bounds])
