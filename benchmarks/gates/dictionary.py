"""Sparse autoencoders whose active features a gate chooses: features against tokens, how many stay dead? (R9)

    OMP_NUM_THREADS=1 python benchmarks/gates/dictionary.py --json dictionary.json --plot dictionary.png

A token is a sparse sum of atoms: unit vectors, atom i active by itself with a probability in proportion to
(i + 1)^-``zipf``, amplitudes uniform on [0.5, 1.5], plus noise. An expert of the gate is a feature of the autoencoder,
its row of the gate the encoder, and it has a unit decoder vector, which is untied and starts equal to it. The
autoencoder is trained on fresh tokens by mean squared error alone. Per gate: explained variance (1 - squared error /
variance), dead features (active for no held-out token), atoms recovered (some decoder vector has a cosine above 0.9
with them) and features per token; with the gate as trained, which chooses within a batch, and as served, one token at
a time by the thresholds of ``causal_surrogate()``. For topk both are the same.

Expected, by Ayonrinde (2024, arXiv:2411.02124), with the experiment's own plan: dead features feature choice < mutual
choice (= BatchTopK, arXiv:2412.06410) < topk, at the same mean features per token; and a lower error than topk.

What differs from the papers: activations are relu(logit) for all three, and since the gate ``topk`` has no such
weight, its choice is kept and weighed anew here. Gates have no bias per feature (the papers' encoders do); a bias of
the input, learned with the decoder, is here. There is no auxiliary loss for dead features (aux_k, aux_zipf), so that
what is measured is the choice alone. ``load_cap`` of mutual choice is off. Feature choice gets the shape of its
capacities from ``alpha`` and ``beta`` of the gate, not from a fit to the data; "uniform" has none. Data are synthetic
and small: nothing here speaks of language models.

Shape suffixes: T tokens, D width, A atoms, E experts = features.
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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gates import plots
from gates import Gate, GateInput, GateOutput, Mode, build_gate

RELU = {"affinity": "relu", "balance_coef": 0.0}
GATES: dict[str, dict[str, Any]] = {
    "feature_choice": {"name": "feature_choice", **RELU},
    "feature_choice, uniform": {"name": "feature_choice", "alpha": 0.0, **RELU},
    "mutual_choice": {"name": "mutual_choice", "load_cap": None, **RELU},
    "topk": {"name": "topk", "score": "sigmoid", "renormalise": False, "balance_coef": 0.0},
}
ORDER = ("feature_choice", "mutual_choice", "topk")
EXPECTED = {"feature_choice": "fewest dead", "mutual_choice": "between", "topk": "most dead"}
COSINE = 0.9
HELD_OUT = 16  # batches


class Dictionary(NamedTuple):
    """What tokens are made of.

    Attributes:
        atom_AD: (A, D) unit vectors.
        chance_A: (A,) probability that a token has the atom.
        noise: length of the noise that is added to a token, on average.
    """

    atom_AD: Tensor
    chance_A: Tensor
    noise: float


def plant(atoms: int, dim: int, active: float, zipf: float, noise: float, seed: int) -> Dictionary:
    """Random atoms, ``active`` of them in a token on average."""
    rng = torch.Generator().manual_seed(seed)
    atom_AD = F.normalize(torch.randn(atoms, dim, generator=rng), dim=1)
    share_A = torch.arange(1, atoms + 1).float() ** -zipf
    return Dictionary(atom_AD, (active * share_A / share_A.sum()).clamp_max(1.0), noise)


def draw(planted: Dictionary, tokens: int, rng: torch.Generator) -> Tensor:
    """(T, D) tokens."""
    atoms, dim = planted.atom_AD.shape
    active_TA = torch.rand(tokens, atoms, generator=rng) < planted.chance_A
    amount_TA = active_TA * (0.5 + torch.rand(tokens, atoms, generator=rng))
    noise_TD = torch.randn(tokens, dim, generator=rng) * planted.noise / dim**0.5
    return amount_TA @ planted.atom_AD + noise_TD


class Autoencoder(nn.Module):
    """A gate as encoder, a unit vector for each of its experts as decoder, a bias of the input."""

    def __init__(self, config: dict[str, Any], dim: int, features: int, mean_k: int, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        start_ED = F.normalize(torch.randn(features, dim, generator=rng), dim=1)
        self.gate: Gate = build_gate({**config, "k" if config["name"] == "topk" else "mean_k": mean_k}, dim, features)
        with torch.no_grad():
            self.gate.get_parameter("weight").copy_(start_ED)
        self.decoder_ED = nn.Parameter(start_ED.clone())
        self.bias_D = nn.Parameter(torch.zeros(dim))

    def forward(self, x_TD: Tensor, mode: Mode, served: bool = False) -> tuple[Tensor, Tensor, GateOutput]:
        """Reconstruction (T, D), activations (T, E) and what the gate said."""
        gate = self.gate.causal_surrogate() if served else self.gate
        assert gate is not None
        out: GateOutput = gate(GateInput(x_TD - self.bias_D, mode=mode))
        assert out.logits_TE is not None
        # Those of the choosing gates already; topk would weigh by sigmoids.
        plan = out.plan.with_weight(out.plan.pick(out.logits_TE.relu()))
        active_TE = plan.dense_weight_TE()
        return active_TE @ self.decoder_ED + self.bias_D, active_TE, out

    @torch.no_grad()
    def unit_decoder(self) -> None:
        """Else activations could shrink and decoder vectors grow, which compares features unfairly."""
        self.decoder_ED.copy_(F.normalize(self.decoder_ED, dim=1))


def recovered(decoder_ED: Tensor, atom_AD: Tensor) -> int:
    """Atoms that some decoder vector points along."""
    cosine_AE = F.normalize(atom_AD, dim=1) @ F.normalize(decoder_ED, dim=1).t()
    return int((cosine_AE.amax(1) > COSINE).sum())


@torch.no_grad()
def measure(model: Autoencoder, batches: list[Tensor], served: bool) -> dict[str, float]:
    """Explained variance, dead features and features per token, over all batches; each is routed by itself."""
    error, spread, pairs = 0.0, 0.0, 0
    mean_D = torch.cat(batches).mean(0)
    seen_E = torch.zeros(len(model.decoder_ED), dtype=torch.int64)
    for x_TD in batches:
        again_TD, active_TE, _ = model(x_TD, Mode.EVAL, served)
        error += float((again_TD - x_TD).square().sum())
        spread += float((x_TD - mean_D).square().sum())
        seen_E += (active_TE > 0).sum(0)
        pairs += int((active_TE > 0).sum())
    tokens = sum(len(x_TD) for x_TD in batches)
    dead = float((seen_E == 0).sum())
    return {"explained": 1 - error / spread, "mse": error / tokens, "dead": dead, "active": pairs / tokens}


def run(
    config: dict[str, Any],
    planted: Dictionary,
    features: int,
    mean_k: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> dict[str, float]:
    """Train one autoencoder; see the module for what is measured. The error is a token's, squared and summed over D."""
    begin = time.perf_counter()
    model = Autoencoder(config, planted.atom_AD.shape[1], features, mean_k, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:  # to zero over the last fifth: the error is that of a settled model
            group["lr"] = rate * min(1.0, 5 * (steps - step) / steps)
        model.gate.begin_step(step, steps)
        x_TD = draw(planted, batch, rng)
        again_TD, _, out = model(x_TD, Mode.TRAIN)
        optimizer.zero_grad()
        (again_TD - x_TD).square().sum(1).mean().backward()
        optimizer.step()
        model.unit_decoder()
        model.gate.end_step(out.plan.offered_E, out.signals)
    held = [draw(planted, batch, rng) for _ in range(HELD_OUT)]
    found = measure(model, held, served=False)
    found |= {f"served_{key}": value for key, value in measure(model, held, served=True).items()}
    found["recovered"] = float(recovered(model.decoder_ED.detach(), planted.atom_AD))
    return {**found, "seconds": time.perf_counter() - begin}


def draw_plot(rows: list[dict[str, Any]], features: int, atoms: int, path: Path) -> None:
    """Dead features, atoms recovered and explained variance, a dot per seed."""
    figure, axes = plots.panels(3, height=2.6, width=3.4, share_y=True)
    keys = ("dead", "recovered", "explained")
    labels = (f"dead features of {features}", f"atoms recovered of {atoms}", "explained variance (share)")
    for one, key, label in zip(axes, keys, labels, strict=True):
        kinds = [("as trained", key)] if key == "recovered" else [("as trained", key), ("as served", f"served_{key}")]
        for colour, (kind, name) in enumerate(kinds):
            values = {row["gate"]: [own[name] for own in row["runs"]] for row in rows}
            plots.dots(one, values, kind, 0.0 if len(kinds) == 1 else 0.3 * colour - 0.15, colour)
        one.set_xlabel(label, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
    plots.save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--atoms", type=int, default=128)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--active", type=int, default=3, help="mean atoms and mean features of a token")
    parser.add_argument("--zipf", type=float, default=0.5, help="how fast atoms get rare; 0: all alike")
    parser.add_argument("--noise", type=float, default=0.1, help="length of the noise on a token")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=256, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of Adam")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gates", nargs="*", default=list(GATES), choices=list(GATES))
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.atoms} atoms in {args.dim} dimensions, {args.features} features, {args.active} a token on average;")
    print(f"{args.seeds} seeds, {args.steps} steps of {args.batch} tokens; mean (least to most)")
    columns = ("dead", "served", "recovered", "explained", "served", "active", "served")
    print(f"{'gate':24s} " + " ".join(f"{name:>16s}" for name in columns) + "     s  expected")
    keys = ("dead", "served_dead", "recovered", "explained", "served_explained", "active", "served_active")
    rows: list[dict[str, Any]] = []
    for name in args.gates:
        runs = []
        for seed in range(args.seeds):
            planted = plant(args.atoms, args.dim, args.active, args.zipf, args.noise, seed)
            # The autoencoder must not start from the random numbers that the atoms were made of.
            sizes = (args.features, args.active, args.steps, args.batch)
            runs.append(run(GATES[name], planted, *sizes, args.rate, 1000 + seed))
        mean = {key: statistics.mean(own[key] for own in runs) for key in runs[0]}
        cells = []
        for key in keys:
            digits, values = (0 if "dead" in key or key == "recovered" else 2), [own[key] for own in runs]
            shown = f"{mean[key]:.{digits + 1}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
            cells.append(f"{shown:>16s}")
        print(f"{name:24s} {' '.join(cells)} {mean['seconds']:5.1f}  {EXPECTED.get(name, '')}", flush=True)
        rows.append({"gate": name, "config": GATES[name], "mean": mean, "runs": runs})
    dead = [next((row["mean"]["dead"] for row in rows if row["gate"] == name), None) for name in ORDER]
    as_expected = None
    if None not in dead:
        as_expected = dead[0] < dead[1] < dead[2]
        print(f"dead features {' < '.join(ORDER)} expected: {'as expected' if as_expected else 'NOT so here'}")
    if args.json:
        head = {"machine": platform.machine(), "torch": torch.__version__, "as_expected": as_expected}
        options = {key: value for key, value in vars(args).items() if key not in ("json", "gates", "plot")}
        args.json.write_text(json.dumps({**head, **options, "rows": rows}) + "\n", encoding="utf-8")
    if args.plot:
        draw_plot(rows, args.features, args.atoms, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
