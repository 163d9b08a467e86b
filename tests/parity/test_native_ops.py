"""The C++ ops against torch in double precision; that a row does not depend on its neighbours; and their absence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.experts import swiglu_experts
from moe.ops import native
from moe.ops.batch_invariant import BatchInvariant
from moe.ops.native import DTYPES, LEVELS, NativeOps, choose_native_ops, native_ops
from moe.ops.packed_linear import row_linear

# The first test that needs the ops builds them unless they are in the cache: ten seconds for each change of csrc.
unit = pytest.mark.unit

# Relative to the sum of absolute products: an fp32 sum of at most some hundred terms, or one rounding to bf16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
WIDTHS = st.integers(1, 70)  # multiples of 1, 4, 8, 16 and 32, and everything between
SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    found = choose_native_ops()
    if found.ops is None:
        if found.reason.startswith(("no compiler", "disabled")):
            pytest.skip(f"{found.reason}: install g++ and leave MOEYARD_NATIVE unset to run this")
        pytest.fail(found.reason)
    return found.ops


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def levels_and_dtypes() -> list[tuple[str, torch.dtype]]:
    """Every pair that is a code path of its own: fp32 has none beyond avx512."""
    return [(level, dtype) for dtype in DTYPES for level in LEVELS if dtype == torch.bfloat16 or level in LEVELS[:3]]


paths = pytest.mark.parametrize(("level", "dtype"), levels_and_dtypes(), ids=str)


def require(ops: NativeOps, level: str) -> None:
    if level not in ops.levels():
        pytest.skip(f"this CPU has {ops.best_level} at most; {level} runs on a newer one")


def random_rows(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def experts_and_rows(
    seed: int, load: list[int], dim: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows_ND, w_gate_up_EGD, w_down_EDF, load_E)."""
    shapes = (sum(load), dim), (len(load), 2 * hidden, dim), (len(load), dim, hidden)
    rows_ND, w_gate_up_EGD, w_down_EDF = random_rows(seed, *shapes, dtype=dtype)
    return rows_ND, w_gate_up_EGD, w_down_EDF, torch.tensor(load, dtype=torch.int64)


def assert_close(found: Tensor, wanted: Tensor, scale: Tensor) -> None:
    """Elementwise, ``scale`` being what rounding errors are in proportion to."""
    assert found.dtype in DTYPES
    assert found.shape == wanted.shape
    worst = ((found.double() - wanted).abs() - TOLERANCE[found.dtype] * scale).amax() if found.numel() else 0
    assert worst <= 1e-30


@unit
@paths
@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, rows=st.integers(0, 70), dim=WIDTHS, outputs=WIDTHS)
@example(seed=1, rows=3, dim=96, outputs=64)
@example(seed=2, rows=300, dim=1030, outputs=33)
def test_linear_rows_is_linear(
    ops: NativeOps, level: str, dtype: torch.dtype, seed: int, rows: int, dim: int, outputs: int
) -> None:
    require(ops, level)
    x_ND, w_OD = random_rows(seed, (rows, dim), (outputs, dim), dtype=dtype)
    scale_NO = F.linear(x_ND.double().abs(), w_OD.double().abs())
    assert_close(ops.linear_rows(x_ND, w_OD, level), F.linear(x_ND.double(), w_OD.double()), scale_NO)


@unit
@paths
@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, load=st.lists(st.sampled_from([0, 0, 1, 2, 5, 16, 17, 40]), max_size=6), dim=WIDTHS, hidden=WIDTHS)
@example(seed=3, load=[0, 65, 0, 130], dim=300, hidden=200)
def test_expert_mlp_is_swiglu_experts(
    ops: NativeOps, level: str, dtype: torch.dtype, seed: int, load: list[int], dim: int, hidden: int
) -> None:
    require(ops, level)
    rows_ND, w_gate_up_EGD, w_down_EDF, load_E = experts_and_rows(seed, load, dim, hidden, dtype)
    found_ND = ops.expert_mlp(rows_ND, w_gate_up_EGD, w_down_EDF, load_E, level)
    assert found_ND.shape == rows_ND.shape
    if not sum(load):
        return
    gate_EDF, up_EDF = w_gate_up_EGD.double().mT.chunk(2, dim=2)
    down_EFD = w_down_EDF.double().mT
    wanted_ND = swiglu_experts(rows_ND.double(), (gate_EDF, up_EDF, down_EFD), load_E, "loop")
    sums, layers = [], []
    for x, gate, up, down in zip(rows_ND.double().split(load), gate_EDF, up_EDF, down_EFD, strict=True):
        # Errors of both first sums, which silu enlarges at most 1.1 times; and the hidden layer that may be rounded.
        sums.append(1.1 * (x.abs() @ gate.abs()) * (x.abs() @ up.abs()) @ down.abs())
        layers.append((F.silu(x @ gate) * (x @ up)).abs() @ down.abs())
    if dtype == torch.float32:
        assert_close(found_ND, wanted_ND, 3 * torch.cat(sums))
    else:
        fp32 = TOLERANCE[torch.float32] / TOLERANCE[dtype]
        assert_close(found_ND, wanted_ND, 2 * torch.cat(layers) + 3 * fp32 * torch.cat(sums))


@unit
@paths
def test_silu_over_its_whole_range(ops: NativeOps, level: str, dtype: torch.dtype) -> None:
    require(ops, level)
    x_N1 = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-6, -1e-6, 3e4, -3e4])])[:, None].to(dtype)
    ones = torch.ones(1, 2, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype), torch.tensor([len(x_N1)])
    wanted_N1 = F.silu(x_N1.double()) * x_N1.double()
    # Where exp(-x) leaves fp32's range (x < -87) silu is 1e-36 or less and may be zero.
    assert_close(ops.expert_mlp(x_N1, *ones, level), wanted_N1, wanted_N1.abs() + 1e-27)


@unit
@paths
def test_results_are_rounded_to_nearest_even(ops: NativeOps, level: str, dtype: torch.dtype) -> None:
    require(ops, level)
    x_N1, w_O1 = random_rows(4, (50, 1), (40, 1), dtype=dtype)
    # One product of two bf16 is exact in fp32, so that torch's own rounding must give the same bits.
    wanted_NO = (x_N1.float() * w_O1.float().t()).to(dtype)
    assert torch.equal(ops.linear_rows(x_N1, w_O1, level), wanted_NO)


@unit
@paths
@pytest.mark.parametrize(("dim", "hidden"), [(64, 48), (67, 37), (300, 272)])
def test_a_row_does_not_depend_on_the_others(
    ops: NativeOps, level: str, dtype: torch.dtype, dim: int, hidden: int
) -> None:
    require(ops, level)
    rows_ND, w_gate_up_EGD, w_down_EDF, _ = experts_and_rows(5, [70, 0], dim, hidden, dtype)
    w_GD = w_gate_up_EGD[0]
    whole_NG = ops.linear_rows(rows_ND, w_GD, level)
    whole_ND = ops.expert_mlp(rows_ND, w_gate_up_EGD, w_down_EDF, torch.tensor([70, 0]), level)
    for start, count in [(0, 1), (3, 2), (69, 1), (1, 3), (5, 8), (20, 16), (0, 17), (30, 33), (6, 64)]:
        part_nD = rows_ND[start : start + count]
        assert torch.equal(ops.linear_rows(part_nD, w_GD, level), whole_NG[start : start + count])
        # The same expert, with rows of another expert behind.
        both_ND = torch.cat([part_nD, rows_ND[:9]])
        found_ND = ops.expert_mlp(both_ND, w_gate_up_EGD, w_down_EDF, torch.tensor([count, 9]), level)
        assert torch.equal(found_ND[:count], whole_ND[start : start + count])
    # Other rows may be anything.
    mixed_ND = torch.stack([rows_ND[0], torch.full((dim,), torch.nan, dtype=dtype), rows_ND[2]])
    found_NG = ops.linear_rows(mixed_ND, w_GD, level)
    assert torch.equal(found_NG[::2], whole_NG[:3:2])
    assert found_NG[1].isnan().all()


@unit
@paths
@pytest.mark.usefixtures("two_threads")
def test_threads_do_not_change_a_bit(ops: NativeOps, level: str, dtype: torch.dtype) -> None:
    require(ops, level)
    # Large enough for two threads to share; 530 outputs are no multiple of what a thread computes at once.
    inputs = experts_and_rows(6, [3, 0, 21], 530, 410, dtype)
    assert inputs[2][0].nbytes > 2**18
    two = ops.expert_mlp(*inputs, level), ops.linear_rows(inputs[0], inputs[1][0], level)
    torch.set_num_threads(1)
    one = ops.expert_mlp(*inputs, level), ops.linear_rows(inputs[0], inputs[1][0], level)
    assert torch.equal(two[0], one[0])
    assert torch.equal(two[1], one[1])


@unit
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_need_not_be_contiguous(ops: NativeOps, dtype: torch.dtype) -> None:
    rows_ND, w_gate_up_EGD, w_down_EDF, load_E = experts_and_rows(7, [2, 0, 5], 40, 24, dtype)
    wanted_ND = ops.expert_mlp(rows_ND, w_gate_up_EGD, w_down_EDF, load_E)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (rows_ND, w_gate_up_EGD, w_down_EDF, load_E)]
    turned = [tensor.mT.contiguous().mT for tensor in (rows_ND, w_gate_up_EGD, w_down_EDF)]
    padded = [F.pad(tensor, (0, 5))[..., :-5] for tensor in (rows_ND, w_gate_up_EGD, w_down_EDF)]
    for rows, gate_up, down, load in (spread, [*turned, load_E], [*padded, load_E]):
        assert not any(tensor.is_contiguous() for tensor in (rows, gate_up, down))
        assert torch.equal(ops.expert_mlp(rows, gate_up, down, load), wanted_ND)
        assert torch.equal(ops.linear_rows(rows, gate_up[1]), ops.linear_rows(rows_ND, w_gate_up_EGD[1]))
    same_ND = rows_ND[:1].expand(4, -1)
    assert torch.equal(ops.linear_rows(same_ND, w_gate_up_EGD[0]), ops.linear_rows(same_ND.clone(), w_gate_up_EGD[0]))


@unit
def test_nothing_times_nothing(ops: NativeOps) -> None:
    assert ops.linear_rows(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert ops.linear_rows(torch.ones(2, 4), torch.ones(0, 4)).shape == (2, 0)
    assert ops.linear_rows(torch.ones(2, 0), torch.ones(3, 0)).tolist() == [[0.0] * 3] * 2


@unit
def test_arguments_that_do_not_fit_are_errors_with_words(ops: NativeOps) -> None:
    x, w = torch.ones(2, 4), torch.ones(3, 4)
    for wrong, text in [
        ((x, torch.ones(3, 5)), r"w_OD has shape \(3, 5\), expected \(O, D=4\)"),
        ((x[0], w), r"x_ND has shape \(4\), expected \(N, D\)"),
        ((x.double(), w.double()), "x_ND is of dtype Double, expected Float or BFloat16"),
        ((x, w.bfloat16()), "w_OD is of dtype BFloat16 and x_ND of Float: they must be the same"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            ops.linear_rows(*wrong)
    rows, up, down, load = experts_and_rows(8, [1, 3], 4, 5, torch.float32)
    for inputs, text in [
        ((rows, up, down[:1], load), r"w_gate_up_EGD has shape \(2, 10, 4\), expected \(E=1, G=10, D=4\)"),
        ((rows, up[:, 1:], down, load), r"w_gate_up_EGD has shape \(2, 9, 4\), expected \(E=2, G=10, D=4\)"),
        ((rows[:, 1:], up, down, load), r"w_down_EDF has shape \(2, 4, 5\), expected \(E, D=3, F\)"),
        ((rows, up, down, load[:1]), r"load_E has shape \(1\), expected \(E=2\)"),
        ((rows, up, down, load.int()), "load_E is of dtype Int, expected Long"),
        ((rows, up, down.bfloat16(), load), "w_down_EDF is of dtype BFloat16 and rows_ND of Float"),
        ((rows, up, down, load + 1), "load_E gives expert 1 4 rows, there are 2 left of 4"),
        ((rows, up, down, load - 1), "load_E sums to 2, there are 4 rows"),
        ((rows, up, down, torch.tensor([-1, 5])), "load_E gives expert 0 -1 rows"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            ops.expert_mlp(*inputs)


@unit
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariant_mode_leaves_the_ops_as_they_are(ops: NativeOps, dtype: torch.dtype) -> None:
    inputs = experts_and_rows(9, [4, 1], 48, 32, dtype)
    wanted = ops.expert_mlp(*inputs), ops.linear_rows(inputs[0], inputs[1][0])
    with BatchInvariant():
        found = ops.expert_mlp(*inputs), ops.linear_rows(inputs[0], inputs[1][0])
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@unit
def test_row_linear_leaves_to_torch_what_is_not_for_it(ops: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    counted = NativeOps.linear_rows

    def linear_rows(self: NativeOps, x_ND: Tensor, w_OD: Tensor, level: str | None = None) -> Tensor:
        calls.append(tuple(x_ND.shape))
        return counted(self, x_ND, w_OD, level)

    monkeypatch.setattr(NativeOps, "linear_rows", linear_rows)
    monkeypatch.setattr(NativeOps, "few_rows", lambda self, dtype: 6)
    few, every = row_linear(ops), row_linear(ops, batch_invariant=True)
    x_BTD, w_OD = random_rows(10, (2, 3, 8), (5, 8), dtype=torch.float32)
    many_BTD = torch.cat([x_BTD, x_BTD], 1)
    torch.testing.assert_close(few(x_BTD, w_OD), F.linear(x_BTD, w_OD))
    torch.testing.assert_close(few(many_BTD, w_OD), F.linear(many_BTD, w_OD))
    assert calls == [(6, 8)]
    torch.testing.assert_close(every(many_BTD, w_OD), F.linear(many_BTD, w_OD))
    assert calls == [(6, 8), (12, 8)]
    learnt_OD = torch.nn.Parameter(w_OD)
    every(x_BTD, learnt_OD).sum().backward()
    assert learnt_OD.grad is not None
    assert every(x_BTD.double(), w_OD.double()).dtype == torch.float64
    assert len(calls) == 2
    with torch.inference_mode():
        assert every(x_BTD[0, 0], learnt_OD).shape == (5,)
    assert calls[2:] == [(1, 8)]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not looked for the ops yet, with an empty cache; the folder that would be the cache."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_choices", {})
    monkeypatch.delenv("MOEYARD_NATIVE", raising=False)
    monkeypatch.setenv("MOEYARD_NATIVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@unit
def test_without_a_compiler_there_are_no_ops(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler -v")
    assert choose_native_ops() == (None, "no compiler: CXX=/no/such/compiler cannot be run")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(fresh.parent))
    assert choose_native_ops() == (None, "no compiler: none of c++, g++, clang++ is on the PATH")
    assert native_ops() is None
    assert not fresh.exists()


@unit
def test_a_failed_build_is_told_once(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = fresh.parent / "broken"
    compiler.write_text(
        "#!/bin/sh\necho a note >&2\necho 'x.cpp:1: fatal error: no header' >&2\necho more >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.INFO, "moeyard.moe.native"):
        first, second = choose_native_ops(), choose_native_ops()
    assert first == second == (None, "build failed: x.cpp:1: fatal error: no header")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"building native ops with {compiler}: some ten seconds, once",
        "native ops: build failed: x.cpp:1: fatal error: no header; computing with torch",
    ]
    assert [path.suffix for path in fresh.iterdir()] == [".lock"]


@unit
def test_a_cache_that_cannot_be_written_is_a_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh.parent / "file").touch()
    monkeypatch.setenv("MOEYARD_NATIVE_CACHE", str(fresh.parent / "file" / "cache"))
    monkeypatch.setenv("CXX", sys.executable)
    assert "Not a directory" in choose_native_ops().reason


@unit
@pytest.mark.usefixtures("fresh")
def test_ops_are_turned_off_and_sources_may_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEYARD_NATIVE", "0")
    assert choose_native_ops() == (None, "disabled by MOEYARD_NATIVE=0")
    monkeypatch.delenv("MOEYARD_NATIVE")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    assert choose_native_ops() == (None, "no sources: csrc is only in a clone or an editable install")


_BUILDS_WHEN_ASKED = """
import os, pathlib, sys, torch
import moe.ops.packed_experts, serve.engine.load
from moe.ops.native import choose_native_ops
cache = pathlib.Path(os.environ["MOEYARD_NATIVE_CACHE"])
assert not hasattr(torch.ops.moeyard, "cpu_level")
print("ready", flush=True)
sys.stdin.readline()
found = choose_native_ops()
assert found.ops is not None, found.reason
print(found.ops.linear_rows(torch.ones(2, 3), torch.ones(4, 3)).sum().item(), found.ops.path.parent == cache)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ops")
def test_imports_build_nothing_and_two_processes_share_one_build(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _BUILDS_WHEN_ASKED],
            env={**os.environ, "MOEYARD_NATIVE_CACHE": str(cache)},
            cwd=Path(native.__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert not cache.exists()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert outputs == ["24.0 True\n"] * 2
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]
