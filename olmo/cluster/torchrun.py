"""torchrun without its traceback, which would hide the trainer's own error.

python -m olmo.cluster.torchrun <torchrun's options>
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from olmo.runtime.process import describe_exit


def main() -> None:
    """Run torchrun; if processes fail, print one line: which failed first, and how."""
    try:
        torchrun()
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        sys.exit(f"torchrun: rank {rank} failed first, {describe_exit(first.exitcode)}")


if __name__ == "__main__":
    main()
