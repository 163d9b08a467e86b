"""What is compared, how runs are planned, and what their metrics and clocks come to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gates import gate_names, parse_gate_config
from launch.gate_comparison.gate_cost import GateCost, against_reference
from launch.gate_comparison.page import render_html
from launch.gate_comparison.report import render_json, render_markdown
from launch.gate_comparison.results import GateResult, RunResult, Timeline, collect
from launch.gate_comparison.runs import check_same_options, plan_runs, prepare_folder
from launch.gate_comparison.table import Report, columns, options_text
from launch.gate_comparison.variants import ONE_EXPERT, choose_variants, read_changes
from launch.run_dir import RunDir, RunDirError
from moe.errors import ConfigError
from tests.small_run import config

pytestmark = pytest.mark.unit

LABELS = ["topk", "comet", "relu"]


# --- what is compared ------------------------------------------------------------------------------------------------


def test_every_gate_that_can_train_is_compared_and_the_others_say_why_not() -> None:
    variants = choose_variants(config(model__moe__num_experts=8))
    assert set(variants.gates) == (set(gate_names()) - {"soft", "forced", "replay"}) | {
        "topk-bias",
        "topk-quantile",
        "local_search-comet",
    }
    assert set(variants.left_out) == {"soft", "forced", "replay"}
    assert "by looking at later ones" in variants.left_out["soft"]


@pytest.mark.parametrize("k", [2, 3])
def test_all_gates_get_as_many_experts_per_token_as_the_config_says(k: int) -> None:
    variants = choose_variants(config(model__moe__num_experts=8, gate__k=k))
    found = {label: parse_gate_config(options).experts_per_token(8) for label, options in variants.gates.items()}
    free = found.pop("zero_computation")  # some of its k choices are experts that compute nothing
    assert 1 <= free <= k
    assert {label for label, count in found.items() if count != pytest.approx(k)} == set(ONE_EXPERT)


def test_a_gate_that_does_not_fit_is_left_out_unless_it_was_asked_for() -> None:
    six = config(model__moe__num_experts=6)  # deepseek_v3 wants groups of equal size
    assert "deepseek_v3" in choose_variants(six).left_out
    with pytest.raises(ConfigError, match=r"gate deepseek_v3  num_groups"):
        choose_variants(six, ["deepseek_v3"])
    with pytest.raises(ConfigError, match="declares nothing to use for generation"):
        choose_variants(six, ["topk", "soft"])
    assert list(choose_variants(six, ["forced"]).gates) == ["forced"]


def test_an_unknown_label_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'comet'"):
        choose_variants(config(), ["commet"])


def test_a_file_changes_options_and_adds_variants(tmp_path: Path) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text("comet: {gamma: 0.5}\ntopk-3: {name: topk, k: 3}\nhash: {name: topk, k: 4}\n", encoding="utf-8")
    gates = choose_variants(config(), ["comet", "topk-3", "hash"], read_changes(file)).gates
    assert gates["comet"] == {"name": "comet", "k": 2, "gamma": 0.5}
    assert gates["topk-3"] == {"name": "topk", "k": 3}
    assert gates["hash"] == {"name": "topk", "k": 4}  # nothing of the other gate's options stays
    file.write_text("comet: {gama: 0.5}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="gate comet  gama: Extra inputs"):
        choose_variants(config(), (), read_changes(file))  # wrong options are no reason to leave a gate out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topk: [1", "is no YAML"),
        ("- topk\n", "must hold a label"),
        ("", "must hold a label"),
        ("a/b: {name: topk}\n", "names folders"),
        ("topk: 3\n", "topk must hold"),
    ],
)
def test_a_wrong_file_says_what_it_must_hold(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        read_changes(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_changes(tmp_path / "none.yaml")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_runs_differ_in_gate_and_seed_alone_and_take_all_gates_first(tmp_path: Path) -> None:
    base = config(run__seed=5)
    gates = choose_variants(base, LABELS).gates
    runs = plan_runs(base, gates, 2, tmp_path)
    assert [run.name for run in runs] == [f"{label}-seed{seed}" for seed in (5, 6) for label in LABELS]
    for run in runs:
        same = run.config.model_copy(update={"gate": base.gate, "run": base.run, "checkpoint": base.checkpoint})
        assert same == base
        assert run.config.run.seed == run.seed
        assert run.config.gate.name == run.label


def test_problems_of_all_gates_come_at_once(tmp_path: Path) -> None:
    base = config(train__steps=30)
    gates = {"comet": {"name": "comet", "entropy_warmup": 50}, "topk": {"name": "topk", "k": 9}}
    with pytest.raises(ConfigError) as caught:
        plan_runs(base, gates, 1, tmp_path)
    assert "entropy_warmup" in str(caught.value)
    assert "k" in str(caught.value)


def test_runs_that_would_stop_early_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.stop_after: a comparison trains to the end"):
        plan_runs(config(train__stop_after=3), {"topk": {"name": "topk"}}, 1, tmp_path)


def test_runs_of_other_options_are_not_mixed_with_these(tmp_path: Path) -> None:
    base = config(model__vocab_size=None)
    gates = choose_variants(base, LABELS).gates
    runs = plan_runs(base, gates, 1, tmp_path)
    # Training writes down the vocabulary that the tokenizer has.
    RunDir.create(plan_runs(config(), gates, 1, tmp_path)[0].config, ["test"])
    check_same_options(runs, tmp_path)
    other = plan_runs(config(train__steps=77, model__vocab_size=None), gates, 1, tmp_path)
    with pytest.raises(ConfigError, match=r"train\.steps 500 -> 77"):
        check_same_options(other, tmp_path)


def test_a_folder_without_a_checkpoint_begins_anew_unless_somebody_trains_there(tmp_path: Path) -> None:
    (run,) = plan_runs(config(), {"topk": {"name": "topk"}}, 1, tmp_path)
    folder = RunDir.create(run.config, ["test"]).path
    with RunDir.open(folder).locked(), pytest.raises(RunDirError, match="is being trained by process"):
        prepare_folder(run)
    assert folder.is_dir()
    assert prepare_folder(run) is None
    assert not folder.exists()
    folder = RunDir.create(run.config, ["test"]).path
    (folder / "checkpoints" / "step_10").mkdir()
    assert prepare_folder(run) == folder


# --- results ---------------------------------------------------------------------------------------------------------


def written_run(folder: Path, per_byte: float, **last_eval: Any) -> None:
    """The files of a finished run of 40 steps of 100 tokens with two layers of four experts."""
    rows: list[dict[str, Any]] = [{"kind": "start", "step": 0, "start_step": 0, "steps": 40}]
    for step, load_LE in ((20, [[400] * 4, [2000] * 4]), (40, [[1000] * 4, [4000, 0, 0, 0]])):
        rows.append(
            {"kind": "train", "step": step, "imbalance": 1.0 + step / 20, "dead_expert_fraction": step / 100}
            | {"dropped_fraction": 0.25, "tokens_per_s": 10.0 * step, "elapsed_s": 2.0 * step}
            | {"tokens_seen": 100 * step, "load_LE": load_LE}
        )
    final = {"kind": "eval", "step": 40, "final": True, "bits_per_byte": per_byte, "load_LE": [[3, 1, 0, 0], [2] * 4]}
    rows.append(final | last_eval)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}", encoding="utf-8")


def made_up(tmp_path: Path) -> list[GateResult]:
    base = config(train__steps=40, train__global_batch=2, train__seq_len=50)
    gates = choose_variants(base, ["topk", "sparse_ot"]).gates
    runs = plan_runs(base, gates, 3, tmp_path)
    for run in runs[:5]:  # the last one is not finished
        surrogate = {} if run.label == "topk" else {"agreement": 0.5, "max_vio": 0.25, "batch_max_vio": 0.0}
        offset = 0.5 if run.label == "topk" else 0.0
        written_run(RunDir.create(run.config, ["test"]).path, 2 + run.seed + offset, surrogate=surrogate)
    return collect(gates, runs)


def test_results_are_what_the_metrics_say(tmp_path: Path) -> None:
    first, second = made_up(tmp_path)
    assert (first.label, second.label) == ("sparse_ot", "topk")  # fewest bits first
    assert (len(first.runs), len(second.runs)) == (2, 3)
    assert first.mean(lambda run: run.bits_per_byte) == 2.5
    assert first.spread(lambda run: run.bits_per_byte) == pytest.approx(math.sqrt(0.5))
    run = second.runs[0]
    assert run.experts_over_time == Timeline([20, 40], [2.4, 2.0])  # 9600 and 8000 pairs of 2 layers x 2000 tokens
    assert run.experts_per_token == 2.0  # the late quarter
    assert (run.imbalance, run.dead, run.dropped) == (3.0, 0.4, 0.25)
    assert run.eval_imbalance == (3.0 + 1.0) / 2
    assert (run.tokens_per_s, run.train_s, run.tokens) == (300.0, 80.0, 4000)
    assert math.isnan(run.agreement)
    assert first.runs[0].agreement == 0.5
    assert (first.runs[0].surrogate_imbalance, first.runs[0].batch_imbalance) == (1.25, 1.0)


def test_what_changes_over_time_is_a_mean_over_seeds_where_all_have_a_value() -> None:
    def run(steps: list[int], values: list[float]) -> RunResult:
        return RunResult("a", 0, Path(), *[0.0] * 8, 0, experts_over_time=Timeline(steps, values))

    gate = GateResult("a", {}, [run([10, 20, 30], [1.0, 2.0, 3.0]), run([10, 30, 40], [3.0, 5.0, 0.0])])
    assert gate.over_time(lambda run: run.experts_over_time) == Timeline([10, 30], [2.0, 4.0])


def test_cost_is_compared_within_a_round() -> None:
    costs = against_reference({"comet": [0.004, 0.040, 0.008], "topk": [0.001, 0.010, 0.001]})
    assert costs["comet"] == GateCost(8.0, 4.0, "topk")
    assert costs["topk"] == GateCost(1.0, 1.0, "topk")
    assert against_reference({"a": [2.0], "b": [1.0]})["a"].ratio == 2.0  # without topk: against the fastest


# --- pages -----------------------------------------------------------------------------------------------------------


def report(tmp_path: Path, **changes: Any) -> Report:
    gates = made_up(tmp_path)
    values = {
        "config": config(train__steps=40, train__global_batch=2, train__seq_len=50),
        "gates": gates,
        "costs": {"topk": GateCost(1.5, 1.0, "topk"), "sparse_ot": GateCost(6.0, 4.0, "topk")},
        "left_out": {"soft": "looks ahead"},
        "failures": {"relu-seed0": "exit code 1: <b>loss</b> nan"},
        "unfinished": ["sparse_ot-seed2"],
        "seeds": 3,
        "jobs": 2,
        "command": ["moeyard", "gates", "compare"],
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def test_markdown_holds_every_number(tmp_path: Path) -> None:
    text = render_markdown(report(tmp_path))
    assert "| sparse_ot | 2.5000 ± 0.7071 | 2.00 | 3.00 | 2.00 | 40.0% | 25.0% | 0.50 | 300 | 6.00 (4.0x) |" in text
    assert "| topk | 3.5000 ± 1.0000 | 2.00 | 3.00 | 2.00 | 40.0% | 25.0% |  | 300 | 1.50 (1.0x) |" in text
    assert "Not finished: 1 of the runs" in text
    assert "relu-seed0" in text
    assert "- `soft`: looks ahead" in text
    assert "## Experts per token over time" in text
    assert "| topk | 2.40 | 2.40 | 2.40 | 2.40 | 2.00 | 2.00 |" in text


def test_columns_without_a_value_are_left_out(tmp_path: Path) -> None:
    whole = report(tmp_path)
    alone = Report(**{**vars(whole), "gates": [gate for gate in whole.gates if gate.label == "topk"], "costs": {}})
    assert [c.title for c in columns(whole) if c not in columns(alone)]
    assert "agreement" not in [column.title for column in columns(alone)]
    assert "gate, ms" not in [column.title for column in columns(alone)]


def test_the_page_shows_every_run_and_escapes_what_it_was_given(tmp_path: Path) -> None:
    page = render_html(report(tmp_path))
    assert page.count('<i style="left:') == 5
    assert "&lt;b&gt;loss&lt;/b&gt;" in page
    assert "<b>loss</b>" not in page
    assert page.count('class="panel chart"') == 4  # both gates over time, twice
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    empty = report(tmp_path, gates=[], costs={})
    assert "0 gates" in render_markdown(empty)
    assert "Not finished" in render_html(empty)
    assert json.loads(render_json(empty))["gates"] == []


def test_json_has_every_run_and_no_nan(tmp_path: Path) -> None:
    values = json.loads(render_json(report(tmp_path)), parse_constant=lambda name: pytest.fail(name))
    assert [len(gate["runs"]) for gate in values["gates"]] == [2, 3]
    assert values["gates"][1]["runs"][0]["agreement"] is None
    assert values["gates"][0]["cost"]["ratio"] == 4.0


def test_options_read_as_they_are_typed() -> None:
    gate = GateResult("x", {"name": "local_search", "gate": {"name": "comet", "k": 2}}, [])
    assert options_text(gate) == "gate.name=local_search gate.gate.name=comet gate.gate.k=2"
