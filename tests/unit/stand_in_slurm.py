"""Stand-ins for SLURM's commands, by the name that this file is called by.

A job is over when it is submitted: it is a file in `jobs/` of this file's folder, with its state in
it, and made its output if that state is COMPLETED. A test writes what is to happen into `states`
(of the first jobs, one a line) and `silent` (how often squeue and sacct fail). What sbatch was
called with is in `submitted`, a call a line.
"""

import base64
import json
import os
import re
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).parent


def taken(name: str) -> str:
    """The first line of a file, which is taken out of it; none left: nothing."""
    path = HERE / name
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in lines[1:]))
    return lines[0] if lines else ""


def make(number: str) -> None:
    Path("out").mkdir(exist_ok=True)
    Path("out", number).touch()


def submit(words: list[str]) -> None:
    """Each task of a job (`rule:n=…` are snakemake's words) is done, or not, at once."""
    number = len((HERE / "submitted").read_text().splitlines()) + 1
    with (HERE / "submitted").open("a") as file:
        file.write(" ".join(words).replace("\n", " ") + "\n")
    calls = next(word for word in words if word.startswith("--wrap="))
    array = re.search(r"--array=(\d+)-(\d+)", " ".join(words))
    if not array:
        tasks = {str(number): calls}
    else:
        (rest,) = re.findall(r"--slurm-jobstep-array-execs='?([\w+/=]+)", calls)
        tasks = {
            f"{number}_{task}": zlib.decompress(bytes.fromhex(packed)).decode()
            for task, packed in json.loads(base64.b64decode(rest)).items()
        }
        tasks[f"{number}_{array[1]}"] = calls
    for task, call in tasks.items():
        state = taken("states") or "COMPLETED"
        if state == "COMPLETED":
            make(re.findall(r"one:n=(\d+)", call)[0])
        if state != "FORGOTTEN":
            (HERE / "jobs" / task).write_text(state)
    print(number)


name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if name == "sbatch":
    submit(words)
elif name in ("squeue", "sacct") and "--name" in words:
    if taken("silent"):
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    each = "--array" in words or "--format=JobID,State" in words
    for job in sorted((HERE / "jobs").iterdir()):
        number = job.name if each else job.name.replace("_", "_[") + "]" * ("_" in job.name)
        state = job.read_text()
        # Only sacct's books may call a job preempted that the controller has put back.
        if name == "squeue" and state == "PREEMPTED, PUT BACK":
            print(f"{number}|PENDING")
            job.write_text("COMPLETED")
            make("0")
        else:
            print(f"{number}|{state.partition(',')[0]}")
elif name == "scontrol":
    print((HERE / "config").read_text())
elif name == "sinfo":
    print("main*")
else:
    sys.exit(f"{name}: no such thing here")
