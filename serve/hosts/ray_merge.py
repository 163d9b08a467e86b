"""Many engines seen as one: what the replicas of a deployment say, added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from serve.client import CacheStats, EngineHealth, EngineStats, ExpertRecord, ModelInfo

Table = tuple[tuple[int, ...], ...]
# From well to unwell.
STATUS_ORDER = ("ready", "draining", "starting", "stopped", "dead")


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What one engine replica says about itself."""

    replica_id: str
    pid: int
    model: ModelInfo
    stats: EngineStats
    health: EngineHealth


def add_tables(tables: Sequence[Table]) -> Table:
    """Element-wise sum of (L, E) counts; those of another shape than the first are left out."""
    shaped = [table for table in tables if table]
    if not shaped:
        return ()
    same = [table for table in shaped if [len(row) for row in table] == [len(row) for row in shaped[0]]]
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*same, strict=True))


def _add_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _add_caches(caches: Sequence[CacheStats]) -> CacheStats:
    sums = {
        field.name: sum(getattr(cache, field.name) for cache in caches)
        for field in fields(CacheStats)
        if field.name != "block_size"
    }
    return CacheStats(block_size=caches[0].block_size, **sums)


def merge_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Sums, but for the uptime: the longest."""
    if not stats:
        return EngineStats()
    special = {"finished", "rejected", "cache", "expert_load", "uptime_s"}
    sums = {
        field.name: sum(getattr(one, field.name) for one in stats)
        for field in fields(EngineStats)
        if field.name not in special
    }
    return EngineStats(
        finished=_add_counts([one.finished for one in stats]),
        rejected=_add_counts([one.rejected for one in stats]),
        cache=_add_caches([one.cache for one in stats]),
        expert_load=add_tables([one.expert_load for one in stats]),
        uptime_s=max(one.uptime_s for one in stats),
        **sums,
    )


def best_health(states: Sequence[EngineHealth]) -> EngineHealth:
    """A deployment is as well as its best replica, because requests go to that one."""
    return min(states, key=lambda state: (STATUS_ORDER.index(state.status), state.heartbeat_age_s))


def worst_health(states: Sequence[EngineHealth]) -> EngineHealth:
    """A server of several models is as well as the worst of them."""
    return max(states, key=lambda state: (STATUS_ORDER.index(state.status), state.heartbeat_age_s))


def merge_records(records: Sequence[ExpertRecord]) -> ExpertRecord:
    """Loads and counts add up; time is the longest, and so are the peaks."""
    if not records:
        return ExpertRecord()
    peaks = [record.peak_imbalance for record in records if record.peak_imbalance]
    return ExpertRecord(
        recording=any(record.recording for record in records),
        seconds=max(record.seconds for record in records),
        steps=sum(record.steps for record in records),
        tokens=sum(record.tokens for record in records),
        load=add_tables([record.load for record in records]),
        peak_imbalance=tuple(map(max, zip(*peaks, strict=False))),
    )
