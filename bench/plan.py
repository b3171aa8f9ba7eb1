"""What a plan of many files costs: CPU time and peak memory of a dry run and of a no-op.

    python bench/plan.py [--files 10000] [--shards-per-job 4]

A project of so many small local files, by the real Snakefile. The dry run plans everything. For
the no-op, a few files are run, and what they made is laid out as if it were made of all: a listing
for each batch, a link for each shard; `snakemake --touch` writes snakemake's own records of it.
Order and training then run. The toolkit's environment is the repository's (`snakemake
environments/dolma.json`).
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from project import REPOSITORY, Project, documents, write_source

from olmo.data.tokenizer import trained_tokenizer

RUN_FILES = 4  # that are really made
FINAL = "checkpoints/small/final"
STATISTICS = "data/small/statistics.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--shards-per-job", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = small_project(Path(folder) / "project", args.shards_per_job)
        project.run("data/small/tokens/000.tsv")
        add_files(project, args.files)
        print(f"{platform.machine()}, Python {platform.python_version()}, {args.files:,} files, ")
        tell("dry run", snakemake(project, "-n", FINAL), "Job stats")
        lay_out(project, args.files, args.shards_per_job)
        # The journal of damage is older than anything that is made.
        snakemake(project, "--touch", STATISTICS)
        project.run(FINAL, timeout=3600)
        kept = sum(1 for _ in (project.root / ".snakemake/metadata").rglob("*"))
        assert kept > 3 * args.files / args.shards_per_job, f"only {kept} records of snakemake's"
        tell("no-op", snakemake(project, FINAL), "Nothing to be done")


def small_project(root: Path, shards_per_job: int) -> Project:
    project = Project(root)
    project.change("config/config.yaml", shards_per_job=shards_per_job)
    project.change("config/data/small.yaml", tokens={"engine": "fast", "audit_share": 0.0})
    for source in (root / "sources").iterdir():
        source.unlink()
    for number in range(RUN_FILES):
        write_source(root / f"sources/part-{number:05d}.json.gz", documents(number % 3, 40))
    trained_tokenizer.build(
        documents=[root / "sources/part-00000.json.gz"],
        tokenizer=root / "trained.json",
        vocab_size=512,
    )
    project.use_given_tokenizer(root / "trained.json")
    return project


def add_files(project: Project, count: int) -> None:
    """The other sources: links to those that were made, each under a name of its own."""
    folder = project.root / "sources"
    for number in range(RUN_FILES, count):
        first = folder / f"part-{number % RUN_FILES:05d}.json.gz"
        os.link(first, folder / f"part-{number:05d}.json.gz")


def lay_out(project: Project, count: int, shards_per_job: int) -> None:
    """Listings and links of all files, from those of the first ones."""
    data = project.root / "data/small"
    for stage in ("sources", "documents", "tokens"):
        header, *rows = (data / stage / "000.tsv").read_text().splitlines(keepends=True)
        made: dict[int, list[str]] = {number: [] for number in range(RUN_FILES)}
        for row in rows:
            made[int(row.split("\t")[0].removeprefix("part-"))].append(row)
        for first in range(0, count, shards_per_job):
            lines = [header]
            for number in range(first, min(first + shards_per_job, count)):
                old, new = f"part-{number % RUN_FILES:05d}", f"part-{number:05d}"
                for row in made[number % RUN_FILES]:
                    name = row.split("\t")[2]
                    link = data / name.replace(old, new)
                    if not link.is_symlink():
                        link.symlink_to(os.readlink(data / name))
                    lines.append(row.replace(old, new))
            (data / stage / f"{first // shards_per_job:03d}.tsv").write_text("".join(lines))


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
