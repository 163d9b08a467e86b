"""COMET's comparison in small: gates of a multi-task model on MovieLens-100k and on overlaid Fashion-MNIST.

    python benchmarks/gates/multitask.py --movielens recbole-1.2.1-py3-none-any.whl --fashion DIR --json multitask.json

Ibrahim et al. (KDD 2023, arXiv:2306.02824, section 5) compare gates of a multi-gate mixture of experts (Ma et al., KDD
2018): experts shared by the tasks, a gate and a small head for each task. Here every gate gets the same number of
random trials over learning rate and its own options; the trial with the lowest validation loss is trained anew with
several seeds and tested. The paper took 500 trials (and the mean of the best twentieth), 1M ratings, and found COMET +
local search best, then COMET, then DSelect-k, before top-k and hash.

Loss: the sum over tasks, each a mean over its examples: cross-entropy in nats, or squared error in units of the
ratings' variance. Experts per example count weights above 1e-5 on the test set.

Shape suffixes: T examples, D width, E experts, H hidden, N tasks.
"""

from __future__ import annotations

import argparse
import json
import math
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
from benchmarks.gates.multitask_data import Part, Task, TaskSet, load_fashion, load_movielens
from gates import Gate, GateInput, Mode, build_gate

HIDDEN, OUT = 32, 16
BATCH = {"movielens": 2048, "fashion": 512}
EXPERTS = {"movielens": 16, "fashion": 8}
EPOCHS = {"movielens": 4, "fashion": 20}
DENSE = "all experts, softmax"
GATES = ("comet + local search", "comet", "dselect_k", "topk", "hash", DENSE)
ORDER = "comet + local search, comet, dselect_k, (topk, hash)"


class Trial(NamedTuple):
    """One draw of options: the optimizer's learning rate, and the gate's config (None: softmax over all experts)."""

    lr: float
    gate: dict[str, Any] | None


def draw_trials(name: str, count: int, seed: int = 0) -> list[Trial]:
    """The same learning rates for every gate, and its own options by chance; the same for COMET with local search and
    without."""
    lr_rng, rng, search_rng = (np.random.default_rng([seed, stream]) for stream in range(3))
    trials = []
    for _ in range(count):
        lr = math.exp(lr_rng.uniform(math.log(1e-3), math.log(2e-2)))
        trials.append(Trial(lr, _options(name, rng, search_rng)))
    return trials


def _options(name: str, rng: np.random.Generator, search_rng: np.random.Generator) -> dict[str, Any] | None:
    if name == DENSE:
        return None
    if name == "hash":
        return {"name": "hash", "k": 2, "seed": int(rng.integers(1000))}
    if name == "topk":
        return {"name": "topk", "k": 2, "balance_coef": float(rng.choice([0.0, 0.001, 0.01, 0.1]))}
    tree = {
        "k": 2,
        "gamma": float(rng.choice([0.01, 0.1, 1.0, 5.0, 10.0])),  # the paper's range
        "entropy_coef": math.exp(rng.uniform(math.log(0.003), math.log(0.3))),
        "balance_coef": float(rng.choice([0.0, 0.01])),
    }
    if name == "comet + local search":
        search = float(search_rng.choice([0.05, 0.1]))
        return {"name": "local_search", "gate": {"name": "comet", **tree}, "search": search}
    return {"name": name, **tree}


class Model(nn.Module):
    """Shared experts, each a perceptron; one gate and one linear head for each task."""

    def __init__(self, data: TaskSet, gate: dict[str, Any] | None, experts: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tasks = data.tasks
        self.trunk = data.trunk()
        self.w_in = nn.Parameter(torch.randn(experts, data.dim, HIDDEN) * (2 / data.dim) ** 0.5)
        self.b_in = nn.Parameter(torch.zeros(experts, 1, HIDDEN))
        self.w_out = nn.Parameter(torch.randn(experts, HIDDEN, OUT) / HIDDEN**0.5)
        self.heads = nn.ModuleList(nn.Linear(OUT, task.width) for task in data.tasks)
        self.gates = nn.ModuleList()
        for number in range(len(data.tasks)):
            if gate is None:
                self.gates.append(nn.Linear(data.dim, experts))
            else:
                built = build_gate(gate, data.dim, experts)
                built.reset_parameters(torch.Generator().manual_seed(100 * seed + number))
                self.gates.append(built)

    def forward(self, part: Part, mode: Mode, rng: torch.Generator | None = None) -> tuple[list[Tensor], list[Any]]:
        """Outputs (T, width) of each task, and what its gate said: a GateOutput, or the dense weights (T, E)."""
        x_TD = self.trunk(*part.inputs)
        hidden_ETH = torch.relu(x_TD @ self.w_in + self.b_in)
        out_ETO = hidden_ETH @ self.w_out
        outputs, routing = [], []
        for gate, head in zip(self.gates, self.heads, strict=True):
            if isinstance(gate, Gate):
                found: Any = gate(GateInput(x_TD, ids_T=part.ids_T, mode=mode, rng=rng))
                weight_TE = found.plan.dense_weight_TE()
            else:
                found = weight_TE = gate(x_TD).softmax(-1)
            outputs.append(head(torch.einsum("te,eto->to", weight_TE, out_ETO)))
            routing.append(found)
        return outputs, routing


def task_loss(task: Task, out_TW: Tensor, target_T: Tensor, mask_T: Tensor) -> Tensor:
    """Mean over the examples that count; 0 when there is none."""
    if task.kind == "classes":
        each_T = F.cross_entropy(out_TW, target_T.long(), reduction="none")
    elif task.kind == "binary":
        each_T = F.binary_cross_entropy_with_logits(out_TW[:, 0], target_T, reduction="none")
    else:
        each_T = (out_TW[:, 0] - target_T).square()
    return (each_T * mask_T).sum() / mask_T.sum().clamp_min(1)


def total_loss(tasks: tuple[Task, ...], outputs: list[Tensor], part: Part) -> Tensor:
    return sum(  # type: ignore[return-value]
        task_loss(task, out_TW, part.target_TN[:, n], part.mask_TN[:, n])
        for n, (task, out_TW) in enumerate(zip(tasks, outputs, strict=True))
    )


def train(data: TaskSet, trial: Trial, seed: int, epochs: int, experts: int) -> Model:
    """Adam with a linear decay to 0."""
    model = Model(data, trial.gate, experts, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=trial.lr)
    rng = torch.Generator().manual_seed(seed)
    count = len(data.train.ids_T)
    batch = BATCH[data.name]
    steps = epochs * math.ceil(count / batch)
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(count, generator=rng).split(batch):
            optimizer.param_groups[0]["lr"] = trial.lr * (1 - step / steps)
            gates = [gate for gate in model.gates if isinstance(gate, Gate)]
            for gate in gates:
                gate.begin_step(step, steps)
            part = data.train.take(index)
            outputs, routing = model(part, Mode.TRAIN, rng)
            loss = total_loss(data.tasks, outputs, part)
            for gate, found in zip(gates, routing, strict=False):
                coefs = gate.config.aux_coefs()
                loss = loss + sum(coefs[name] * value for name, value in found.aux.items())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for gate, found in zip(gates, routing, strict=False):
                gate.end_step(found.plan.offered_E, found.signals)
            step += 1
    return model


@torch.no_grad()
def measure(model: Model, data: TaskSet, part: Part) -> dict[str, float]:
    """Loss over all tasks; each task's own measure (AUC, mean square, accuracy); experts per example.

    Raises:
        FloatingPointError: training diverged, and the loss or a gate's scores are no numbers.
    """
    from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

    outputs, routing = model(part, Mode.PREFILL)
    found = {"loss": float(total_loss(data.tasks, outputs, part))}
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(f"{data.name}: the loss is {found['loss']}")
    for n, (task, out_TW) in enumerate(zip(data.tasks, outputs, strict=True)):
        target_T, counts_T = part.target_TN[:, n], part.mask_TN[:, n] > 0
        if task.kind == "binary":
            found[f"{task.name} AUC"] = float(roc_auc_score(target_T[counts_T].numpy(), out_TW[counts_T, 0].numpy()))
        elif task.kind == "squares":
            found[f"{task.name} MSE"] = float((out_TW[counts_T, 0] - target_T[counts_T]).square().mean())
        else:
            found[f"{task.name} accuracy"] = float((out_TW.argmax(-1) == target_T)[counts_T].float().mean())
    weights = [r if isinstance(r, Tensor) else r.plan.dense_weight_TE() for r in routing]
    found["experts"] = statistics.fmean(float((w > 1e-5).sum(1).float().mean()) for w in weights)
    return found


def validate(data: TaskSet, trial: Trial, epochs: int, experts: int) -> float | None:
    """Validation loss of one draw; None where training diverged, which is a bad draw and no reason to stop."""
    try:
        return measure(train(data, trial, 0, epochs, experts), data, data.valid)["loss"]
    except FloatingPointError:
        return None


def compare(
    data: TaskSet, names: list[str], trials: int, seeds: int, epochs: int, experts: int
) -> list[dict[str, Any]]:
    """One row per gate: its best trial, and the test results of every seed."""
    rows = []
    for name in names:
        begin = time.perf_counter()
        drawn = draw_trials(name, trials)
        # Seed 0 chooses, the others report: no test result is of a run that was chosen for its luck.
        losses = [validate(data, trial, epochs, experts) for trial in drawn]
        finished = [(loss, number) for number, loss in enumerate(losses) if loss is not None]
        if not finished:
            raise SystemExit(f"{name} on {data.name}: all {trials} trials diverged; draw more of them with --trials")
        best = min(finished)[1]
        runs = [
            measure(train(data, drawn[best], seed, epochs, experts), data, data.test) for seed in range(1, seeds + 1)
        ]
        row = {"gate": name, "trial": drawn[best]._asdict(), "validation": losses, "runs": runs}
        row["seconds"] = time.perf_counter() - begin
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    runs = row["runs"]
    losses = [run["loss"] for run in runs]
    cells = [f"{row['gate']:22s} {statistics.fmean(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})"]
    cells += [f"{key} {statistics.fmean(run[key] for run in runs):.4f}" for key in runs[0] if key != "loss"]
    tried = [loss for loss in row["validation"] if loss is not None]
    diverged = len(row["validation"]) - len(tried)
    spread = f"trials {min(tried):.3f}-{max(tried):.3f}" + (f", {diverged} diverged" if diverged else "")
    return "  ".join([*cells, spread, f"{row['seconds']:.0f} s"])


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Test loss of every seed as a dot, the mean as a bar, a panel for each data set."""
    figure, axes = plots.panels(len(found), height=2.6, width=4.6)
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        plots.dots(axis, {row["gate"]: [run["loss"] for run in row["runs"]] for row in rows}, "test loss")
        axis.set_xlabel("test loss, sum over tasks", fontsize=9)
        axis.set_title(name, loc="left", fontsize=10)
    plots.save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--movielens", type=Path, help="RecBole's wheel, or a folder with its ml-100k files")
    parser.add_argument("--fashion", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--gates", nargs="*", default=list(GATES), choices=list(GATES))
    parser.add_argument("--trials", type=int, default=8, help="draws of options for each gate")
    parser.add_argument("--seeds", type=int, default=5, help="runs of the best draw")
    parser.add_argument("--epochs", type=int, help="instead of 4 (MovieLens) and 20 (Fashion-MNIST)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="write a picture (png)")
    args = parser.parse_args()
    if args.movielens is None and args.fashion is None:
        parser.error("give --movielens, --fashion or both; where they come from stands in multitask_data.py")
    if args.trials < 1 or args.seeds < 1:
        parser.error("--trials and --seeds must be at least 1")
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for path, load in ((args.movielens, load_movielens), (args.fashion, load_fashion)):
        if path is None:
            continue
        data = load(path)
        experts, epochs = EXPERTS[data.name], args.epochs or EPOCHS[data.name]
        sizes = " + ".join(f"{len(part.ids_T):,}" for part in (data.train, data.valid, data.test))
        print(f"{data.name}: {sizes} examples, {experts} experts, k = 2, {args.trials} trials, {epochs} epochs;")
        print(f"test loss: mean (least to most) over {args.seeds} seeds. Expected, best first: {ORDER}")
        found[data.name] = compare(data, args.gates, args.trials, args.seeds, epochs, experts)
        ranked = sorted(found[data.name], key=lambda row: statistics.fmean(run["loss"] for run in row["runs"]))
        print(f"observed, best first: {', '.join(row['gate'] for row in ranked)}\n", flush=True)
    if args.json:
        head = {"machine": platform.machine(), "torch": torch.__version__, "trials": args.trials, "seeds": args.seeds}
        args.json.write_text(json.dumps({**head, "rows": found}) + "\n", encoding="utf-8")
    if args.plot:
        plot(found, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
