"""No process outlives its parent. Each test kills a real process and looks for its children."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmo.runtime.process import describe_exit, is_alive, supervised

SLEEPER = "import sys, time; print('up', flush=True); time.sleep(60)"
FAMILY = (
    "import subprocess, sys, time;"
    f"p = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], stdout=subprocess.PIPE);"
    "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
)


def gone(pid: int, within: float = 5) -> bool:
    """Whether a process has ended, or is a zombie that nobody has collected."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not is_alive(pid) or (
            stat.exists() and stat.read_text().rsplit(")")[1].split()[0] == "Z"
        ):
            return True
        time.sleep(0.05)
    return False


def test_the_group_ends_with_the_block():
    with supervised([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as process:
        grandchild = int(process.stdout.readline())
        assert is_alive(grandchild)
    assert gone(process.pid) and gone(grandchild)


def test_the_group_ends_when_its_owner_is_killed():
    owner = (
        "import subprocess, sys, time; from olmo.runtime.process import supervised\n"
        f"with supervised([sys.executable, '-c', {FAMILY!r}], stdout=subprocess.PIPE) as p:\n"
        "    print(p.pid, int(p.stdout.readline()), flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    child, grandchild = map(int, process.stdout.readline().split())
    assert is_alive(child) and is_alive(grandchild)
    process.kill()
    process.wait()
    assert gone(child) and gone(grandchild)


def test_a_stage_ends_with_its_snakemake():
    snakemake = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE)
    snakemake.stdout.readline()
    script = f"from olmo.runtime.process import die_with_supervisor as d; d(); {SLEEPER}"
    stage = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "OLMO_SUPERVISOR": str(snakemake.pid)},
    )
    stage.stdout.readline()
    snakemake.kill()
    snakemake.wait()
    assert stage.wait(5) == 137


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_rank_ends_with_its_launcher():
    rank = f"from olmo.runtime.process import die_with_parent as d; d(); {SLEEPER}"
    launcher = (
        "import subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert gone(pid)


def test_an_exit_in_words():
    assert describe_exit(2) == "exit status 2"
    assert describe_exit(-9) == "killed by SIGKILL"
