"""The yardstick: nanoGPT's published CPU recipe on the bytes of the same plays, with the same plays held out.

The recipe is the one in nanoGPT's README for a CPU (4 layers, 4 heads, width 128, block 64, batch 12, 2,000 iterations,
no dropout; AdamW 1e-3 to 1e-4 by cosine after 100 steps of warm-up, betas 0.9 and 0.99, weight decay 0.1, clip 1). The
model is written here from torch's own transformer layers, which have the same structure (pre-norm, GELU, learned
positions); no line of nanoGPT is used.

    python benchmarks/nanogpt_cpu.py --json nanogpt.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launch.config import DataConfig, TokenizerConfig
from launch.data import prepare_data

LAYERS, HEADS, WIDTH, BLOCK, BATCH, STEPS = 4, 4, 128, 64, 12, 2000
PEAK_LR, FINAL_LR, WARMUP_STEPS = 1e-3, 1e-4, 100


class DenseGPT(nn.Module):
    """A GPT-2-like decoder over ``vocab`` symbols."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, WIDTH), nn.Embedding(BLOCK, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        length = ids_BT.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.token(ids_BT) + self.position(torch.arange(length))
        return self.head(self.blocks(x, mask=mask, is_causal=True))


def learning_rate(step: int) -> float:
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / (WARMUP_STEPS + 1)
    done = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return FINAL_LR + (PEAK_LR - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def bits_per_byte(model: DenseGPT, stream: np.ndarray, text_bytes: int) -> float:
    """Over all non-overlapping windows of the validation stream."""
    nats, starts = 0.0, range(0, len(stream) - BLOCK - 1, BLOCK)
    for begin in range(0, len(starts), 64):
        rows = np.stack([stream[s : s + BLOCK + 1] for s in starts[begin : begin + 64]]).astype(np.int64)
        ids = torch.from_numpy(rows)
        nats += float(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return nats / math.log(2) / (len(starts) * BLOCK) * (len(stream) / text_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1337)
    data = prepare_data(DataConfig(tokenizer=TokenizerConfig(kind="bytes")), seq_len=BLOCK, progress=True)
    train = np.asarray(data.train[0].tokens)
    model = DenseGPT(data.tokenizer.vocab_size)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    rng = np.random.default_rng(1337)
    start = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        begins = rng.integers(0, len(train) - BLOCK - 1, BATCH)
        ids = torch.from_numpy(np.stack([train[b : b + BLOCK + 1] for b in begins]).astype(np.int64))
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{STEPS} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)
    train_s = time.perf_counter() - start
    validation = data.validation[0]
    result = {
        "train_s": round(train_s, 1),
        "bits_per_byte": round(bits_per_byte(model, np.asarray(validation.tokens), validation.text_bytes), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": args.threads,
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
