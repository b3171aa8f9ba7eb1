"""The whole data half for as many sources as Dolma v1.6 has, each small: what a file costs.

    python bench/sources.py [--files 2419] [--shards-per-job 64] [--parts 4] [--cores 2]

A server on loopback has the files, under names as Dolma's; one in a hundred answers 503 twice
before it is sent. The recipe downloads them, drops exact duplicates, tokenizes with `fast` and
orders. Then one source changes, and what runs again is counted. Wall and CPU seconds are those of
snakemake and all its jobs; memory is the peak of the process that submits. The toolkit's
environment is the repository's (`snakemake environments/dolma.json`).
"""

import functools
import http.server
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from project import REPOSITORY, Project, documents, write_source
from servers import serving

from olmo.bench.script import describe_run, parse_options, wait_for
from olmo.corpus.tokenizer import trained_tokenizer

KINDS = ("c4", "cc_en_head", "cc_en_middle", "cc_en_tail", "pes2o", "reddit", "stack", "wiki")
TARGETS = ("data/small/statistics.txt", "checkpoints/small/global_indices.npy")
FAILURES = 2  # answers of 503 before a file is sent


def main() -> None:
    options = parse_options(__doc__, files=2419, shards_per_job=64, parts=4, cores=2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = make_sources(root / "served", options.files)
        failed: Counter[str] = Counter()
        with serving(functools.partial(Flaky, failed, directory=str(root / "served"))) as address:
            project = make_project(root, address, names, options)
            print(describe_run(f"{options.files:,} files"))
            run(project, "all", options.cores)
            print(f"{'':12} {len(failed)} sources failed {sum(failed.values())} times")
            change(root / "served" / names[len(names) // 2], project)
            run(project, "one changed", options.cores)
            run(project, "no-op", options.cores)


class Flaky(http.server.SimpleHTTPRequestHandler):
    """A folder's files; every hundredth is not available at first."""

    def __init__(self, failed: Counter[str], *args: object, **options: object) -> None:
        self.failed = failed
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        number = int(self.path.removesuffix(".json.gz").rpartition("-")[2])
        if number % 100 == 7 and self.failed[self.path] < FAILURES:
            self.failed[self.path] += 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def make_sources(folder: Path, files: int) -> list[str]:
    names = []
    for number in range(files):
        kind = KINDS[number * len(KINDS) // files]
        names.append(f"{kind}/{kind}-{number:04}.json.gz")
        lines = [{**line, "id": f"{number}-{line['id']}"} for line in documents(number % 3, 20)]
        lines[0]["text"] += f" {number}"
        (folder / names[-1]).parent.mkdir(parents=True, exist_ok=True)
        write_source(folder / names[-1], lines)
    return names


def make_project(root: Path, address: str, names: list[str], options: object) -> Project:
    project = Project(root / "project")
    table = ["url\tbytes\tsha256\tlicence", *(f"{address}/{name}\t\t\t" for name in names)]
    (project.root / "table.tsv").write_text("\n".join(table) + "\n")
    given = {"dedupe": {"exact": True, "parts": options.parts}}  # type: ignore[attr-defined]
    given |= {"sources": {"table": "table.tsv"}, "tokens": {"engine": "fast", "audit_share": 0.0}}
    project.change("config/data/small.yaml", documents={"heldout_share": 0.02}, **given)
    project.change(
        "config/config.yaml",
        shards_per_job=options.shards_per_job,  # type: ignore[attr-defined]
    )
    local = sorted((project.root / "sources").iterdir())
    trained_tokenizer.build(documents=local, tokenizer=root / "trained.json", vocab_size=512)
    project.use_given_tokenizer(root / "trained.json")
    return project


def change(source: Path, project: Project) -> None:
    """Another text in one source; the table forgets its digest, and the recipe its download."""
    write_source(source, [{**line, "id": f"new-{line['id']}"} for line in documents(1, 25)])
    table = project.root / "table.tsv"
    rows = table.read_text().splitlines()
    place = next(i for i, row in enumerate(rows) if source.name in row)
    url, _, _, *rest = rows[place].split("\t")
    size, digest = source.stat().st_size, subprocess.check_output(["sha256sum", source], text=True)
    rows[place] = "\t".join([url, str(size), digest.split()[0], *rest])
    table.write_text("\n".join(rows) + "\n")


def run(project: Project, name: str, cores: int) -> None:
    """Run snakemake; print what it cost, and how many actions each stage did."""
    before, start = count_actions(project), time.monotonic()
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), *TARGETS]
    output = project.root / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=project.root,
            env=project.environment() | {"PYTHONPATH": str(REPOSITORY)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        usage = wait_for(process, output)
    wall, cpu = time.monotonic() - start, usage.ru_utime + usage.ru_stime
    print(f"{name:12} {wall:7.0f} s {cpu:7.0f} CPU-s, {usage.ru_maxrss / 1e3:,.0f} MB", flush=True)
    ran = count_actions(project)
    ran.subtract(before)
    print(f"{'':12} {', '.join(f'{n:,} {stage}' for stage, n in ran.items() if n) or 'nothing'}")


def count_actions(project: Project) -> Counter[str]:
    paths = project.store.glob("actions/*/*.json")
    return Counter(json.loads(path.read_text())["action"]["stage"] for path in paths)


if __name__ == "__main__":
    os.environ.pop("OLMO_STORE", None)
    main()
