"""Settings for every test: one compute thread a process, readable messages from shared assertion code."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("tests.gate_conformance")
# Two OpenMP pools on two cores wait for each other more than they compute.
torch.set_num_threads(1)
