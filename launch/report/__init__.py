"""``moeyard report RUN``: one self-contained HTML page about a run, from the files in its run directory."""

from __future__ import annotations

from launch.report.page import write_report

__all__ = ["write_report"]
