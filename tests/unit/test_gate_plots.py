"""The autoencoder experiment counts what is planted, and the gate experiments' pictures are small PNGs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.unit
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gates"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gate_plot_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    kept = sys.path[0]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[0] = kept
    return module


def assert_small_png(path: Path) -> None:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert 1000 < len(content) < 60_000


def test_atoms_are_recovered_by_direction_whatever_the_length_but_not_reversed() -> None:
    dictionary = load("dictionary")
    atom_AD = torch.eye(5)
    near_D = torch.tensor([0.0, 1.0, 0.4, 0.0, 0.0])  # cosine 0.93 with atom 1, 0.37 with atom 2
    far_D = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.6])  # cosine 0.86 with atom 3
    decoder_ED = torch.stack([3 * atom_AD[0], atom_AD[0], near_D, far_D, -atom_AD[4]])
    assert dictionary.recovered(decoder_ED, atom_AD) == 2


def planted_model(dictionary: ModuleType, name: str, k: int) -> tuple[object, Tensor]:
    """Orthogonal atoms, encoder and decoder equal to them; feature 3 looks away from all tokens, which have no atom 3.

    Token t is (t % 3 + 1) times atom t % 3.
    """
    model = dictionary.Autoencoder(dictionary.GATES[name], 4, 4, k, seed=0)
    with torch.no_grad():
        model.gate.get_parameter("weight").copy_(torch.eye(4))
        model.decoder_ED.copy_(torch.eye(4))
    atom_T = torch.arange(12) % 3
    return model, torch.eye(4)[atom_T] * (atom_T + 1).unsqueeze(1)


@pytest.mark.parametrize("name", ["topk", "mutual_choice"])
def test_a_planted_autoencoder_is_exact_with_one_dead_feature(name: str) -> None:
    dictionary = load("dictionary")
    model, x_TD = planted_model(dictionary, name, 1)
    found = dictionary.measure(model, [x_TD[:6], x_TD[6:]], served=False)
    assert found == {"explained": 1.0, "mse": 0.0, "dead": 1.0, "active": 1.0}


def test_error_and_explained_variance_by_hand() -> None:
    """Mutual choice of half a pair per token keeps the six largest of twelve: 3, 3, 3, 3, 2, 2."""
    dictionary = load("dictionary")
    model, x_TD = planted_model(dictionary, "mutual_choice", 1)
    model.gate.config = model.gate.config.model_copy(update={"mean_k": 0.5})  # type: ignore[attr-defined]
    found = dictionary.measure(model, [x_TD], served=False)
    lost = 2 * 4 + 4 * 1  # two tokens of length 2, four of length 1
    spread = 4 * (1 + 4 + 9) - 12 * sum((length / 3) ** 2 for length in (1, 2, 3))
    assert found["mse"] == pytest.approx(lost / 12)
    assert found["explained"] == pytest.approx(1 - lost / spread)
    assert (found["active"], found["dead"]) == (0.5, 2.0)


def test_served_autoencoder_chooses_by_its_thresholds() -> None:
    dictionary = load("dictionary")
    model, x_TD = planted_model(dictionary, "mutual_choice", 1)
    model.gate.threshold.fill_(1.5)  # type: ignore[attr-defined]
    model.gate.threshold_steps.fill_(1)  # type: ignore[attr-defined]
    found = dictionary.measure(model, [x_TD], served=True)
    assert (found["dead"], found["active"]) == (2.0, 8 / 12)


def test_tokens_have_as_many_atoms_as_asked() -> None:
    dictionary = load("dictionary")
    planted = dictionary.plant(32, 8, 3.0, 0.5, 0.0, seed=1)
    torch.testing.assert_close(planted.atom_AD.norm(dim=1), torch.ones(32))
    assert float(planted.chance_A.sum()) == pytest.approx(3.0)
    assert float(planted.chance_A[0] / planted.chance_A[3]) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["feature_choice", "mutual_choice", "topk"])
def test_training_learns_the_atoms(name: str) -> None:
    dictionary = load("dictionary")
    planted = dictionary.plant(8, 8, 1.0, 0.0, 0.01, seed=0)
    sizes = {"features": 16, "mean_k": 1, "batch": 64, "rate": 1e-2}
    begun = dictionary.run(dictionary.GATES[name], planted, steps=1, seed=3, **sizes)
    found = dictionary.run(dictionary.GATES[name], planted, steps=150, seed=3, **sizes)
    assert found["recovered"] > begun["recovered"]
    assert found["mse"] < 0.5 * begun["mse"]
    assert found["active"] <= 1.0


def test_windows_end_with_the_last_steps() -> None:
    stream = load("balance_stream")
    found = stream.follow(stream.GATES["topk quantile"], stream.Stream(64, 4, 0.7, 0), 25, 10)
    assert len(found["windows"]) == 2  # the first five steps are no full stretch
    assert found["windows"][-1] == found["last"]


def test_an_early_stop_is_not_the_answer_and_the_last_one_is() -> None:
    sns = load("sns")
    score_NN = -torch.rand(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in sns.STOPPED:
        seconds, errors = sns.follow(name, score_NN, 50.0, 5.0)
        assert len(seconds) == len(errors)
        assert errors[-1] <= 1.1 * sns.TOLERANCE
        assert all(error > 1.1 * sns.TOLERANCE for error in errors[:-1])


def test_every_experiment_draws_a_small_png(tmp_path: Path) -> None:
    dictionary, stream, search, digits = (load(n) for n in ("dictionary", "balance_stream", "local_search", "digits"))
    coverage, sns, rates = (load(name) for name in ("coverage", "sns", "rates"))
    drawn = {name: tmp_path / f"{name}.png" for name in ("r4", "r5", "r6", "r7", "r8", "r9", "r10")}
    runs = [{"dead": 1, "served_dead": 2, "recovered": 5, "explained": 0.8, "served_explained": 0.7}]
    dictionary.draw_plot([{"gate": name, "runs": runs} for name in dictionary.GATES], 8, 8, drawn["r9"])
    windows = [{"windows": [3.0, 2.0, 1.1]}, {"windows": [3.1, 2.1, 1.2]}]
    stream.draw_plot([{"gate": "topk", "steps": 30, "runs": windows}], 10, 1.02, drawn["r8"])
    search.draw_plot([{"gate": name, "runs": [{"error": 0.1, "matched": 1.0}]} for name in search.GATES], drawn["r10"])
    tested = [{"cross_entropy": 0.13, "experts_end": 2.0, "live": 8.0}]
    digits.draw_plot([{"gate": name, "runs": tested} for name in digits.GATES], drawn["r7"])
    coverage.draw_plot(coverage.measure(32, 4, [1.0, 2.0], 2), 32, drawn["r5"])
    sns.draw_plot(20, [50.0], 1.0, drawn["r6"])
    design = rates.Design("two", [100, 1000], {"a": -0.5}, {"a": [[0.1, 0.2], [0.03, 0.06]]})
    rates.draw_plot([design], drawn["r4"])
    for path in drawn.values():
        assert_small_png(path)
