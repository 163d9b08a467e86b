"""Several training processes on this machine, started by torchrun's own agent inside this process.

The agent is the one behind the ``torchrun`` command; calling it here instead of through a shell keeps what that
command loses: the exit code of the rank that failed first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from parallel.topology import PEER_FAILED_EXIT_CODE

TRAIN_PROGRAM = Path(__file__).with_name("train.py")
SAVE_S = 600
"""How long ranks may take to save after an interrupt, before they are killed."""


def run_ranks(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``launch/train.py`` with ``arguments`` on ``ranks`` processes; returns its exit code.

    An interrupt gives 130; a rank that a signal killed gives 128 + the signal's number.
    """
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    # Ranks talk over loopback; otherwise gloo asks the resolver for this machine's name, which may not answer.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    # Each rank says itself what went wrong; the agent's own long account of it would bury that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    agent_options = ["--standalone", f"--nproc-per-node={ranks}", "--local-addr=127.0.0.1"]
    if any("--shutdown-timeout" in action.option_strings for action in torchrun.get_args_parser()._actions):
        agent_options.append(f"--shutdown-timeout={SAVE_S}")
    try:
        torchrun.run(torchrun.parse_args([*agent_options, str(TRAIN_PROGRAM), *arguments]))
    except ChildFailedError as error:
        return _code_of_first(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _code_of_first(error: ChildFailedError) -> int:
    """The exit code of the rank that failed first, of its own accord; says so when a signal killed it."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int, int]:
        rank, failure = item
        ended = failure.exitcode == -signal.SIGTERM  # by the agent, as soon as another rank had failed
        return ended, failure.exitcode == PEER_FAILED_EXIT_CODE, failure.timestamp, rank

    rank, failure = min(error.failures.items(), key=order)
    if failure.exitcode == PEER_FAILED_EXIT_CODE:
        return 1  # the rank that has said what went wrong was ended before it could exit with its own code
    if failure.exitcode >= 0:
        return failure.exitcode
    number = -failure.exitcode
    why = " (the system kills processes this way when memory runs out)" if number == signal.SIGKILL else ""
    print(f"error: rank {rank} was killed by {signal.Signals(number).name}{why}", file=sys.stderr, flush=True)
    return 128 + number
