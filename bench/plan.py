"""The cost of a plan of many files: CPU time and peak memory of a dry run and of a no-op.

    python bench/plan.py [--files 10000] [--shards-per-job 4]

A project of many small local files, with the real Snakefile. The dry run plans everything. For the
no-op one batch is run and its results are copied for every other batch: a listing, a link for each
shard, and snakemake's record of the job. Order and training then run. The toolkit's environment is
the repository's (`snakemake environments/dolma.json`).
"""

import base64
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from project import REPOSITORY, Project, documents, write_source

from olmo.bench.script import describe_run, parse_options, wait_for
from olmo.corpus.tokenizer import trained_tokenizer

FINAL = "checkpoints/small/final"


def main() -> None:
    options = parse_options(__doc__, files=10_000, shards_per_job=4)
    files, size = options.files, options.shards_per_job
    with tempfile.TemporaryDirectory() as folder:
        project = small_project(Path(folder) / "project", size)
        project.run("data/small/tokens/000.tsv")
        for number in range(size, files):  # hard links with names of their own
            os.link(source(project, number % size), source(project, number))
        print(describe_run(f"{files:,} files"))
        print_cost(project, "dry run", ["-n", FINAL], "Job stats")
        for batch in range(1, -(-files // size)):
            copy_results(project, batch, size)
        project.run(FINAL, timeout=3600)
        print_cost(project, "no-op", [FINAL], "Nothing to be done")


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


def copy_results(project: Project, batch: int, size: int) -> None:
    """The first batch's results, under the names of another batch."""
    data, records = project.root / "data/small", project.root / ".snakemake/metadata"

    def renamed(text: str) -> str:
        text = re.sub("part-([0-9]{5})", lambda m: f"part-{batch * size + int(m[1]):05d}", text)
        return re.sub(r"/000\.(tsv|log)", rf"/{batch:03d}.\1", text)

    for stage in ("sources", "documents", "tokens"):
        text = (data / stage / "000.tsv").read_text()
        for row in text.splitlines()[1:]:
            link = data / row.split("\t")[2]
            (data / renamed(str(link.relative_to(data)))).symlink_to(os.readlink(link))
        (data / stage / f"{batch:03d}.tsv").write_text(renamed(text))
        name = f"data/small/{stage}/000.tsv"
        record = (records / base64.b64encode(name.encode()).decode()).read_text()
        (records / base64.b64encode(renamed(name).encode()).decode()).write_text(renamed(record))


def print_cost(project: Project, what: str, words: list[str], expected: str) -> None:
    """Run snakemake to its end; print its CPU seconds, peak memory and wall seconds."""
    environment = {
        **os.environ,
        "OLMO_STORE": str(project.store),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    output = project.root / "output.txt"
    began = time.monotonic()
    with output.open("w") as file:
        command = [sys.executable, "-m", "snakemake", *words, "--cores", "2"]
        process = subprocess.Popen(
            command, cwd=project.root, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        usage = wait_for(process, output)
    wall, cpu = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    assert expected in (text := output.read_text()), text[-4000:]
    print(f"{what:8} {cpu:7.1f} CPU-s {usage.ru_maxrss / 1024:6.0f} MB {wall:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
