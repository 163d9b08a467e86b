"""Training rows and validation windows against plain readings of the same tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from launch.config import DataConfig, SourceConfig, TokenizerConfig
from launch.data import Domain, EvalWindows, TrainSampler, prepare_data
from launch.data.permutation import Mixture, floor_sum, permute
from moe.errors import DataError
from moe.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

BYTES = Tokenizer.bytes()
EXPECTED_ORDER = [
    [(0, 7899), (0, 4091), (1, 141), (0, 5787), (0, 6331), (0, 1275)],
    [(1, 2920), (0, 3877), (0, 4709), (0, 1861), (0, 4357), (1, 1960)],
]


def domain(tokens: int, name: str = "d", weight: float = 1.0, first: int = 0) -> Domain:
    """Tokens that count up, so that a row says where it comes from."""
    return Domain(name, weight, np.arange(first, first + tokens, dtype=np.uint32), tokens, 1, fingerprint=name)


def text_domain(text: str, name: str = "text") -> Domain:
    ids = [BYTES.eos_id, *BYTES.encode(text, special=False), BYTES.eos_id]
    return Domain(name, 1.0, np.array(ids, dtype=np.uint16), len(text.encode()), 1)


# --- training ---------------------------------------------------------------------------------------------------------


def test_rows_are_consecutive_tokens_and_batch_joins_them():
    sampler = TrainSampler([domain(1000), domain(1000, "e", first=5000)], seed=1, seq_len=16, global_batch=6)
    batch = sampler.batch(3)
    assert batch.ids.shape == (6, 17)
    assert batch.ids.dtype == torch.int64
    assert ((batch.ids[:, 1:] - batch.ids[:, :-1]) == 1).all()
    assert torch.equal(batch.ids, sampler.rows(3, 0, 6))
    assert ((batch.ids[:, 0] >= 5000).long() == batch.domains).all()
    places = sampler.places(3, 0, 6)
    assert [place.domain for place in places] == batch.domains.tolist()
    assert sampler.rows(3, 2, 2).shape == (0, 17)


def test_one_domain_s_epoch_is_every_window_once_in_a_new_order_from_a_new_offset():
    sampler = TrainSampler([domain(1000)], seed=0, seq_len=16, global_batch=1)
    (per_epoch,) = sampler.windows_per_epoch
    assert per_epoch == 61  # 62 whole windows less the room to shift them
    orders, offsets = [], []
    for epoch in range(4):
        starts = [sampler.places(epoch * per_epoch + i, 0, 1)[0].start for i in range(per_epoch)]
        offset = min(starts)
        assert sorted(starts) == [offset + 16 * i for i in range(per_epoch)]
        assert max(starts) + 17 <= 1000
        orders.append([(start - offset) // 16 for start in starts])
        offsets.append(offset)
    assert len({tuple(order) for order in orders}) == 4
    assert len(set(offsets)) > 1


def test_over_many_epochs_every_token_is_a_target_about_equally_often_except_at_the_ends():
    sampler = TrainSampler([domain(200)], seed=3, seq_len=16, global_batch=1)
    (per_epoch,) = sampler.windows_per_epoch
    counts = np.zeros(200, dtype=int)
    epochs = 200
    for step in range(per_epoch * epochs):
        counts[sampler.rows(step, 0, 1)[0, 1:]] += 1
    assert counts[0] == 0  # the leading end-of-text token is never a target
    assert (counts[1:] > 0).all()
    assert (counts[32:-32] == epochs).all()


def test_corpus_of_one_sequence_works_and_one_token_less_is_refused():
    sampler = TrainSampler([domain(17)], seed=0, seq_len=16, global_batch=2)
    assert sampler.rows(5, 0, 2)[:, 0].tolist() == [0, 0]
    with pytest.raises(DataError, match="domain 'd' has 16 tokens, a sequence needs 17"):
        TrainSampler([domain(16)], seed=0, seq_len=16, global_batch=2)


def test_seed_changes_the_order():
    first, second = (TrainSampler([domain(5000)], seed=s, seq_len=16, global_batch=8).rows(0, 0, 8) for s in (0, 1))
    assert not torch.equal(first, second)


def test_adding_a_domain_keeps_the_order_within_the_others():
    alone = TrainSampler([domain(5000)], seed=0, seq_len=16, global_batch=1)
    mixed = TrainSampler([domain(5000), domain(5000, "e", first=10**6)], seed=0, seq_len=16, global_batch=1)
    rows = [mixed.batch(step) for step in range(40)]
    kept = [int(row.ids[0, 0]) for row in rows if row.domains[0] == 0]
    assert kept == [int(alone.rows(step, 0, 1)[0, 0]) for step in range(len(kept))]


def test_rows_outside_the_batch_are_refused():
    sampler = TrainSampler([domain(1000)], seed=0, seq_len=16, global_batch=4)
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(IndexError, match="not all in a global batch of 4"):
            sampler.rows(0, start, stop)


def test_fingerprint_tells_other_data_order_or_mixture():
    base = {"seed": 0, "seq_len": 16, "global_batch": 4}
    prints = [TrainSampler([domain(1000)], **base).fingerprint for _ in range(2)]
    assert prints[0] == prints[1]
    others = [TrainSampler([domain(1000)], **(base | {key: value + 1})).fingerprint for key, value in base.items()]
    others += [TrainSampler([d], **base).fingerprint for d in (domain(1001), domain(1000, "e"))]
    others += [TrainSampler([domain(1000, weight=2.0)], **base).fingerprint]
    assert len({prints[0], *others}) == 7


def test_far_steps_cost_no_more_than_near_ones():
    domains = [domain(5000), domain(7000, "e", weight=0.3)]
    sampler = TrainSampler(domains, seed=0, seq_len=16, global_batch=4)
    assert sampler.rows(10**12, 0, 4).shape == (4, 17)


def test_the_data_order_is_this_one():
    """Resuming a run of an earlier version needs the same numbers: a change here breaks checkpoints."""
    sampler = TrainSampler([domain(10_000), domain(3000, "e", weight=0.25)], seed=7, seq_len=32, global_batch=6)
    found = [[(place.domain, place.start) for place in sampler.places(step, 0, 6)] for step in (0, 1000)]
    assert found == EXPECTED_ORDER


# --- pure functions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_small_permutations_send_every_index_everywhere_equally_often(size):
    keys = 4000
    counts = np.zeros((size, size))
    for key in range(keys):
        for index in range(size):
            counts[index, permute(index, size, key)] += 1
    expected = keys / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 2.5 * size * size + 20  # about (size - 1)^2 for a uniform one


def test_neighbours_are_not_kept_together():
    moved = [permute(index, 10_000, 1) for index in range(10_000)]
    steps = np.abs(np.diff(moved))
    assert 3000 < steps.mean() < 3700  # a third of the size for a random order
    assert abs(np.corrcoef(np.arange(10_000), moved)[0, 1]) < 0.05


def test_permute_refuses_what_is_outside():
    with pytest.raises(IndexError, match=r"index 5 is outside range\(5\)"):
        permute(5, 5, 0)


@pytest.mark.parametrize(
    ("count", "modulus", "slope", "offset"), [(10, 7, 3, 2), (0, 5, 1, 1), (33, 1, 9, 4), (7, 9, 0, 20)]
)
def test_floor_sum(count, modulus, slope, offset):
    assert floor_sum(count, modulus, slope, offset) == sum((slope * i + offset) // modulus for i in range(count))


def test_mixture_counts_are_exact_and_stay_near_the_weights():
    weights = [0.5, 3.0, 0.01, 1.49]
    mixture = Mixture(weights, key=12345)
    seen = [0, 0, 0, 0]
    for draw in range(5000):
        assert draw % 97 or mixture.counts(draw) == seen
        seen[mixture.choose(draw)] += 1
        for domain_seen, weight in zip(seen, weights, strict=True):
            assert abs(domain_seen - (draw + 1) * weight / 5.0) < 4
    far = 10**15
    assert sum(mixture.counts(far)) == far
    assert [count / far for count in mixture.counts(far)] == pytest.approx([w / 5.0 for w in weights], abs=1e-12)


def test_mixture_in_one_batch_is_as_even_as_whole_rows_allow():
    mixture = Mixture([1.0, 1.0], key=0)
    for begin in range(0, 1600, 16):
        chosen = Counter(mixture.choose(draw) for draw in range(begin, begin + 16))
        assert 6 <= chosen[0] <= 10


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 16, 17, 18, 33, 100])
def test_every_token_is_a_target_exactly_once_and_the_rest_is_padding(tokens):
    windows = EvalWindows([domain(tokens)], 16, BYTES)
    ids, valid_BT = windows.rows(0, windows.num_sequences)
    assert ids.shape == (windows.num_sequences, 17)
    assert sorted(ids[:, 1:][valid_BT].tolist()) == list(range(1, tokens))
    assert (ids[:, 1:][valid_BT] - ids[:, :-1][valid_BT] == 1).all()
    assert (ids[:, 1:][~valid_BT] == BYTES.eos_id).all()
    assert (~valid_BT).sum() < 16


def test_several_domains_are_covered_and_the_first_rows_sample_them_all():
    domains = [domain(1601), domain(801, "e", first=10_000), domain(50, "f", first=20_000)]
    windows = EvalWindows(domains, 16, BYTES)
    assert windows.num_sequences == 100 + 50 + 4
    ids, valid_BT = windows.rows(0, windows.num_sequences)
    targets = sorted(ids[:, 1:][valid_BT].tolist())
    assert targets == [*range(1, 1601), *range(10_001, 10_801), *range(20_001, 20_050)]
    first = Counter(place.domain for place in windows.places(0, 60))
    assert 25 < first[0] < 52
    assert 8 < first[1] < 32
    parts = torch.cat([windows.rows(start, min(start + 7, 154))[0] for start in range(0, 154, 7)])
    assert torch.equal(parts, ids)


def test_text_bytes_are_those_of_the_targets_and_end_of_text_has_none():
    text = "naïve café 🎭\n" * 9
    windows = EvalWindows([text_domain(text)], 16, BYTES)
    assert windows.text_bytes() == len(text.encode())
    per_row = windows.row_bytes(0, windows.num_sequences)
    for row in range(windows.num_sequences):
        ids, valid_BT = windows.rows(row, row + 1)
        targets = ids[0, 1:][valid_BT[0]].tolist()
        assert per_row[row] == sum(target > 2 for target in targets)
        assert windows.text_bytes(row, row + 1) == per_row[row]


def test_bytes_of_a_lossy_tokenizer_are_scaled_to_those_of_the_text():
    exact = text_domain("abcd" * 40)
    lossy = Domain("lossy", 1.0, exact.tokens, text_bytes=240, num_documents=1, token_bytes=160)
    windows = EvalWindows([lossy], 16, BYTES)
    assert windows.row_bytes(0, windows.num_sequences).sum() == 240
    assert set(windows.row_bytes(0, 5)) <= {24, 0}


def test_uniform_model_has_eight_bits_per_byte_on_bytes():
    """The accounting end to end: a model that gives each of 256 bytes the same chance."""
    text = "any text will do " * 31
    windows = EvalWindows([text_domain(text)], 16, BYTES)
    ids, valid_BT = windows.rows(0, windows.num_sequences)
    text_targets = (ids[:, 1:][valid_BT] > 2).sum().item()
    nats = text_targets * np.log(256)  # end of text predicted with certainty costs nothing
    assert nats / np.log(2) / windows.text_bytes() == pytest.approx(8.0)


def test_windows_outside_are_refused_and_no_text_is_an_error():
    windows = EvalWindows([domain(100)], 16, BYTES)
    with pytest.raises(IndexError, match="not all among 7"):
        windows.rows(0, 8)
    with pytest.raises(DataError, match="there is no validation text"):
        EvalWindows([domain(1)], 16, BYTES)


def test_prepared_text_comes_out_of_the_windows_whole(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"Text {number}, café. " * 15, encoding="utf-8")
    config = DataConfig(
        sources=[SourceConfig(source=str(folder))],
        tokenizer=TokenizerConfig(vocab_size=300),
        cache=str(tmp_path / "cache"),
        validation_fraction=0.3,
    )
    data = prepare_data(config, seq_len=16, progress=False)
    windows = EvalWindows(data.validation, 16, data.tokenizer)
    assert windows.text_bytes() == data.validation[0].text_bytes == 3 * len(("Text 0, café. " * 15).encode())
    order = sorted(range(windows.num_sequences), key=lambda row: windows.places(row, row + 1)[0].start)
    targets: list[int] = []
    for row in order:
        ids, valid_BT = windows.rows(row, row + 1)
        targets += ids[0, 1:][valid_BT[0]].tolist()
    assert targets == data.validation[0].tokens[1:].tolist()
