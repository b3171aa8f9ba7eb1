"""The command line: a config, and `--a.b=value` for what is to be otherwise."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from olmo.io import sealed
from olmo.runtime.process import (
    CAUSE_FILE,
    EXIT_PAUSED,
    LAUNCHED_ENV,
    die_with_parent,
    has_launcher,
)

# The kinds of OSError that another start would raise again.
WRONG = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
USAGE = """\
usage: python -m olmo.train CONFIG [--key=value | --key value | --flag]…
       torchrun --nproc_per_node=N -m olmo.train CONFIG […]

Train an OLMo model as the YAML file CONFIG says. `--optimizer.learning_rate=3e-4` sets any key,
a bare `--save_overwrite` sets it to true.

exit codes: 0 finished · 75 paused by a signal or the time limit; the same command with
--try_load_latest_save continues · 2 the config, data or checkpoint is invalid · 1 any other error
(torchrun exits with 1 for all of them)
"""


def overrides(arguments: Sequence[str]) -> list[str]:
    """`--a.b=value` for each option; a value may also follow its key as the next word.

    As in OLMo's own script the dashes are optional if there is a value: `a.b=value`.
    """
    found: list[str] = []
    for word in arguments:
        if word.startswith("--") or re.match(r"-?[a-z_][\w.-]*=", word):
            found.append(word)
        elif found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            raise ValueError(f"expected --key=value, found '{word}'")
    return found


def format_out_of_memory(error: Exception) -> str:
    """The useful part of torch's report, and settings that need less memory."""
    return (
        f"{str(error).partition(' Of the allocated memory')[0]} Halve "
        "--device_train_microbatch_size, which changes the rounding only, or set "
        "--activation_checkpointing=one_in_two"
    )


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        print(f"{USAGE}error: expected CONFIG, found no arguments", file=sys.stderr)
        return 2
    if arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    rank = int(os.environ.get("RANK", 0))
    # Threads that wait for each other in an operation sleep instead of spinning: on a busy machine
    # spinning takes CPU time from other processes and from ours. OpenMP reads this when torch is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    who = f"rank {rank}: " if rank else ""
    if LAUNCHED_ENV in os.environ:  # olmo.cluster.node ignores SIGTERM; ranks do not
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if has_launcher():  # also where it ends while this one imports
        die_with_parent()
    import torch

    from olmo.config import TrainConfig
    from olmo.runtime.log import describe_error, find_disk_errno, log
    from olmo.runtime.urls import redact
    from olmo.train.loop import train
    from olmo.train.metrics_buffer import NotFinite
    from olmo.train.saver import FailedElsewhere

    def failed(error: object, repeats: bool = True, known: bool = True) -> None:
        """Log the error that ends this process, and write it to a file for the launcher.

        The file is written if it does not exist yet, or if rank 0, which checks inputs for all
        ranks, has a known error.

        Args:
            repeats: whether another start would fail in the same way.
            known: whether the message names the cause.
        """
        log.error(f"{who}error: {error}")
        cause = Path(arguments[0]).with_name(CAUSE_FILE)
        if LAUNCHED_ENV in os.environ and ((known and not rank) or not cause.exists()):
            left = {"said": redact(f"{who}{error}").rstrip(". "), "repeats": repeats}
            with suppress(OSError):  # the disk may be full
                sealed.write_atomic(cause, sealed.dumps(left))

    try:
        code = train(TrainConfig.load(arguments[0], overrides(arguments[1:])))
        return 0 if code == EXIT_PAUSED and LAUNCHED_ENV in os.environ else code
    except torch.OutOfMemoryError as error:
        failed(format_out_of_memory(error))
        return 2
    except NotFinite as error:
        if not rank:
            failed(error)
        return 1
    except FailedElsewhere as error:
        log.error(f"{who}error: {error}")
        return 2
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) or find_disk_errno(error):
            wrong = isinstance(error, (ValueError, *WRONG))  # not the disk's or network's failure
            failed(describe_error(error), repeats=wrong)
            return 2
        if not has_launcher():
            raise
        # Another process has probably exited, and a thread here may wait for it: exit at once.
        traceback.print_exc()
        log.debug(traceback.format_exc())
        failed(f"{type(error).__name__}: {error}".partition("\n")[0], known=False)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
