"""Validation loss and bits per byte, against sums in NumPy over the raw validation tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.config import TrainConfig
from launch.data import Domain, EvalWindows, prepare_data
from launch.evaluate import EvalResult, evaluate, evaluate_path
from moe import ModelConfig, MoEConfig, Tokenizer, Transformer
from moe.checkpoint import save_model
from moe.errors import ConfigError
from parallel.topology import Topology

pytestmark = pytest.mark.unit

ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "", None)
BYTES = Tokenizer.bytes()
SEQ_LEN, K = 16, 2
TEXTS = (["Was it a rat I saw?", "Żółw — 龜 — żółw"], ["The second domain.", "", "Its documents are short."])


def domain(name: str, documents: list[str]) -> Domain:
    ids = [BYTES.eos_id]
    for text in documents:
        ids += [*BYTES.encode(text, special=False), BYTES.eos_id]
    text_bytes = sum(len(text.encode()) for text in documents)
    return Domain(name, 1.0, np.array(ids, dtype=np.uint16), text_bytes, len(documents))


@pytest.fixture(scope="module")
def windows() -> EvalWindows:
    return EvalWindows([domain(f"d{i}", texts) for i, texts in enumerate(TEXTS)], SEQ_LEN, BYTES)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        vocab_size=BYTES.vocab_size,
        dim=16,
        num_layers=2,
        num_heads=2,
        num_dense_layers=1,
        max_seq_len=32,
        init_std=0.3,
        moe=MoEConfig(num_experts=4, hidden_dim=8),
    )
    model = Transformer(config, {"name": "topk", "k": K})
    model.init_weights(3)
    return model


def nats_by_hand(model: Transformer, domains: list[Domain]) -> float:
    """Cross-entropy of every token but each domain's first, windows cut here, one at a time, without padding."""
    total = 0.0
    for domain in domains:
        tokens = np.asarray(domain.tokens, dtype=np.int64)
        for start in range(0, len(tokens) - 1, SEQ_LEN):
            ids = tokens[start : start + SEQ_LEN + 1]
            with torch.no_grad():
                scores = model.eval()(torch.from_numpy(ids[None, :-1])).logits_BTV[0].numpy().astype(np.float64)
            highest = scores.max(-1, keepdims=True)
            log_sum = np.log(np.exp(scores - highest).sum(-1)) + highest[:, 0]
            total += float((log_sum - scores[np.arange(len(ids) - 1), ids[1:]]).sum())
    return total


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 100])
def test_bits_per_byte_are_those_of_the_raw_tokens_at_any_batch_size(
    model: Transformer, windows: EvalWindows, batch: int
) -> None:
    result = evaluate(model, windows, ALONE, limit=None, batch=batch)
    nats = nats_by_hand(model, windows.domains)
    text_bytes = sum(len(text.encode()) for texts in TEXTS for text in texts)
    targets = sum(len(domain.tokens) - 1 for domain in windows.domains)
    assert (result.tokens, result.text_bytes) == (targets, text_bytes)
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.loss == pytest.approx(nats / targets, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert np.array(result.load_LE).shape == (1, 4)
    assert np.sum(result.load_LE) == K * targets, "padding must not be routed"


def test_a_limit_takes_the_first_windows(model: Transformer, windows: EvalWindows) -> None:
    count = windows.num_sequences
    assert count > 4
    whole = evaluate(model, windows, ALONE, limit=None, batch=4)
    first = evaluate(model, windows, ALONE, limit=3, batch=2)
    assert first.tokens == int(windows.rows(0, 3)[1].sum())
    assert first.text_bytes == windows.text_bytes(0, 3)
    assert evaluate(model, windows, ALONE, limit=10 * count, batch=4) == whole
    ids_BS, valid_BT = windows.rows(0, 3)
    nats = 0.0
    for ids, valid in zip(ids_BS, valid_BT, strict=True):
        with torch.no_grad():
            log_probs = model.eval()(ids[None, :-1]).logits_BTV[0].double().log_softmax(-1)
        nats -= float(log_probs[torch.arange(SEQ_LEN), ids[1:]][valid].sum())
    assert first.nats == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_as_it_was(model: Transformer, windows: EvalWindows, training: bool) -> None:
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, windows, ALONE, limit=2, batch=2)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_noise_and_capacity_of_training_are_off(model: Transformer, windows: EvalWindows) -> None:
    noisy = Transformer(model.config, {"name": "topk", "k": K, "jitter": 0.5, "capacity_factor": 0.5})
    noisy.load_state_dict(model.state_dict())
    noisy.train()
    assert evaluate(noisy, windows, ALONE, limit=None, batch=3) == evaluate(model, windows, ALONE, limit=None, batch=3)


def test_compute_dtype(model: Transformer, windows: EvalWindows) -> None:
    wide = evaluate(model, windows, ALONE, limit=None, batch=4)
    narrow = evaluate(model, windows, ALONE, limit=None, batch=4, compute_dtype=torch.bfloat16)
    assert narrow.nats != wide.nats
    assert narrow.loss == pytest.approx(wide.loss, rel=0.02)


def test_uniform_scores_cost_log_of_the_vocabulary(windows: EvalWindows, model: Transformer) -> None:
    flat = Transformer(model.config, {"name": "topk", "k": K})
    for parameter in flat.parameters():
        torch.nn.init.zeros_(parameter)
    result = evaluate(flat, windows, ALONE, limit=None, batch=4)
    assert result.loss == pytest.approx(math.log(BYTES.vocab_size), rel=1e-6)


def test_bits_per_byte_of_known_sums() -> None:
    result = EvalResult(nats=math.log(2) * 300, tokens=50, text_bytes=150, load_LE=[])
    assert result.bits_per_byte == pytest.approx(2.0)
    assert result.loss == pytest.approx(6 * math.log(2))


def test_evaluating_an_exported_model_uses_its_own_config_and_tokenizer(tmp_path: Path, model: Transformer) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text(f"Document {number}: " + "lorem ipsum — dolor " * (number + 2), "utf-8")
    config = TrainConfig.model_validate(
        {
            "model": model.config.model_dump(),
            "gate": {"name": "topk", "k": K},
            "data": {
                "sources": [{"source": str(corpus)}],
                "tokenizer": {"kind": "bpe"},  # not what the model has: its own counts
                "cache": str(tmp_path / "cache"),
                "validation_fraction": 0.3,
            },
            "train": {"seq_len": SEQ_LEN},
        }
    )
    folder = tmp_path / "model"
    save_model(folder, model, BYTES, extra={"train_config": config.model_dump(mode="json")})
    bytes_data = config.data.model_copy(
        update={"tokenizer": config.data.tokenizer.model_copy(update={"kind": "bytes"})}
    )
    data = prepare_data(bytes_data, seq_len=SEQ_LEN, progress=False)
    windows = EvalWindows(data.validation, SEQ_LEN, data.tokenizer)
    expected = evaluate(model, windows, ALONE, limit=None, batch=7)
    found = evaluate_path(str(folder), [])
    assert (found["tokens"], found["text_bytes"]) == (expected.tokens, expected.text_bytes)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    fewer = evaluate_path(str(folder), ["eval.final_sequences=2"])
    assert fewer["tokens"] == int(windows.rows(0, 2)[1].sum())
    with pytest.raises(ConfigError, match=r"eval\.final_sequence.*[Dd]id you mean"):
        evaluate_path(str(folder), ["eval.final_sequence=2"])
