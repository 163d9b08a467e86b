"""From a data config to token streams: scan, split, tokenizer, shards; each step is skipped when the cache has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import DataConfig, SourceConfig, TokenizerConfig
from launch.data.cache import DamagedError, checksum, load_or_make, read_json, write_json
from launch.data.progress import Reporter
from launch.data.shards import Domain, load_or_tokenise
from launch.data.sources import open_source
from launch.data.split import SplitCorpus, scan_source
from moe.errors import DataError, TokenizerError
from moe.tokenizer import Tokenizer

# What a tokenizer is trained on at most; more text changes a vocabulary of this size little.
TOKENIZER_SAMPLE_BYTES = 64_000_000
TOKENIZER_RECIPE = 1


@dataclass(frozen=True)
class PreparedData:
    """Token streams ready to draw from; both lists have one domain per source, in the config's order.

    Attributes:
        train, validation: what each side of the split holds.
    """

    tokenizer: Tokenizer
    train: list[Domain]
    validation: list[Domain]


def prepare_data(config: DataConfig, *, seq_len: int, progress: bool) -> PreparedData:
    """Make, or find in the cache, all that training and evaluation read.

    Safe to call from several processes at once; cheap and silent for those that find the cache filled.

    Args:
        seq_len: tokens per sequence, to refuse a corpus that is shorter.
        progress: say on stderr what goes on.

    Raises:
        DataError: a source is unknown, missing, empty, unreadable, not UTF-8 or too short, or the cache is read-only.
        TokenizerError: the tokenizer file is unusable.
    """
    cache = Path(config.cache)
    reporter = Reporter(progress)
    corpora = []
    for source_config in config.sources:
        source = open_source(source_config)
        scan = scan_source(source, cache, reporter)
        corpora.append(SplitCorpus(source, scan, config.validation_fraction, config.split_seed))
    tokenizer = _tokenizer(config.tokenizer, corpora, cache, reporter)
    prepared = PreparedData(tokenizer, [], [])
    for corpus, source_config, name in zip(corpora, config.sources, _unique_names(corpora), strict=True):
        train, validation = load_or_tokenise(cache, corpus, tokenizer, name, source_config.weight, reporter)
        _check_length(train, source_config, seq_len)
        reporter.line(
            f"{name}: {train.num_documents:,} + {validation.num_documents:,} documents,"
            f" {len(train.tokens):,} + {len(validation.tokens):,} tokens to train on + to validate with"
        )
        if train.note:
            reporter.line(train.note)
        prepared.train.append(train)
        prepared.validation.append(validation)
    return prepared


def _tokenizer(config: TokenizerConfig, corpora: Sequence[SplitCorpus], cache: Path, reporter: Reporter) -> Tokenizer:
    if config.kind == "bytes":
        return Tokenizer.bytes()
    if config.kind == "file":
        if config.path is None:
            raise TokenizerError("data.tokenizer.path: kind file needs the path of a tokenizer.json")
        return Tokenizer.load(config.path)
    key = checksum(
        {
            "recipe": TOKENIZER_RECIPE,
            "vocab_size": config.vocab_size,
            "sample_bytes": TOKENIZER_SAMPLE_BYTES,
            "corpora": [[c.source.name, c.scan.content_hash, c.fraction, c.seed] for c in corpora],
        }
    )

    def make(folder: Path) -> None:
        tokenizer = Tokenizer.train_bpe(_training_texts(corpora, reporter), config.vocab_size)
        tokenizer.save(folder)
        write_json(folder / "meta.json", {"fingerprint": tokenizer.fingerprint})

    return load_or_make(cache / "tokenizers" / f"bpe{config.vocab_size}-{key[:24]}", _read_tokenizer, make, reporter)


def _read_tokenizer(folder: Path) -> Tokenizer:
    meta = read_json(folder / "meta.json")
    try:
        tokenizer = Tokenizer.load(folder)
    except TokenizerError as error:
        raise DamagedError(str(error)) from error
    if tokenizer.fingerprint != meta["fingerprint"]:
        raise DamagedError("tokenizer.json was changed")
    return tokenizer


def _training_texts(corpora: Sequence[SplitCorpus], reporter: Reporter) -> Iterator[str]:
    """Text that a tokenizer may learn from: of the training documents only, a fixed sample of them if there is much."""
    total = sum(corpus.train_bytes for corpus in corpora)
    keep = min(1.0, TOKENIZER_SAMPLE_BYTES / total)
    with reporter.task("training the tokenizer", min(total, TOKENIZER_SAMPLE_BYTES)) as advance:
        for corpus in corpora:
            for piece in corpus.sample(keep):
                advance(len(piece.encode()))
                yield piece


def _unique_names(corpora: Sequence[SplitCorpus]) -> list[str]:
    """The sources' names, the second of a name with ``-2`` and so on."""
    names: list[str] = []
    for corpus in corpora:
        name, number = corpus.source.name, 2
        while name in names:
            name, number = f"{corpus.source.name}-{number}", number + 1
        names.append(name)
    return names


def _check_length(train: Domain, source: SourceConfig, seq_len: int) -> None:
    if len(train.tokens) < seq_len + 1:
        raise DataError(
            f"source {source.source!r} is shorter than a sequence: {len(train.tokens)} tokens to train on"
            f" ({train.text_bytes} bytes), train.seq_len {seq_len} needs {seq_len + 1}; add text or lower train.seq_len"
        )
