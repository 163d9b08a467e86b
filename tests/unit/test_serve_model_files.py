"""What the server reads beside the weights, and what it says when it is not there or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe.errors import CheckpointError, UserError
from serve.client import SamplingDefaults
from serve.engine.model_files import find_model_dir, model_name, read_model_files, weights_fingerprint
from serve.hosts.embedded import MissingExtraError, choose_threads, require_serve_extra
from serve.http.settings import ServerSettings
from serve.protocol.chat_template import ChatTemplate, ChatTemplateError
from serve.protocol.errors import ApiError

pytestmark = pytest.mark.unit


def write(directory: Path, **files: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in ({"config": {}} | files).items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / f"{name}.json").write_text(text, encoding="utf-8")
    return directory


def test_a_run_stands_for_its_exported_model(tmp_path: Path) -> None:
    model = write(tmp_path / "tiny-1" / "model")
    assert find_model_dir(tmp_path / "tiny-1") == model
    assert find_model_dir(model) == model
    assert model_name(model) == "tiny-1"
    assert model_name(write(tmp_path / "exported")) == "exported"
    named = write(tmp_path / "tiny-2" / "model", config={"moeyard": {"extra": {"name": "tiny"}}})
    assert model_name(named) == "tiny"


def test_missing_models_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_model_dir(tmp_path / "nothing")
    run = tmp_path / "runs" / "tiny-1"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"no exported model yet; make one with: moeyard export {run}"):
        find_model_dir(run)
    with pytest.raises(CheckpointError, match=r"neither a run directory nor an exported model \(no config.json\)$"):
        find_model_dir(tmp_path / "runs")
    write(run / "model")
    with pytest.raises(CheckpointError, match=f"did you mean {run}"):
        find_model_dir(tmp_path / "runs")
    with pytest.raises(CheckpointError, match="is a file"):
        find_model_dir(run / "model" / "config.json")


def test_generation_defaults_special_tokens_and_ends(tmp_path: Path) -> None:
    files = read_model_files(
        write(
            tmp_path,
            generation_config={
                "do_sample": True,
                "temperature": 0.8,
                "top_p": 0.95,
                "top_k": 50,
                "eos_token_id": [0, 2],
            },
            tokenizer_config={"eos_token": {"content": "<e>"}, "bos_token": "<b>", "unk_token": None},
        )
    )
    assert files.defaults == SamplingDefaults(temperature=0.8, top_p=0.95, top_k=50)
    assert files.special_tokens == {"eos_token": "<e>", "bos_token": "<b>"}
    assert files.eos_ids == {0, 2}
    bare = read_model_files(write(tmp_path / "bare"))
    assert (bare.defaults, bare.eos_ids) == (SamplingDefaults(), frozenset())
    greedy = read_model_files(write(tmp_path / "greedy", generation_config={"do_sample": False, "temperature": 0.8}))
    assert greedy.defaults.temperature == 0.0


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100, got 'hot'"),
        ({"top_p": 2}, "top_p must be a number from 0 to 1, got 2"),
        ({"eos_token_id": "<e>"}, "eos_token_id must be a token id or a list of them"),
        ("[]", "must hold a JSON object, got list"),
        ("{", "not valid JSON"),
    ],
)
def test_damaged_generation_config_is_named(tmp_path: Path, generation: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{words}"):
        read_model_files(write(tmp_path, generation_config=generation))


def test_the_fingerprint_follows_weights_and_config(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    first = weights_fingerprint(tmp_path)
    assert weights_fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(bytes(999) + b"\x01")
    assert weights_fingerprint(tmp_path) != first


def test_chat_templates_render_as_hugging_face_does() -> None:
    source = (
        "{% for m in messages %}\n"
        "  {% if m.role == 'pirate' %}{{ raise_exception('no pirates') }}{% endif %}\n"
        "{{ bos_token }}{{ m.role }}:{{ m.content | tojson }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    template = ChatTemplate(source, {"bos_token": "<b>"})
    rendered = template.render([{"role": "user", "content": "<é>"}])
    assert rendered == '<b>user:"<é>"\n>'
    with pytest.raises(ApiError, match="no pirates") as caught:
        template.render([{"role": "pirate", "content": ""}])
    assert (caught.value.status, caught.value.param) == (400, "messages")
    with pytest.raises(ChatTemplateError, match="chat_template, line 2: "):
        ChatTemplate("\n{% for %}")


def test_chat_templates_run_in_a_sandbox() -> None:
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        with pytest.raises(ApiError, match="cannot render"):
            ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_the_plain_template_is_readable_text() -> None:
    plain = ChatTemplate.plain()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    assert plain.render(messages) == "System: Be brief.\nUser: Hi.\nAssistant:"
    assert plain.stop == ("\nUser:", "\nSystem:")


def test_threads_leave_one_core_to_http() -> None:
    threads, reason = choose_threads(None)
    assert threads >= 1
    assert "core" in reason
    assert choose_threads(3) == (3, "as asked for")
    with pytest.raises(UserError, match="threads must be at least 1, got 0"):
        choose_threads(0)


def test_an_empty_api_key_is_refused() -> None:
    with pytest.raises(UserError, match="must not be empty"):
        ServerSettings(api_keys=("good", " "))


def test_a_missing_extra_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    require_serve_extra()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(MissingExtraError, match=r"^serving needs uvicorn: pip install 'moeyard\[serve\]'$"):
        require_serve_extra()
