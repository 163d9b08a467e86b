"""What the expert engine did, as numbers: how level ranks were, what moved, what waiting it cost.

Each rank counts by itself with an :class:`EngineMeter`. Two small reductions a log interval, none a step, make
:class:`EngineMetrics` of that. Only training steps count; evaluations and samples between them do not.

Shape suffixes: L layers, W ranks, E experts, P passes of a layer (forward passes with gradients, layers and
micro-batches one after another).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from parallel.collectives import Communicator, Handle
from parallel.placement import Ints, Placement
from parallel.schedule import OverlapSchedule
from parallel.token_dispatch import RowExchange
from parallel.topology import Topology

KINDS = ("spAG", "spRS", "tokens", "counts", "owners")
"""What travels: copies, their gradients, rows, counts of rows, experts that change owners (with optimizer state)."""


@dataclass(frozen=True)
class EngineMetrics:
    """Means over the steps of an interval; the same on every rank.

    Attributes:
        steps: how many steps that were.
        imbalance_before_L: (L,) rows of the most loaded rank over the mean of ranks if each expert ran on its owner,
            as in expert parallelism; mean over micro-batches, because each one waits for its most loaded rank.
        imbalance_after_L: (L,) the same of the rows that ranks did compute.
        copies_L: (L,) copies of experts, over all ranks.
        sent_bytes: payload that all ranks together sent in a step, by kind (:data:`KINDS`).
        copies_hidden_s: seconds a step in which copies or their gradients travelled and nobody waited; mean of ranks.
        copies_exposed_s: seconds a step in which a rank stood still for them; mean of ranks.
        tokens_waited_s: seconds a step in the exchange of counts and tokens, waiting for later ranks included; mean of
            ranks.
        copy_peak_bytes: most memory that copies and their gradients took at once, those on their way home included, on
            the worst rank.
    """

    steps: int
    imbalance_before_L: Sequence[float]
    imbalance_after_L: Sequence[float]
    copies_L: Sequence[float]
    sent_bytes: Mapping[str, float]
    copies_hidden_s: float
    copies_exposed_s: float
    tokens_waited_s: float
    copy_peak_bytes: int

    @property
    def imbalance_before(self) -> float:
        """Mean over layers."""
        return float(np.mean(self.imbalance_before_L))

    @property
    def imbalance_after(self) -> float:
        """Mean over layers."""
        return float(np.mean(self.imbalance_after_L))

    @property
    def hidden_share(self) -> float | None:
        """Of the time that copies and their gradients travelled; None when none did."""
        whole = self.copies_hidden_s + self.copies_exposed_s
        return self.copies_hidden_s / whole if whole else None


class EngineMeter:
    """Counts on one rank what the engine does; :meth:`take` makes metrics of it.

    Attributes:
        count_LWE: (L, W, E) rows that each rank had for each expert in this step, all micro-batches together.
    """

    def __init__(
        self, topology: Topology, num_experts: int, comm: Communicator, exchange: RowExchange, schedule: OverlapSchedule
    ) -> None:
        self._topology, self._comm, self._exchange, self._schedule = topology, comm, exchange, schedule
        self._layers = len(schedule.layers)
        self.count_LWE: Ints = np.zeros((self._layers, topology.world_size, num_experts), dtype=np.int64)
        comm.take_log()  # of whatever came before the first step
        self._sent_before: Counter[str] = Counter()
        self._waited_before_s = 0.0
        self._forget()

    def _forget(self) -> None:
        self._steps = 0
        self._before_L = np.zeros(self._layers)
        self._copies_L = np.zeros(self._layers)
        self._passes_L = np.zeros(self._layers, dtype=np.int64)
        self._pass_P: list[tuple[int, int, int]] = []  # layer, rows of all ranks, rows computed here
        self._sent_bytes: Counter[str] = Counter()
        self._hidden_s = self._exposed_s = self._waited_s = 0.0
        self._peak_bytes = 0

    # --- a step ---------------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """What was sent since the last step was not for training."""
        self.count_LWE = np.zeros_like(self.count_LWE)
        self._sent_before = self._sent()
        self._waited_before_s = self._exchange.waited_s
        self._schedule.peak_copy_bytes = 0

    def placed(self, layer: int, count_WE: Ints, placement: Placement, received_WE: Ints) -> None:
        """A forward pass with gradients has placed the rows of one layer.

        Args:
            count_WE: (W, E) rows that each rank has for each expert.
            received_WE: (W, E) those that this rank computes.
        """
        self.count_LWE[layer] += count_WE
        self._copies_L[layer] += placement.copies_E.sum()
        self._passes_L[layer] += 1
        load_E = count_WE.sum(0)
        total, world = int(load_E.sum()), self._topology.world_size
        owned_W = np.bincount(placement.owner_E, weights=load_E, minlength=world)
        self._before_L[layer] += owned_W.max() * world / total if total else 1.0
        self._pass_P.append((layer, total, int(received_WE.sum())))

    def gradients_complete(self) -> None:
        """Exchanges from here to the end of the step move experts to new owners, not tokens."""
        self._waited_s += self._exchange.waited_s - self._waited_before_s

    def step_ends(self) -> list[Handle]:
        """Everything of the step is over.

        Returns:
            The sparse collectives of the step.
        """
        self._steps += 1
        sent = self._sent()
        sent.subtract(self._sent_before)
        self._sent_bytes.update(sent)
        # Collectives run one after another: who waits for one may be waiting for those before it. So only sums tell.
        done = self._comm.take_log()
        waited_s = sum(handle.waited_s for handle in done)
        self._exposed_s += waited_s
        self._hidden_s += max(0.0, sum(handle.duration_s for handle in done) - waited_s)
        self._peak_bytes = max(self._peak_bytes, self._schedule.peak_copy_bytes)
        return done

    def _sent(self) -> Counter[str]:
        return self._comm.sent_bytes + self._exchange.sent_bytes

    # --- an interval ----------------------------------------------------------------------------------------------

    def take(self) -> EngineMetrics | None:
        """Metrics of the steps since the last call, and count anew; None when there was none. Collective."""
        if not self._steps:
            return None
        steps, world = self._steps, self._topology.world_size
        layer_P, total_P, rows_P = np.array(self._pass_P, dtype=np.int64).reshape(-1, 3).T.copy()
        most = torch.from_numpy(np.append(rows_P, self._peak_bytes))
        if world > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        *most_P, peak_bytes = most.tolist()
        busiest_P = np.where(total_P > 0, np.array(most_P) * world / np.maximum(total_P, 1), 1.0)
        sent = [float(self._sent_bytes[kind]) for kind in KINDS]
        seconds = [self._hidden_s, self._exposed_s, self._waited_s]
        sums = self._topology.sum_(torch.tensor([*sent, *seconds], dtype=torch.float64)) / steps
        hidden_s, exposed_s, waited_s = (sums[len(KINDS) :] / world).tolist()
        passes_L = np.maximum(self._passes_L, 1)
        metrics = EngineMetrics(
            steps=steps,
            imbalance_before_L=(self._before_L / passes_L).tolist(),
            imbalance_after_L=(np.bincount(layer_P, weights=busiest_P, minlength=self._layers) / passes_L).tolist(),
            copies_L=(self._copies_L / passes_L).tolist(),
            sent_bytes=dict(zip(KINDS, sums[: len(KINDS)].tolist(), strict=True)),
            copies_hidden_s=hidden_s,
            copies_exposed_s=exposed_s,
            tokens_waited_s=waited_s,
            copy_peak_bytes=int(peak_bytes),
        )
        self._forget()
        return metrics
