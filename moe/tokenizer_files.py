"""Reading the files of a tokenizer, with a clear error for everything that can be wrong with them."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from moe.errors import TokenizerError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


def read_tokenizer(path: Path) -> tuple[Path, str, dict[str, Any]]:
    """A ``tokenizer.json``, or the one in a directory, and the values of the ``tokenizer_config.json`` beside it.

    Returns:
        the file, its text, and the config's values (empty without a config).

    Raises:
        TokenizerError: missing, unreadable, truncated, or not a tokenizer.
    """
    file = _find_file(path)
    text = _read_text(file)
    values = _parse_json(text, file)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        keys = ", ".join(sorted(values)[:8]) if isinstance(values, dict) else type(values).__name__
        raise TokenizerError(
            f"{file} is JSON but not a tokenizer: a tokenizer.json of the tokenizers library has a 'model' object,"
            f" this has: {keys or 'nothing'}"
        )
    return file, text, _read_config(file.parent)


def _find_file(path: Path) -> Path:
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            return path / TOKENIZER_FILE
        names = sorted(entry.name for entry in path.iterdir())
        hint = f"; it has {', '.join(names[:8])}" if names else "; it is empty"
        if {"tokenizer.model", "vocab.json", "merges.txt"} & set(names):
            hint += " (convert an older format with transformers: AutoTokenizer.from_pretrained(...).save_pretrained())"
        raise TokenizerError(f"there is no {TOKENIZER_FILE} in {path}{hint}")
    if path.is_file():
        return path
    siblings = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    raise TokenizerError(
        f"there is no tokenizer at {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not a {TOKENIZER_FILE}: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error.strerror or error}") from error


def _parse_json(text: str, file: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not text.strip():
            raise TokenizerError(f"{file} is empty") from error
        at_end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        what = "is truncated" if at_end else "is not JSON"
        raise TokenizerError(f"{file} {what}: {error.msg} at line {error.lineno}, column {error.colno}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` with the template that newer transformers keep in a file of its own."""
    config: dict[str, Any] = {}
    file = directory / CONFIG_FILE
    if file.is_file():
        values = _parse_json(_read_text(file), file)
        if not isinstance(values, dict):
            raise TokenizerError(f"{file} must hold a JSON object, it holds {type(values).__name__}")
        config = values
    if (directory / TEMPLATE_FILE).is_file():
        config = config | {"chat_template": _read_text(directory / TEMPLATE_FILE)}
    return config
