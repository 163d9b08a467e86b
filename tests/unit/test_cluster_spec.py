"""The emulated cluster: what its description refuses, addresses, and rates like those of real clusters."""

from __future__ import annotations

import pytest

from benchmarks.cluster.spec import REFERENCES, ClusterSpec, SpecError, measure_flops, rates_like

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "nodes is 0; it must be at least 1"),
        ({"nodes": 2, "ranks_per_node": -1}, "ranks_per_node is -1"),
        ({"nodes": 2, "inter_mbit": 0}, "inter_mbit is 0; it must be more than 0"),
        ({"nodes": 2, "intra_mbit": float("nan")}, "intra_mbit is nan"),
        ({"nodes": 2, "cpu": 1.5}, "a rank has one thread and can use one core at most"),
        ({"nodes": 60, "ranks_per_node": 4}, "240 ranks; addresses are laid out for 200"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_with_the_reason(options: dict[str, float], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ClusterSpec(**options)


def test_addresses() -> None:
    apart = ClusterSpec(nodes=2, ranks_per_node=2)
    assert [apart.address(rank) for rank in range(4)] == [f"10.77.0.{i}" for i in (1, 2, 3, 4)]
    together = ClusterSpec(nodes=2, ranks_per_node=2, shared_node=True)
    assert [together.address(rank) for rank in range(4)] == [f"10.77.0.{i}" for i in (1, 1, 2, 2)]


@pytest.mark.parametrize(("name", "flop_per_byte"), [("paper-a", 32_000), ("paper-b", 19_968), ("h100-pod", 7_912)])
def test_links_like_a_reference_keep_its_flop_per_byte(name: str, flop_per_byte: float) -> None:
    reference = REFERENCES[name]
    assert reference.flop_per_byte(inter=True) == pytest.approx(flop_per_byte)
    inter, intra = rates_like(reference, 30e9, ranks_per_node=2)
    # The two ranks of a node share its link.
    assert 30e9 / (inter * 125_000 / 2) == pytest.approx(flop_per_byte)
    assert 30e9 / (intra * 125_000) == pytest.approx(reference.flop_per_byte(inter=False))


def test_matrix_products_are_counted() -> None:
    assert 1e8 < measure_flops(0.05) < 1e13
