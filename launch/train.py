"""Train a mixture-of-experts language model.

    torchrun --nproc-per-node 2 launch/train.py --config launch/configs/tiny.yaml gate.k=4 train.steps=200
    torchrun --nproc-per-node 2 launch/train.py --resume runs/tiny-20260102-030405

One process works without torchrun: ``python launch/train.py --config tiny``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the clone's packages come first, and launch/ itself is no import path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import os
import time
import traceback

from moe.errors import UserError

GRACE_S = 5.0
"""How long a rank stays silent when another one knows better what went wrong."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file or the name of a shipped recipe (tiny)")
    parser.add_argument("--resume", help="auto: the newest run of this name; or a run or checkpoint folder")
    parser.add_argument("--dry-run", action="store_true", help="print shapes, memory, FLOPs and bytes; stop")
    parser.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors that users can mend")
    parser.add_argument("overrides", nargs="*", metavar="path.to.option=value", help="changes to the config")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, program: tuple[str, ...] = ()) -> int:
    """Program entry. Exit codes: 0 done, 1 failed, 2 unusable options or data, 130 interrupted and saved.

    Args:
        program: how a user would call it with ``argv``, where that is not this file.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        from launch.assemble import train

        return train(args, [*(program or sys.argv[:1]), *(sys.argv[1:] if argv is None else argv)])
    except UserError as error:
        if args.debug:
            raise
        # Most such errors strike every rank alike; torchrun ends the others before they repeat what rank 0 said.
        time.sleep(0 if rank == 0 else GRACE_S)
        _print_error(rank, str(error))
        return error.exit_code
    except SystemExit:
        # Another rank has failed and is about to say why; torchrun would end it as soon as this one is gone.
        time.sleep(GRACE_S)
        raise
    except KeyboardInterrupt:
        _print_error(rank, "interrupted; the last checkpoint is untouched")
        return 130
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
            _print_error(rank, f"the ranks' meeting point {where} is in use: torchrun --master-port takes another one")
            return 1
        from parallel.topology import is_timeout, lost_a_peer

        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not (is_timeout(error) or lost_a_peer(error)):
            raise
        who = ", ".join(reversed(getattr(error, "__notes__", []))) or "nobody knows which"
        if is_timeout(error):
            _print_error(rank, f"another rank is late: {who} ({_first_line(error)})")
        else:
            time.sleep(GRACE_S)
            _print_error(rank, f"lost the connection: {who}; its own error says why ({_first_line(error)})")
        return 1


def _first_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:200]


def _print_error(rank: int, text: str) -> None:
    who = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{who}error: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
