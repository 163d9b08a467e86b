"""Experts over ranks: how level copies made the ranks, what travelled for it, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from launch.report.curves import Chart, Series
from launch.report.read_run import Row, mapping, number, whole

SENT = {
    "copies": ("spAG",),
    "gradients": ("spRS",),
    "tokens": ("tokens", "counts"),
    "moves": ("owners",),
}
"""What travels, in words, and as which kinds it is counted; what never did is left out."""


def rank_charts(train: Sequence[Row]) -> list[Chart]:
    """Charts of what the experts' engine counted; empty for a run whose experts are on every rank.

    Args:
        train: rows of kind "train"; ``engine`` in them is a :class:`parallel.engine_metrics.EngineMetrics`.
    """
    rows = [row for row in train if mapping(row.get("engine"))]
    if not rows:
        return []
    steps = [whole(row["step"]) for row in rows]

    def series(name: str, key: str, factor: float = 1.0) -> Series:
        return Series(name, steps, [factor * number(mapping(row["engine"]).get(key)) for row in rows])

    def mean_of_layers(name: str, key: str) -> Series:
        return Series(name, steps, [_mean(mapping(row["engine"]).get(key)) for row in rows])

    def mib(name: str, kinds: Sequence[str]) -> Series:
        sent = [mapping(mapping(row["engine"]).get("sent_bytes")) for row in rows]
        return Series(name, steps, [sum(number(counted.get(kind)) for kind in kinds) / 2**20 for counted in sent])

    sent = [mib(name, kinds) for name, kinds in SENT.items()]
    return [
        Chart(
            "Imbalance of ranks",
            "max / mean rows",
            [
                mean_of_layers("with experts on their owners", "imbalance_before_L"),
                mean_of_layers("as computed", "imbalance_after_L"),
            ],
            note="1 is even; mean of the layers",
            floor=1.0,
        ),
        Chart(
            "Copies of experts",
            "on all ranks, mean of the layers",
            [mean_of_layers("copies", "copies_L")],
            from_zero=True,
        ),
        Chart(
            "Sent between ranks",
            "MiB a step, all ranks",
            note="copies of experts, their gradients, tokens, and moves of experts to new owners",
            series=[line for line in sent if any(value > 0 for value in line.values)],
            from_zero=True,
        ),
        Chart(
            "Time on the link",
            "seconds a step, mean of ranks",
            [
                series("copies hidden", "copies_hidden_s"),
                series("copies exposed", "copies_exposed_s"),
                series("tokens", "tokens_waited_s"),
            ],
            note="exposed: ranks stood still for it; that for tokens includes waiting for later ranks",
            from_zero=True,
        ),
        Chart(
            "Memory of copies",
            "MiB, peak of the fullest rank",
            [series("copies and their gradients", "copy_peak_bytes", 2.0**-20)],
            from_zero=True,
        ),
    ]


def rank_card(train: Sequence[Row]) -> tuple[str, str, str] | None:
    """(label, value, detail) of how level the ranks were in the last interval; None where that is not known."""
    engine = mapping(train[-1].get("engine")) if train else {}
    before, after = _mean(engine.get("imbalance_before_L")), _mean(engine.get("imbalance_after_L"))
    if not math.isfinite(before + after):
        return None
    copied = number(engine.get("copies_hidden_s")), number(engine.get("copies_exposed_s"))
    hidden = f"; {copied[0] / sum(copied):.0%} of the copies' time hidden" if sum(copied) > 0 else ""
    detail = f"max / mean rows, last interval; {before:.2f} if each expert ran on its owner{hidden}"
    return "Imbalance of ranks", f"{after:.2f}", detail


def _mean(per_layer: object) -> float:
    values = [number(value) for value in per_layer] if isinstance(per_layer, list) else []
    return sum(values) / len(values) if values else float("nan")
