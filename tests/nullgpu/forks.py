"""Runs programs in forks of this process, which has imported what they import, half of their time.

A line of standard input is [program, request, output]; the answer is the exit code.
"""

import gc
import json
import os
import runpy
import sys
import traceback
from unittest.mock import patch

import torch

# A fork cannot use a GPU that its parent has asked for, if only whether there is one.
with patch("torch.cuda.is_available", lambda: True):
    import torch._inductor.compile_fx  # noqa: F401
    import triton.compiler  # noqa: F401

    import olmo.bench.cell
    import olmo.train.loop  # noqa: F401


def run(program: str, request: str, output: str) -> None:
    """Be `python PROGRAM REQUEST >OUTPUT`."""
    code = 1
    try:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        sys.argv = [program, request]
        runpy.run_path(program, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


gc.collect()
gc.freeze()  # else each collection in a fork would go through all of that
for line in sys.stdin:
    if not (pid := os.fork()):
        run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
