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
from olmo.runtime.process import CAUSE_FILE, EXIT_PAUSED, LAUNCHED_ENV

# Of an OSError: what is not as it must be, and will not be at another start.
WRONG = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
USAGE = """\
usage: python -m olmo.train CONFIG [--key=value | --key value | --flag]…
       torchrun --nproc_per_node=N -m olmo.train CONFIG […]

Train an OLMo model as the YAML file CONFIG says. `--optimizer.learning_rate=3e-4` sets any key,
a bare `--save_overwrite` sets it to true.

exit codes: 0 finished · 75 paused by a signal or the time limit, the same command with
--try_load_latest_save goes on · 2 the config, data or checkpoint is not as it must be · 1 else
(under torchrun its own: 1 for all of them)
"""


def overrides(arguments: Sequence[str]) -> list[str]:
    """`--a.b=value` for each option; a value may also follow its key as the next word.

    As in OLMo's own script the dashes may be missing where there is a value: `a.b=value`.
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
    """torch's report as far as it helps, and what takes less memory."""
    return (
        f"{str(error).partition(' Of the allocated memory')[0]} Halve "
        "--device_train_microbatch_size, which changes the rounding only, or set "
        "--activation_checkpointing=one_in_two"
    )


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    rank = int(os.environ.get("RANK", 0))
    # Threads that wait for each other's share of an operation sleep instead of spinning: on a
    # machine that does other things too, spinning takes their time and ours. Read by OpenMP when
    # torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    who = f"rank {rank}: " if rank else ""
    if LAUNCHED_ENV in os.environ:  # torchrun ignores it then (see olmo.cluster.node), we do not
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import torch

    from olmo.config import TrainConfig
    from olmo.runtime.log import describe_error, log
    from olmo.runtime.urls import redact
    from olmo.train.loop import train
    from olmo.train.metrics_buffer import NotFinite
    from olmo.train.saver import FailedElsewhere

    def failed(error: object, repeats: bool = True, known: bool = True) -> None:
        """Say what ends this process, and leave it for the launcher: where nobody has, or where
        the first process, which checks things for all, knows it.

        `repeats`: whether another start would end in the same way.
        """
        log.error(f"{who}error: {error}")
        cause = Path(arguments[0]).with_name(CAUSE_FILE)
        if LAUNCHED_ENV in os.environ and ((known and not rank) or not cause.exists()):
            left = {"said": redact(f"{who}{error}").rstrip(". "), "repeats": repeats}
            with suppress(OSError):  # a disk that is full is full for this too
                sealed.write_atomic(cause, sealed.dumps(left))

    try:
        code = train(TrainConfig.load(arguments[0], overrides(arguments[1:])))
        return 0 if code == EXIT_PAUSED and LAUNCHED_ENV in os.environ else code
    except (ValueError, OSError) as error:
        wrong = isinstance(error, (ValueError, *WRONG))  # else a disk, or a network
        if isinstance(error, FailedElsewhere):
            log.error(f"{who}error: {error}")
        else:
            failed(describe_error(error), repeats=wrong)
        return 2
    except torch.OutOfMemoryError as error:
        failed(format_out_of_memory(error))
        return 2
    except NotFinite as error:
        if not rank:
            failed(error)
        return 1
    except Exception as error:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            raise
        # Another process is gone, most likely, and a thread of ours may wait for it: leave at once.
        traceback.print_exc()
        log.debug(traceback.format_exc())
        failed(f"{type(error).__name__}: {error}".partition("\n")[0], known=False)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
