"""What a plan of many files costs: CPU time and peak memory of a dry run and of a no-op.

    python bench/plan.py [--files 10000] [--shards-per-job 4]

A project of so many small local files, by the real Snakefile. The dry run plans everything. For
the no-op one batch is run, and what it left is laid out as if every batch had run: a listing, a
link for each shard, and snakemake's own record of the job. Order and training then run. The
toolkit's environment is the repository's (`snakemake environments/dolma.json`).
"""

import argparse
import base64
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from project import REPOSITORY, Project, documents, write_source

from olmo.corpus.tokenizer import trained_tokenizer

FINAL = "checkpoints/small/final"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--shards-per-job", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = small_project(Path(folder) / "project", args.shards_per_job)
        project.run("data/small/tokens/000.tsv")
        for number in range(args.shards_per_job, args.files):  # links, each of a name of its own
            os.link(source(project, number % args.shards_per_job), source(project, number))
        print(f"{platform.machine()}, Python {platform.python_version()}, {args.files:,} files, ")
        tell("dry run", snakemake(project, "-n", FINAL), "Job stats")
        for batch in range(1, -(-args.files // args.shards_per_job)):
            lay_out(project, batch, args.shards_per_job)
        project.run(FINAL, timeout=3600)
        tell("no-op", snakemake(project, FINAL), "Nothing to be done")


def small_project(root: Path, shards_per_job: int) -> Project:
    project = Project(root)
    project.change("config/config.yaml", shards_per_job=shards_per_job)
    project.change("config/data/small.yaml", tokens={"engine": "fast", "audit_share": 0.0})
    for path in (root / "sources").iterdir():
        path.unlink()
    for number in range(shards_per_job):
        write_source(source(project, number), documents(number % 3, 40))
    trained_tokenizer.build(
        documents=[source(project, 0)],
        tokenizer=root / "trained.json",
        vocab_size=512,
    )
    project.use_given_tokenizer(root / "trained.json")
    return project


def source(project: Project, number: int) -> Path:
    return project.root / f"sources/part-{number:05d}.json.gz"


def lay_out(project: Project, batch: int, size: int) -> None:
    """What the first batch left, as another batch would have left it."""
    data, records = project.root / "data/small", project.root / ".snakemake/metadata"

    def here(text: str) -> str:
        text = re.sub("part-([0-9]{5})", lambda m: f"part-{batch * size + int(m[1]):05d}", text)
        return re.sub(r"/000\.(tsv|log)", rf"/{batch:03d}.\1", text)

    for stage in ("sources", "documents", "tokens"):
        text = (data / stage / "000.tsv").read_text()
        for row in text.splitlines()[1:]:
            link = data / row.split("\t")[2]
            (data / here(str(link.relative_to(data)))).symlink_to(os.readlink(link))
        (data / stage / f"{batch:03d}.tsv").write_text(here(text))
        name = f"data/small/{stage}/000.tsv"
        record = (records / base64.b64encode(name.encode()).decode()).read_text()
        (records / base64.b64encode(here(name).encode()).decode()).write_text(here(record))


def snakemake(project: Project, *words: str) -> tuple[str, float, float, float]:
    """Run it to its end: what it said, CPU seconds, peak MB, wall seconds."""
    environment = {
        **os.environ,
        "OLMO_STORE": str(project.store),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    output = project.root / "output.txt"
    began = time.monotonic()
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *words, "--cores", "2"],
            cwd=project.root,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    said = output.read_text()
    if process.returncode:
        sys.exit(said[-4000:])
    wall = time.monotonic() - began
    return said, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, wall


def tell(what: str, found: tuple[str, float, float, float], expected: str) -> None:
    said, cpu, memory, wall = found
    assert expected in said, said[-4000:]
    print(f"{what:8} {cpu:7.1f} CPU-s {memory:6.0f} MB {wall:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
