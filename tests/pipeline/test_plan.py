"""`olmo plan` names what then runs, and nothing else: each scenario is planned, then run."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Outcome, Project, documents, write_source

# The end of a place in a plan → the stage that makes it.
STAGES = {
    "sources": "local_source",
    "documents": "documents",
    "tokenizer.json": "local_tokenizer",
    "tokens": "tokens",
    "global_indices.npy": "global_order",
    "final": "training",
    "small": "huggingface_export",
    "heldout.json": "heldout_perplexity",
}
# Stages that the command of another one calls, too.
BESIDE = {"token_bytes": "tokens", "document_losses": "heldout_perplexity"}
TARGET = "checkpoints/small/final"


def planned(project: Project, *targets: str) -> Counter[str]:
    """How many calls of each stage a plan names."""
    said = project.olmo("plan", *(targets or (TARGET,)))
    assert said.status == 0, said.output
    rows = re.findall(r"^  (\S+) +(?:(\d+) of )?(\d+) +\S+( \w+)? ", said.output, re.M)
    places = {place: int(some or all_) for place, some, all_, _ in rows}
    places.pop("environments/dolma.json", None)  # beside the repository's own
    return Counter({STAGES[Path(place).name]: count for place, count in places.items()})


def lose_a_token_file(project: Project) -> None:
    (project.root / "data/small/tokens/part-0.npy").resolve().unlink()


def add_a_source(project: Project) -> None:
    write_source(project.root / "sources/part-3.json.gz", documents(0)[:50])


def add_a_run(project: Project) -> None:
    same = {"train": "config/train/small.yaml", "dataset": "small"}
    runs = {"small": same, "other": same | {"overrides": ["seed=7"]}}
    project.change("config/config.yaml", runs=runs)


def remove_names(project: Project) -> None:
    for folder in ("data", "checkpoints"):
        (project.root / folder).rename(project.root / f"old-{folder}")


def comment(project: Project) -> None:
    recipe = project.root / "config/data/small.yaml"
    recipe.write_text("# a comment\n" + recipe.read_text())


def train_differently(project: Project) -> None:
    project.change("config/train/small.yaml", optimizer__learning_rate=2e-3)


def train_as_before(project: Project) -> None:
    project.change("config/train/small.yaml", optimizer__learning_rate=3e-3)


def keep_fewer(project: Project) -> None:
    project.change("config/data/small.yaml", documents__keep_one_in=3)


def nothing(project: Project) -> None:
    pass


# In this order, each on what the ones before left: a change, the targets, the stages that run.
SCENARIOS: list[tuple[Callable[[Project], None], tuple[str, ...], set[str]]] = [
    (nothing, (TARGET,), set(STAGES.values()) - {"huggingface_export", "heldout_perplexity"}),
    (lose_a_token_file, (TARGET,), {"tokens"}),
    (train_differently, (TARGET,), {"training"}),
    (nothing, (TARGET,), set()),
    (train_as_before, (TARGET,), set()),
    (remove_names, (TARGET,), set()),
    (
        nothing,
        ("hf/small", "checkpoints/small/heldout.json"),
        {STAGES["small"], STAGES["heldout.json"]},
    ),
    (add_a_source, (TARGET,), {"local_source", "documents", "tokens", "global_order", "training"}),
    (add_a_run, ("checkpoints/other/final",), {"global_order", "training"}),
    (keep_fewer, (TARGET,), {"documents", "tokens", "global_order", "training"}),
    (comment, (TARGET,), set()),
]


@pytest.mark.parametrize("count", [3, pytest.param(len(SCENARIOS), marks=pytest.mark.long)])
def test_a_plan_names_what_runs(count: int, tmp_path: Path, tokenizer: Path):
    project = Project(tmp_path / "project")
    project.use_given_tokenizer(tokenizer)
    for change, targets, stages in SCENARIOS[:count]:
        change(project)
        plan = planned(project, *targets)
        assert plan.keys() == stages, change.__name__
        found: Outcome = project.run(*targets)
        ran = Counter[str]()
        for stage, count_of in found.ran.items():
            ran[BESIDE.get(stage, stage)] += count_of
        assert plan == ran, change.__name__


def test_a_plan_writes_nothing_and_says_why(tmp_path: Path, tokenizer: Path):
    project = Project(tmp_path / "project")
    project.use_given_tokenizer(tokenizer)
    project.run()
    keep_fewer(project)
    record = next((project.store / "actions").glob("??/*.json"))
    record.chmod(0o644)
    record.write_bytes(record.read_bytes().replace(b"sha256", b"sha257", 1))  # damaged

    def files() -> dict[str, int]:
        found = [*project.store.rglob("*"), *(project.root / "data").rglob("*")]
        return {str(path): path.lstat().st_mtime_ns for path in found}

    before = files()
    plan = project.olmo("plan", TARGET)
    dry = project.run("-n", TARGET)
    assert files() == before
    assert "keep_one_in: 2 → 3" in plan.output and "keep_one_in: 2 → 3" in dry.output
    assert re.search(r"^time: about \S+ \w+ \(.* to .*\) on \d+ cores$", plan.output, re.M)
    assert not re.search("[0-9a-f]{12}", plan.output)
