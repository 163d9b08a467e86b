"""``moeyard gates compare``: every gate trains the same model on the same text, and one page shows what each cost and
gave.

Data flows one way: variants (which gates) -> runs (one per gate and seed) -> training (processes) -> results (their
metrics) and gate_cost (a clock on trained gates) -> report (HTML, Markdown, JSON).
"""

from __future__ import annotations

from launch.gate_comparison.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
