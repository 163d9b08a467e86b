"""A table of prepared data: what there is of each domain, and how well the tokenizer packs it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from launch.data.prepare import PreparedData
from launch.data.shards import Domain


@dataclass(frozen=True)
class DomainSummary:
    """One side of one domain.

    Attributes:
        side: "train" or "validation".
        share: of the training mixture for the training side, of all validation tokens for the other; 0 to 1.
        document_names: the first ones.
    """

    domain: str
    side: str
    documents: int
    text_bytes: int
    tokens: int
    bytes_per_token: float
    share: float
    document_names: tuple[str, ...]
    note: str


def summarise(data: PreparedData) -> list[DomainSummary]:
    """The rows of :func:`describe`, training sides first."""
    weights = [domain.weight for domain in data.train]
    lengths = [float(len(domain.tokens)) for domain in data.validation]
    train = [_summary(d, "train", w / sum(weights)) for d, w in zip(data.train, weights, strict=True)]
    return train + [_summary(d, "validation", n / sum(lengths)) for d, n in zip(data.validation, lengths, strict=True)]


def describe(data: PreparedData) -> Table:
    """A table for people: domain, side, documents, bytes, tokens, bytes per token, share."""
    tokenizer = data.tokenizer
    table = Table(caption=f"tokenizer {tokenizer.fingerprint[:12]}: {tokenizer.vocab_size:,} tokens")
    for column in ("domain", "side"):
        table.add_column(column)
    for column in ("documents", "bytes", "tokens", "bytes per token", "share"):
        table.add_column(column, justify="right")
    for row in summarise(data):
        numbers = (f"{row.documents:,}", f"{row.text_bytes:,}", f"{row.tokens:,}", f"{row.bytes_per_token:.3f}")
        table.add_row(row.domain, row.side, *numbers, f"{row.share:.1%}")
    return table


def _summary(domain: Domain, side: str, share: float) -> DomainSummary:
    text_tokens = len(domain.tokens) - domain.num_documents - 1  # without end-of-text
    return DomainSummary(
        domain=domain.name,
        side=side,
        documents=domain.num_documents,
        text_bytes=domain.text_bytes,
        tokens=len(domain.tokens),
        bytes_per_token=domain.text_bytes / max(1, text_tokens),
        share=share,
        document_names=domain.document_names,
        note=domain.note,
    )
