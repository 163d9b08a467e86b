"""A tiny model that knows one sentence by heart, multi-byte characters and all, and runs of it to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe.checkpoint import save_model
from moe.config import ModelConfig, MoEConfig
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer, next_token_loss

SENTENCE = "Grüße, 😀 fox! STOP here. "
TOKENIZER = Tokenizer.bytes()


def fox_model(context: int, *, seed: int = 0, steps: int = 60) -> Transformer:
    """Sixty steps of training on one sentence: greedy decoding then repeats it. Other seeds know it less well."""
    torch.set_num_threads(1)
    moe = MoEConfig(num_experts=4, hidden_dim=32)
    model = Transformer(
        ModelConfig(vocab_size=TOKENIZER.vocab_size, dim=32, num_layers=2, num_heads=2, max_seq_len=context, moe=moe)
    )
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids_BT = torch.tensor([TOKENIZER.encode(SENTENCE * 4)[:96]])
    for _ in range(steps):
        loss, count = next_token_loss(model(ids_BT[:, :-1]).logits_BTV, ids_BT[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_run(folder: Path, *, context: int, broken: bool = False, template: str | None = None, **options: Any) -> Path:
    """A run directory whose exported model repeats the sentence.

    Args:
        broken: its weights load, but it does not run.
        template: the model's chat template; None: it has none.
        options: see :func:`fox_model`.
    """
    model = fox_model(context, **options)
    if broken:
        torch.nn.init.constant_(model.embed.weight, float("nan"))
    folder.mkdir()
    save_model(folder / "model", model, TOKENIZER)
    if template is not None:
        (folder / "model" / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
