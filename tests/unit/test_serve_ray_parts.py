"""The parts of the Ray hosts that work without Ray: options, reports, signals."""

from __future__ import annotations

import importlib.util
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from moe.errors import CheckpointError, ConfigError, UserError
from serve.client import (
    CacheStats,
    EngineHealth,
    EngineStats,
    ExpertRecord,
)
from serve.engine.settings import EngineSettings
from serve.hosts import ray_local
from serve.hosts.embedded import MissingExtraError
from serve.hosts.ray_local import Signals, serve_with_ray
from serve.hosts.ray_merge import best_health, merge_records, merge_stats, worst_health
from serve.hosts.ray_options import HEADROOM, RayOptions
from serve.hosts.sockets import ListenError, open_listener
from serve.http.settings import ServerSettings

pytestmark = pytest.mark.unit

# Options.


def test_engine_settings_and_options_have_the_same_defaults() -> None:
    assert RayOptions(model="x").engine_settings() == EngineSettings(threads=1)
    assert {one.name for one in fields(EngineSettings)} <= set(RayOptions.model_fields)
    assert RayOptions(model="x").server_settings() == ServerSettings()
    assert {one.name for one in fields(ServerSettings)} - {"stop_engine"} <= set(RayOptions.model_fields)


def test_an_engine_refuses_before_ray_does() -> None:
    options = RayOptions(model="x", max_sequences=8, max_queue=4, threads=3, drain_s=7)
    ray = options.engine_deployment(Path("/m"))
    assert ray["max_ongoing_requests"] == 8 + 4 + HEADROOM
    assert ray["ray_actor_options"]["num_cpus"] == 3
    assert ray["ray_actor_options"]["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert ray["graceful_shutdown_timeout_s"] > 7
    assert ray["user_config"] == {"weights": "/m"}
    assert "autoscaling_config" not in ray
    assert options.fixed_single


def test_replicas_scale_by_load() -> None:
    options = RayOptions(model="x", layout="B", min_replicas=0, max_replicas=4, max_sequences=8)
    ray = options.engine_deployment(Path("/m"))
    assert "num_replicas" not in ray
    scaling = ray["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (0, 1, 4)
    assert scaling["target_ongoing_requests"] == 8
    assert options.ingress_deployment()["max_ongoing_requests"] == 4 * options.engine_requests


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {}}, "no model is named"),
        ({"model": {"a": "x", "b": "y"}}, "layout A serves one model, got a, b"),
        ({"model": {"a": "x", "b": "y"}, "layout": "B", "name": "c"}, "name is for a single model"),
        ({"min_replicas": 3, "max_replicas": 2}, r"min_replicas \(3\) exceeds max_replicas \(2\)"),
        ({"min_replicas": 0, "max_replicas": 2}, "only layout B scales to zero"),
        ({"max_step_tokens": 3}, "max_step_tokens must be at least 32"),
        ({"api_keys": ("",)}, "API key must not be empty"),
    ],
)
def test_values_that_do_not_go_together_are_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RayOptions(**({"model": "x"} | values))


def test_keys_come_from_a_string_or_the_environment_and_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEYARD_API_KEYS", "sk-c sk-d")
    given = RayOptions(model="x", api_keys="sk-a sk-b")
    assert given.with_environment().api_keys == ("sk-a", "sk-b")
    assert RayOptions(model="x").with_environment().server_settings().api_keys == ("sk-c", "sk-d")
    assert "sk-a" not in repr(given)


def test_a_wrong_path_and_a_missing_ray_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        RayOptions(model=str(tmp_path / "none")).paths()
    if importlib.util.find_spec("ray") is not None:
        with pytest.raises(CheckpointError, match="no such file or folder"):
            serve_with_ray(tmp_path / "none")
        with pytest.raises(ConfigError, match="num_replicas"):
            serve_with_ray(tmp_path, replicas=0)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    with pytest.raises(MissingExtraError, match=r"pip install --upgrade 'moeyard\[ray\]'"):
        serve_with_ray(tmp_path / "none")


def test_a_taken_port_is_known_before_ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(ray_local, "require_ray_extra", lambda: None)
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port} on 127.0.0.1 is already in use; port "):
            serve_with_ray(tmp_path, port=port)


def test_names_of_engine_deployments_are_safe() -> None:
    assert RayOptions.engine_name("org/my model#2") == "Engine-org-my-model-2"


def test_signals_interrupt_a_start_and_are_counted_afterwards() -> None:
    before = [signal.getsignal(number) for number in Signals.NUMBERS]
    starting, serving = Signals(), Signals()
    with starting.caught(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    seen = []
    with serving.caught():
        serving.count_only()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)
            seen.append((serving.urgency, serving.exit_code))
    assert seen == [(1, 0), (2, 130), (3, 130)]
    assert [signal.getsignal(number) for number in Signals.NUMBERS] == before


# Reports.


def test_counts_of_replicas_add_up() -> None:
    one = EngineStats(
        num_running=1,
        generation_tokens=5,
        finished={"stop": 1},
        cache=CacheStats(16, 8, 8),
        expert_load=((1, 2),),
        uptime_s=3,
    )
    two = EngineStats(num_running=2, generation_tokens=7, finished={"stop": 1, "abort": 2}, expert_load=((3, 4),))
    total = merge_stats([one, two])
    assert (total.num_running, total.generation_tokens, total.uptime_s) == (3, 12, 3)
    assert total.finished == {"stop": 2, "abort": 2}
    assert total.cache == CacheStats(16, 8, 8)
    assert total.expert_load == ((4, 6),)
    assert merge_stats([]) == EngineStats()
    assert merge_stats([one, EngineStats(expert_load=((1, 2, 3),))]).expert_load == ((1, 2),)


def test_a_deployment_is_as_well_as_its_best_replica_and_a_server_as_its_worst_model() -> None:
    states = [EngineHealth("dead"), EngineHealth("ready", 3), EngineHealth("ready", 1), EngineHealth("starting")]
    assert best_health(states) == EngineHealth("ready", 1)
    assert worst_health(states) == EngineHealth("dead")


def test_expert_records_add_up() -> None:
    one = ExpertRecord(True, 2.0, 3, 4, ((1, 2),), (1.5,))
    assert merge_records([one, ExpertRecord(False, 1.0, 1, 1, ((1, 1),), (2.5,))]) == ExpertRecord(
        True, 2.0, 4, 5, ((2, 3),), (2.5,)
    )
    assert merge_records([]) == ExpertRecord()
