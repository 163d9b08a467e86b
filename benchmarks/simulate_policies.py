"""Policies of placing experts, replayed over a load trace under a cost model. Modelled times, no measurement.

    python benchmarks/simulate_policies.py --model gpt-moe-s --cluster b --imbalance 3 --json policies.json
    python benchmarks/simulate_policies.py --trace runs/tiny/loads.trace --cluster a

Without ``--trace`` the loads are made up: Zipf popularity, sharpened until even owners have the imbalance asked for,
drifting from step to step. ``wide`` is not of the paper: 256 fine-grained experts on 64 ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from parallel.cost_model import BERT_MOE, BERT_MOE_DEEP, CLUSTER_A, CLUSTER_B, GPT_MOE_L, GPT_MOE_S, ModelShape
from parallel.load_trace import SyntheticLoads, TraceHeader, TraceReader, TraceStep
from parallel.policies import FlexibleReplicas, Hecate, Policy, RedundantExperts, Setting, Shadowing, SmartSwaps, Spill
from parallel.simulate import Outcome, balanced, lower_bound, replay

MODELS = {
    "gpt-moe-s": GPT_MOE_S,
    "gpt-moe-l": GPT_MOE_L,
    "bert-moe": BERT_MOE,
    "bert-moe-deep": BERT_MOE_DEEP,
    "wide": ModelShape("wide", 6, 256, 2048, 512, 4096, 8192, experts_per_token=8, matrices=3),
}
CLUSTERS = {"a": CLUSTER_A, "b": CLUSTER_B, "a8": replace(CLUSTER_A, name="A: 8 x 8 V100", nodes=8)}


def policies(setting: Setting) -> list[Policy]:
    return [
        Hecate(setting, "EP", copies=False),
        SmartSwaps(setting, interval=25),
        RedundantExperts(setting, interval=25),
        FlexibleReplicas(setting, interval=5),
        Shadowing(setting),
        Hecate(setting, "Hecate: sharding alone", copies=False, reshard_interval=20),
        Hecate(setting, "Hecate: copies alone"),
        Hecate(setting, "Hecate: both", reshard_interval=20),
        Hecate(setting, "Hecate-RM: both", reshard_interval=20, release=True),
        Hecate(setting, "both, calibrated", reshard_interval=20, calibrate="more"),
        Hecate(setting, "both, and spill", reshard_interval=20, calibrate="spill"),
        Hecate(setting, "both, every 10 steps", reshard_interval=10),
        Hecate(setting, "both, every 40 steps", reshard_interval=40),
        Hecate(setting, "both, window 1", reshard_interval=20, window=1),
        Hecate(setting, "both, window 20", reshard_interval=20, window=20),
        Spill(setting),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt-moe-s")
    parser.add_argument("--cluster", choices=CLUSTERS, default="b")
    parser.add_argument("--imbalance", type=float, default=3.0, help="max/mean of ranks under even owners")
    parser.add_argument("--drift", type=float, default=0.02, help="random walk of an expert's logit, per step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="replay this trace; its shape takes the place of --model's")
    parser.add_argument("--json", type=Path, help="write the result here as one JSON object")
    args = parser.parse_args()

    shape, cluster = MODELS[args.model], CLUSTERS[args.cluster]
    if args.trace:
        reader = TraceReader(args.trace)
        header, trace = reader.header, list(reader)[: args.steps]
        rows = int(trace[0].count_LWE[0].sum()) // header.world_size
        shape = replace(
            shape,
            name=args.trace.name,
            layers=header.num_layers,
            experts=header.num_experts,
            width=header.width,
            expert_hidden=header.expert_hidden,
            experts_per_token=header.experts_per_token,
            tokens_per_rank=max(1, rows // header.experts_per_token),
        )
        cluster = replace(cluster, nodes=1, ranks_per_node=header.world_size)
    else:
        header = TraceHeader(
            shape.layers, cluster.world_size, shape.experts, shape.experts_per_token, shape.width, shape.expert_hidden
        )
        loads = SyntheticLoads(shape.rows_per_rank, args.imbalance, args.drift)
        trace = list(loads.steps(header, args.steps, args.seed))
    setting = Setting(shape, cluster)
    print(
        f"{shape.name} on {cluster.name}, {cluster.world_size} ranks, {len(trace)} steps, drift {args.drift};"
        f" t = {shape.overlap_degree(cluster)}. All times are modelled."
    )
    outcomes = run(setting, trace)
    if args.json:
        about = {"model": shape.name, "cluster": cluster.name, "steps": len(trace), "modelled": True}
        rows_json = [outcome.as_dict() for outcome in outcomes]
        args.json.write_text(json.dumps({**about, "outcomes": rows_json}) + "\n", encoding="utf-8")


def run(setting: Setting, trace: list[TraceStep]) -> list[Outcome]:
    print(
        f"{'policy':<24}{'max/mean':>9}{'step ms':>9}{'x EP':>7}{'exposed':>9}{'moves ms':>9}{'memory':>8}"
        f"{'tokens':>9}{'copies':>8}{'grads':>8}{'moved MB':>9}"
    )
    ep_s, outcomes = 0.0, []
    even = replay(Hecate(setting, "EP, balanced loads", copies=False), balanced(trace), setting)
    for policy in [*policies(setting), None]:
        begin = time.perf_counter()
        outcome = lower_bound(trace, setting) if policy is None else replay(policy, trace, setting)
        ep_s = ep_s or outcome.step_s
        for row in [outcome] if policy else [even, outcome]:
            outcomes.append(row)
            print(
                f"{row.policy:<24}{row.imbalance:>9.2f}{row.step_s * 1e3:>9.1f}{ep_s / row.step_s:>7.2f}"
                f"{row.exposed_s * 1e3:>9.2f}{row.moved_s * 1e3:>9.2f}{row.memory_ratio:>8.2f}"
                f"{row.token_bytes / 1e6:>9.0f}{row.copy_bytes / 1e6:>8.0f}{row.gradient_bytes / 1e6:>8.0f}"
                f"{row.moved_bytes / 1e6:>9.0f}   ({time.perf_counter() - begin:.1f} s to replay)",
                flush=True,
            )
    return outcomes


if __name__ == "__main__":
    main()
