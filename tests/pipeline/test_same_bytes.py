"""The final digest is the same wherever, however and however often it is made."""

import subprocess
from collections import Counter
from pathlib import Path

from project import Project


def test_two_fresh_runs_on_one_and_two_cores(tmp_path: Path):
    contents = []
    for cores in (1, 2):
        project = Project(tmp_path / str(cores))
        project.run(cores=cores)
        contents.append(project.content())
    assert contents[0] == contents[1]


def test_either_engine_in_any_order_of_files_by_one_process_or_two(tmp_path: Path, tokenizer: Path):
    """A shard's bytes depend on its file alone; a data set's order is that of its recipe."""
    names = [f"sources/part-{number}.json.gz" for number in range(3)]
    ways = {"dolma": (1, names), "fast": (2, names[::-1])}
    found = {}
    for engine, (cores, files) in ways.items():
        project = Project(tmp_path / engine)
        project.use_given_tokenizer(tokenizer)
        project.change(
            "config/data/small.yaml", sources={"files": files}, tokens={"engine": engine}
        )
        project.run("checkpoints/small/global_indices.npy", cores=cores)
        listings = sorted((project.root / "data/small/tokens").glob("*.tsv"))
        lines = [line for path in listings for line in path.read_text().splitlines()[1:]]
        rows = [line.split("\t") for line in lines]
        order = [shard for shard, output, *_ in rows if output == "tokens"]
        assert order == [Path(file).name.split(".")[0] for file in files]
        found[engine] = sorted(rows)
    assert found["dolma"] == found["fast"] and len(rows) == 3 * 5


def test_two_folders_on_one_cold_store_run_each_action_once(tmp_path: Path):
    store = tmp_path / "store"
    projects = [Project(tmp_path / name, store=store) for name in ("here", "there")]
    started = [project.start("checkpoints/small/final", cores=1) for project in projects]
    ran: Counter[str] = Counter()
    for project, process in zip(projects, started, strict=True):
        try:
            assert process.wait(300) == 0, (project.root / "output.txt").read_text()[-4000:]
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        ran += project.outcome().ran
    assert ran == {
        "local_source": 3,
        "documents": 3,
        "trained_tokenizer": 1,
        "tokens": 6,
        "token_bytes": 3,
        "global_order": 1,
        "training": 1,
    }
    assert projects[0].content() == projects[1].content()


def test_a_run_of_another_name_is_found(project: Project):
    project.run()
    before = project.content()
    project.change("config/config.yaml", runs={"other": project_run(project)})
    again = project.run("checkpoints/other/final")
    assert not again.ran and again.found["training"] == 1
    assert (project.root / "checkpoints/other/final/config.yaml").exists()
    assert project.content() == before


def project_run(project: Project) -> dict:
    (project.root / "config/train/other.yaml").write_text(
        (project.root / "config/train/small.yaml").read_text() + "run_name: other\n"
    )
    return {"train": "config/train/other.yaml", "dataset": "small"}
