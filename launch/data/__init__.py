"""Text in, rows of token ids out: sources, a fixed split, cached token streams, and a data order without state."""

from launch.data.describe import DomainSummary, describe, summarise
from launch.data.prepare import PreparedData, prepare_data
from launch.data.sampler import EvalWindows, SequenceBatch, TrainSampler
from launch.data.shards import Domain

__all__ = [
    "Domain",
    "DomainSummary",
    "EvalWindows",
    "PreparedData",
    "SequenceBatch",
    "TrainSampler",
    "describe",
    "prepare_data",
    "summarise",
]
