"""The data order for any corpus, seed, batch and sharing out of rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.data import Domain, EvalWindows, TrainSampler
from launch.data.permutation import Mixture, floor_sum, mix64, mix64_array, permute
from launch.data.split import held_out
from moe.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

BYTES = Tokenizer.bytes()


@st.composite
def corpora(draw: st.DrawFn, max_domains: int = 3) -> tuple[list[Domain], int]:
    """Domains whose tokens are all different, and a sequence length that fits each."""
    seq_len = draw(st.integers(2, 20))
    domains = []
    for number in range(draw(st.integers(1, max_domains))):
        tokens = np.arange(draw(st.integers(seq_len + 1, 400)), dtype=np.uint32) + 1000 * number
        weight = draw(st.floats(0.01, 10))
        domains.append(Domain(f"d{number}", weight, tokens, len(tokens), 1))
    return domains, seq_len


@settings(deadline=None)
@given(
    corpus=corpora(), seed=st.integers(0, 2**31), step=st.integers(0, 10**9), batch=st.integers(1, 24), data=st.data()
)
def test_any_sharing_out_of_rows_gives_the_same_global_batch(corpus, seed, step, batch, data):
    domains, seq_len = corpus
    whole = TrainSampler(domains, seed, seq_len, batch).batch(step).ids
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, batch), max_size=5))), batch]
    ranks = [TrainSampler(domains, seed, seq_len, batch) for _ in cuts[1:]]
    parts = [sampler.rows(step, a, b) for sampler, (a, b) in zip(ranks, pairwise(cuts), strict=True)]
    assert torch.equal(torch.cat(parts), whole)


@settings(deadline=None)
@given(corpus=corpora(), seed=st.integers(0, 2**31), steps=st.integers(2, 12), data=st.data())
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(corpus, seed, steps, data):
    domains, seq_len = corpus
    straight = TrainSampler(domains, seed, seq_len, 4)
    rows = [straight.rows(step, 0, 4) for step in range(steps)]
    stop = data.draw(st.integers(1, steps - 1))
    resumed = TrainSampler(domains, seed, seq_len, 4)
    assert resumed.fingerprint == straight.fingerprint
    assert all(torch.equal(resumed.rows(step, 0, 4), rows[step]) for step in range(stop, steps))


@settings(deadline=None)
@given(corpus=corpora(), seed=st.integers(0, 2**31), epoch=st.integers(0, 10**6))
def test_every_window_of_a_domain_comes_once_per_epoch_and_stays_inside(corpus, seed, epoch):
    domains, seq_len = corpus
    tokens = len(domains[0].tokens)
    sampler = TrainSampler(domains[:1], seed, seq_len, 1)
    (count,) = sampler.windows_per_epoch
    starts = sorted(sampler.places(epoch * count + i, 0, 1)[0].start for i in range(count))
    assert all(b - a == seq_len for a, b in pairwise(starts))
    assert starts[0] >= 0
    assert starts[-1] + seq_len + 1 <= tokens
    # Nothing is left out but less than two sequences.
    assert tokens - 1 - count * seq_len < 2 * seq_len


@settings(deadline=None)
@given(corpus=corpora(), seed=st.integers(0, 2**31), step=st.integers(0, 10**9))
def test_rows_lie_within_one_domain_and_no_row_crosses_its_end(corpus, seed, step):
    domains, seq_len = corpus
    batch = TrainSampler(domains, seed, seq_len, 8).batch(step)
    for ids, domain in zip(batch.ids.tolist(), batch.domains.tolist(), strict=True):
        assert ids == list(range(ids[0], ids[0] + seq_len + 1))
        assert domains[domain].tokens[0] <= ids[0]
        assert ids[-1] <= domains[domain].tokens[-1]


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=4),
    key=st.integers(0, 2**64 - 1),
    draws=st.integers(1, 800),
)
def test_mixture_counts_equal_counting_and_follow_the_weights(weights, key, draws):
    mixture = Mixture(weights, key)
    counts = [0] * len(weights)
    for draw in range(draws):
        counts[mixture.choose(draw)] += 1
    assert mixture.counts(draws) == counts
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - draws * weight / sum(weights)) < 5


@settings(deadline=None)
@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(2**40, 2**60), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_of_huge_ranges_stays_inside_and_keeps_different_things_different(size, key, data):
    indices = data.draw(st.lists(st.integers(0, size - 1), unique=True, min_size=2, max_size=10))
    moved = [permute(index, size, key) for index in indices]
    assert len(set(moved)) == len(indices)
    assert all(0 <= index < size for index in moved)


@settings(deadline=None)
@given(
    count=st.integers(0, 60), modulus=st.integers(1, 10**6), slope=st.integers(0, 10**7), offset=st.integers(0, 10**7)
)
def test_floor_sum_equals_summing(count, modulus, slope, offset):
    assert floor_sum(count, modulus, slope, offset) == sum((slope * i + offset) // modulus for i in range(count))


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_array_and_integer_mixing_agree(values):
    assert mix64_array(np.array(values, dtype=np.uint64)).tolist() == [mix64(value) for value in values]


@settings(deadline=None)
@given(corpus=corpora(), data=st.data())
def test_validation_windows_cover_every_token_once_in_any_batches(corpus, data):
    domains, seq_len = corpus
    windows = EvalWindows(domains, seq_len, BYTES)
    batch = data.draw(st.integers(1, windows.num_sequences))
    targets: list[int] = []
    for start in range(0, windows.num_sequences, batch):
        ids, valid_BT = windows.rows(start, min(start + batch, windows.num_sequences))
        targets += ids[:, 1:][valid_BT].tolist()
    assert sorted(targets) == sorted(int(token) for domain in domains for token in domain.tokens[1:])


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6), seq_len=st.integers(2, 20), data=st.data())
def test_bytes_of_windows_add_up_to_the_text_however_they_are_taken(texts, seq_len, data):
    ids = [BYTES.eos_id]
    for text in texts:
        ids += [*BYTES.encode(text, special=False), BYTES.eos_id]
    size = sum(len(text.encode()) for text in texts)
    windows = EvalWindows([Domain("d", 1.0, np.array(ids, dtype=np.uint16), size, len(texts))], seq_len, BYTES)
    cut = data.draw(st.integers(0, windows.num_sequences))
    assert windows.text_bytes(0, cut) + windows.text_bytes(cut) == windows.text_bytes() == size


@settings(deadline=None)
@given(
    identities=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=60),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 1000),
)
def test_split_leaves_both_sides_something_and_never_parts_equal_documents(identities, fraction, seed):
    ids = np.array(identities, dtype=np.uint64)
    held = held_out(ids, fraction, seed)
    sides = [set(ids[held].tolist()), set(ids[~held].tolist())]
    assert not sides[0] & sides[1]
    distinct = len(set(identities))
    if distinct > 1:
        assert len(sides[0]) == min(max(int(fraction * distinct + 0.5), 1), distinct - 1)
    else:
        assert not held.any()
