"""Settings for every test: one compute thread a process, readable messages from shared assertion code."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.gate_conformance")
# Two OpenMP pools on two cores wait for each other more than they compute.
torch.set_num_threads(1)
# The same examples everywhere, so that whoever sees a failure can repeat it; "make test-explore" draws others.
settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
