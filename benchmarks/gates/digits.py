"""Every gate on handwritten digits: loss, accuracy, experts per sample and how many stay alive (experiment R7).

    OMP_NUM_THREADS=1 python benchmarks/gates/digits.py --experts 8 --seeds 3 --json digits.json --plot digits.png

scikit-learn's 1,797 digits of 8 x 8 pixels, 70 % to train on. Experts are 64-8-10 perceptrons whose outputs the gate
weighs; Adam at 3e-3, batches of 128, 40 epochs. Too easy to rank gates by accuracy: look at experts per sample after 5
epochs and at the end, and at live experts (visited by more than 1 % of test samples). A hash of the pixels' signs under
a random projection stands for the token id. Gates that look at the whole batch are tested as they serve: one sample at
a time.

Expected values are of an earlier independent implementation with its own variants of each gate; they tell the shape
(dense and top-k near 0.13 nats, top-1 whose weight is 1 far off, COMET without balance collapsing), not digits.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gates import plots
from gates import Gate, GateInput, Mode, RoutingPlan, build_gate

HIDDEN, CLASSES = 8, 10
GATES: dict[str, dict[str, Any] | None] = {
    "dense softmax": None,
    "topk": {"name": "topk", "k": 2, "balance_coef": 0.0},
    "topk + balance": {"name": "topk", "k": 2},
    "topk quantile": {"name": "topk", "k": 2, "balance": "quantile"},
    "top-1": {"name": "topk", "k": 1, "renormalise": False},
    "hash": {"name": "hash"},
    "comet, no balance": {"name": "comet", "entropy_coef": 0.1, "balance_coef": 0.0, "entropy_warmup": 1},
    "comet": {"name": "comet", "entropy_coef": 0.1},
    "comet, gamma 0.1": {"name": "comet", "entropy_coef": 0.1, "gamma": 0.1},
    "dselect_k": {"name": "dselect_k", "entropy_coef": 0.1},
    "local_search + topk": {"name": "local_search", "gate": {"name": "topk"}},
    "dense_to_sparse": {"name": "dense_to_sparse"},
    "activation (sigmoid)": {"name": "dense_to_sparse", "activation": "sigmoid"},
    "relu": {"name": "relu"},
    "top_p": {"name": "top_p", "mean_k": 2.0},
    "zero_computation": {"name": "zero_computation"},
    "expert_choice": {"name": "expert_choice"},
    "feature_choice": {"name": "feature_choice"},
    "mutual_choice": {"name": "mutual_choice"},
    "sparse_ot": {"name": "sparse_ot"},
    "sinkhorn": {"name": "sinkhorn", "k": 2},
    "base": {"name": "base", "mix_identity": False},
}
# By number of experts: cross-entropy, accuracy, experts at epoch 5 -> end, live experts (gates.md of the design notes).
EXPECTED: dict[int, dict[str, str]] = {
    8: {
        "dense softmax": ".133 / .957 / 8 -> 8 / 8",
        "topk": ".155 / .960 / 2 / 4.7",
        "topk + balance": ".138 / .959 / 2 / 8",
        "hash": ".495 / .859 / 1 / 8",
        "comet, no balance": ".185 / .956 / 2.0 -> 2.0 / 2.3",
        "comet, gamma 0.1": "(no balance) .160 / .953 / 1.7 -> 1.7 / 1.7",
    },
    6: {
        "dense softmax": ".136 / .961 / 6 -> 6 / 6",
        "topk": ".133 / .964 / 2 / 4.7",
        "topk + balance": ".144 / .960 / 2 / 6",
        "hash": ".408 / .877 / 1 / 6",
        "comet, no balance": ".181 / .948 / 1.3 -> 1.3 / 1.3",
        "comet, gamma 0.1": "(no balance) .181 / .947 / 1.3 / 1.3",
    },
}


class Data(NamedTuple):
    x_TD: Tensor
    ids_T: Tensor
    label_T: Tensor


def load_digits(seed: int) -> tuple[Data, Data]:
    """Training and test samples, pixels from 0 to 1 and centred; ids by the signs of 10 random projections."""
    from sklearn import datasets  # type: ignore[import-untyped]

    x, label = datasets.load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    split = int(0.7 * len(x))
    x = (x - x[order[:split]].mean(0)) / 16
    ids = ((x @ rng.standard_normal((x.shape[1], 10)) > 0) @ (1 << np.arange(10))).astype(np.int64)
    parts = (order[:split], order[split:])
    train, test = (Data(torch.tensor(x[p]).float(), torch.tensor(ids[p]), torch.tensor(label[p])) for p in parts)
    return train, test


class Model(nn.Module):
    """A gate over a bank of small perceptrons; without a gate a softmax over all of them."""

    def __init__(self, config: dict[str, Any] | None, dim: int, experts: int, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.experts = experts
        self.gate: Gate | None = None if config is None else build_gate(config, dim, experts)
        self.dense = nn.Parameter(torch.empty(experts, dim).normal_(0, 0.02, generator=rng)) if config is None else None
        if self.gate is not None:
            self.gate.reset_parameters(rng)
        self.w_in = nn.Parameter(torch.randn(experts, dim, HIDDEN, generator=rng) / dim**0.5)
        self.b_in = nn.Parameter(torch.zeros(experts, 1, HIDDEN))
        self.w_out = nn.Parameter(torch.randn(experts, HIDDEN, CLASSES, generator=rng) / HIDDEN**0.5)
        self.b_out = nn.Parameter(torch.zeros(experts, 1, CLASSES))

    def forward(self, data: Data, mode: Mode, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor, Any]:
        """Logits of the classes, the plan's (T, E) weights and the gate's output."""
        hidden_ETH = torch.relu(torch.einsum("td,edh->eth", data.x_TD, self.w_in) + self.b_in)
        out_ETC = hidden_ETH @ self.w_out + self.b_out
        if self.gate is None:
            assert self.dense is not None
            weight_TE, out = F.linear(data.x_TD, self.dense).softmax(-1), None
        else:
            gate = self.gate if mode is Mode.TRAIN else self.gate.causal_surrogate()
            assert gate is not None
            inp = GateInput(data.x_TD, ids_T=data.ids_T, mode=mode, rng=rng)
            out = gate(inp)
            plan: RoutingPlan = out.plan
            weight_TE = plan.dense_weight_TE()
        return torch.einsum("te,etc->tc", weight_TE, out_ETC), weight_TE, out


def run(config: dict[str, Any] | None, experts: int, seed: int, epochs: int, batch: int = 128) -> dict[str, float]:
    """Train and test one gate; see the module for what is measured."""
    begin = time.perf_counter()
    train, test = load_digits(seed)
    model = Model(config, train.x_TD.shape[1], experts, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(seed)
    per_epoch = len(train.x_TD) // batch
    step, early = 0, float("nan")
    for epoch in range(epochs):
        order = torch.randperm(len(train.x_TD), generator=rng)
        for index in order[: per_epoch * batch].split(batch):
            if model.gate is not None:
                model.gate.begin_step(step, epochs * per_epoch)
            part = Data(*(value[index] for value in train))
            logits_TC, _, out = model(part, Mode.TRAIN, rng)
            loss = F.cross_entropy(logits_TC, part.label_T)
            if model.gate is not None:
                coefs = model.gate.config.aux_coefs()
                loss = loss + sum(coefs[name] * value for name, value in out.aux.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if model.gate is not None:
                model.gate.end_step(out.plan.offered_E, out.signals)
            step += 1
        if epoch == 4:
            early = float(measure(model, test)[2])
    nats, accuracy, visited, live = measure(model, test)
    return {
        "cross_entropy": nats,
        "accuracy": accuracy,
        "experts_epoch_5": early,
        "experts_end": visited,
        "live": live,
        "seconds": time.perf_counter() - begin,
    }


@torch.no_grad()
def measure(model: Model, test: Data) -> tuple[float, float, float, float]:
    """Cross-entropy in nats, accuracy, experts per sample, and experts that more than 1 % of samples visit."""
    logits_TC, weight_TE, _ = model(test, Mode.PREFILL)
    nats = float(F.cross_entropy(logits_TC, test.label_T))
    accuracy = float((logits_TC.argmax(1) == test.label_T).float().mean())
    visits_TE = weight_TE > 1e-5
    return nats, accuracy, float(visits_TE.float().sum(1).mean()), float((visits_TE.float().mean(0) > 0.01).sum())


def draw_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Cross-entropy, experts per sample and live experts, a dot per seed."""
    figure, axes = plots.panels(3, height=0.8 + 0.19 * len(rows), width=3.2, share_y=True)
    labels = {"cross_entropy": "test loss (nats)", "experts_end": "experts per sample", "live": "live experts"}
    for one, (key, label) in zip(axes, labels.items(), strict=True):
        plots.dots(one, {row["gate"]: [run[key] for run in row["runs"]] for row in rows}, label)
        one.set_xlabel(label, fontsize=9)
    axes[0].set_xscale("log")  # from 0.1 to above 1
    axes[0].set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2], [f"{tick:g}" for tick in ticks])
    axes[0].minorticks_off()
    plots.save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--gates", nargs="*", default=list(GATES), choices=list(GATES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.experts} experts, {args.seeds} seeds, {args.epochs} epochs; mean (spread) over seeds")
    print(f"{'gate':22s} {'cross-entropy':>20s} {'accuracy':>8s} {'experts 5 -> end':>17s}  live     s  expected")
    rows = []
    for name in args.gates:
        runs = [run(GATES[name], args.experts, seed, args.epochs) for seed in range(args.seeds)]
        mean = {key: statistics.mean(one[key] for one in runs) for key in runs[0]}
        losses = [one["cross_entropy"] for one in runs]
        print(
            f"{name:22s} {mean['cross_entropy']:6.3f} ({min(losses):.3f}-{max(losses):.3f}) {mean['accuracy']:8.3f}"
            f" {mean['experts_epoch_5']:8.2f} -> {mean['experts_end']:5.2f} {mean['live']:5.1f} {mean['seconds']:5.1f}"
            f"  {EXPECTED.get(args.experts, {}).get(name, '')}",
            flush=True,
        )
        rows.append({"gate": name, "config": GATES[name], "mean": mean, "runs": runs})
    if args.json:
        head = {"machine": platform.machine(), "torch": torch.__version__}
        options = {key: value for key, value in vars(args).items() if key not in ("json", "gates", "plot")}
        args.json.write_text(json.dumps({**head, **options, "rows": rows}) + "\n", encoding="utf-8")
    if args.plot:
        draw_plot(rows, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
