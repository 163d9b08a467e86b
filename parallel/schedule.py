"""When copies travel: under attention, while no tokens do.

One step of a model with MoE layers 0 and 1; above what the rank computes, below what its link carries. Copies of a
layer are gathered under the attention before it; their gradients are reduced under the attention behind it, seen
from backward. ``rm`` frees copies after forward and gathers them again, one layer ahead, for backward.

    forward     attention 0 | experts 0      | attention 1 | experts 1      |
    link        spAG 0      | tokens, tokens | spAG 1      | tokens, tokens |

    backward    experts 1      | attention 1          | experts 0      | attention 0 |
    link        tokens, tokens | (rm: spAG 0,) spRS 1 | tokens, tokens | spRS 0      |

The engine calls the events below in the order in which a step reaches them; each says what begins there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from parallel.chrome_trace import StepRecorder
from parallel.layer_copies import LayerCopies


class OverlapSchedule:
    """Decides what each event of a step begins, waits for and frees.

    Attributes:
        in_backward: between :meth:`backward_begins` and :meth:`backward_ends`; forward passes then are recomputed ones.
        peak_copy_bytes: most memory of copies and their gradients at once, since somebody set it to 0.
        recorder: is told of each event, if there is one.
        free_ns_L: (L,) how long the link was free before the tokens of each layer, in the last forward pass.

    Args:
        layers: in the order of forward.
        keep: copies stay from forward to backward; else ``rm``.
        hold: copies and their gradients stay over the micro-batches of a step; needs ``keep``.
    """

    def __init__(self, layers: Sequence[LayerCopies], *, keep: bool, hold: bool) -> None:
        self.layers, self.keep, self.hold = layers, keep, hold
        self.free_ns_L = [0] * len(layers)
        self.peak_copy_bytes = 0
        self.recorder: StepRecorder | None = None
        self._free_since_ns = 0
        self._last_micro_batch = True
        self.in_backward = False
        self._unreduced: set[int] = set()

    # --- forward --------------------------------------------------------------------------------------------------

    def forward_begins(self, last_micro_batch: bool) -> None:
        """A micro-batch begins: the first layer's copies travel under the embedding and the first attention."""
        self._last_micro_batch, self.in_backward = last_micro_batch, False
        if self.recorder:
            self.recorder.forward_begins()
        self._free_since_ns = time.perf_counter_ns()
        self.layers[0].gather()

    def tokens_routed(self, layer: int) -> None:
        """The gate has spoken: tokens need the link now."""
        if not self.in_backward:
            self.free_ns_L[layer] = time.perf_counter_ns() - self._free_since_ns

    def weights_needed(self, layer: int) -> None:
        """Tokens are here, experts are about to compute: what has not arrived by now is exposed."""
        begin_s = time.perf_counter()
        if self.in_backward and not self.keep and layer + 1 < len(self.layers):
            # Released copies promise the memory of one layer's copies and gradients, however slow the links are.
            self.layers[layer + 1].finish()
        self.layers[layer].wait()
        self._note_memory()
        if self.recorder:
            label = self.layers[layer].label
            self.recorder.waited(f"{label} wait for copies", begin_s, before=f"{label} place rows")

    def outputs_home(self, layer: int) -> None:
        """The layer's part of forward is over: the link is free for the next layer's copies."""
        if self.in_backward:
            return  # a recomputed forward; backward has its own events
        self._free_since_ns = time.perf_counter_ns()
        if layer + 1 < len(self.layers):
            if not self.keep:
                self.layers[layer].release()
            self.layers[layer + 1].gather()
        # The last layer's copies stay: backward needs them first.

    # --- backward -------------------------------------------------------------------------------------------------

    def backward_begins(self) -> None:
        """The loss is known."""
        self.in_backward = True
        self._unreduced = set(range(len(self.layers)))
        if self.recorder:
            self.recorder.backward_begins()

    def weights_used(self, layer: int) -> None:
        """Backward has passed the layer's experts: copies make room for their gradients, which are about to be kept."""
        self._note_memory()
        self.layers[layer].finish()  # the gradients of an earlier micro-batch, to which these will be added
        if self._last_micro_batch or not self.hold:
            self.layers[layer].release()

    def gradients_home(self, layer: int) -> None:
        """The layer's part of backward is over: copies for the layer below come first, they are needed sooner."""
        self._note_memory()
        if self._last_micro_batch or not self.hold:
            self.layers[layer].release()  # if no gradient came by
        if not self.keep and layer > 0:
            self.layers[layer - 1].gather()
        self._reduce(layer)
        self._note_memory()

    def backward_ends(self) -> None:
        """Whatever no gradient reached takes part all the same: every rank begins the same collectives."""
        for layer in sorted(self._unreduced, reverse=True):
            self.gradients_home(layer)
        self.in_backward = False
        if self.recorder:
            self.recorder.backward_ends()

    def step_ends(self) -> None:
        """All gradients of owned experts are complete when this returns."""
        begin_s = time.perf_counter()
        for layer in reversed(self.layers):
            layer.finish()
        if self.recorder:
            self.recorder.waited("wait for gradients of copies", begin_s, before="gradients of dense parameters")

    def _note_memory(self) -> None:
        here_bytes = sum(layer.copy_bytes for layer in self.layers)
        self.peak_copy_bytes = max(self.peak_copy_bytes, here_bytes)

    def _reduce(self, layer: int) -> None:
        self._unreduced.discard(layer)
        # Held copies collect gradients over all micro-batches.
        if self._last_micro_batch or not self.hold:
            self.layers[layer].reduce()
