"""torchrun without its traceback, which would bury what the trainer said.

python -m olmo.cluster.torchrun <torchrun's words>
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from olmo.runtime.process import describe_exit


def main() -> None:
    """Run torchrun; where processes failed, one line tells which was the first, and how."""
    try:
        torchrun()
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        sys.exit(
            f"torchrun: of the processes rank {rank} failed first, {describe_exit(first.exitcode)}"
        )


if __name__ == "__main__":
    main()
