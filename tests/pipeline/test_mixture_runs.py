"""A run with a mixture and a curriculum, by the real Snakefile: shares, links, what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from project import Project, page_text

from olmo.inspect.run import TrainedRun

CURRICULUM = [
    {"weights": ["part-0=6", "*=4"]},
    {"from_step": 12, "weights": ["part-2=1", "*=3"]},
]
BATCH = 8


def set_mixture(project: Project, parts: list[dict], **others: object) -> None:
    run = {"train": "config/train/small.yaml", "dataset": "small", "mixture": parts, **others}
    project.change("config/config.yaml", runs__small=run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Project:
    """The run in links, the first of which ends where the second part of its mixture begins."""
    project = Project(tmp_path_factory.mktemp("mixture") / "project")
    project.use_given_tokenizer(tokenizer)
    project.change("config/train/small.yaml", save_data_indices=True)
    set_mixture(project, CURRICULUM)
    first = project.run()
    assert first.ran["mixture_order"] == first.ran["training"] == 2
    return project


def read_shards(project: Project) -> list[tuple[str, int]]:
    """The name of each token file of the final config, and its instances, in order."""
    rows = [
        row.split("\t")
        for listing in sorted(project.root.glob("data/small/tokens/0*.tsv"))
        for row in listing.read_text().splitlines()
    ]
    return [(row[0], int(row[4]) // 2 // 64) for row in rows if len(row) > 4 and row[1] == "tokens"]


def shares_of_steps(project: Project, first: int, last: int) -> dict[str, float]:
    """The share of each source in the instances that the trainer says it took."""
    shards = read_shards(project)
    ends = np.cumsum([count for _, count in shards])
    taken: list[int] = []
    for step in range(first, last + 1):
        batch, _ = open_run(project).batch(step)
        taken += batch.tolist()
    files = np.searchsorted(ends, taken, side="right")
    return {name: float((files == i).mean()) for i, (name, _) in enumerate(shards)}


def open_run(project: Project, name: str = "small") -> TrainedRun:
    return TrainedRun(str(project.root / "checkpoints" / name / "final"))


def order_record(project: Project, name: str) -> dict:
    digest = (project.root / "checkpoints/small" / name).resolve().name
    for path in project.store.glob("actions/*/*.json"):
        record: dict = json.loads(path.read_text())
        if digest in [file.get("sha256") for file in record["outputs"].values()]:
            return record
    raise AssertionError(f"no record of {name}")


def test_what_was_trained_has_the_shares(trained: Project, monkeypatch: pytest.MonkeyPatch):
    """By the batches of the run itself, up to the half of an instance."""
    monkeypatch.setenv("OLMO_STORE", str(trained.store))
    first, second = shares_of_steps(trained, 1, 12), shares_of_steps(trained, 13, 24)
    assert first["part-0"] == pytest.approx(0.6, abs=0.5 / 96)
    assert second["part-2"] == pytest.approx(0.25, abs=0.5 / 96)


def test_the_record_has_the_shares(trained: Project):
    record = order_record(trained, "global_indices.npy")
    assert record["action"]["stage"] == "mixture_order"
    rows = record["facts"]["mixture"]
    assert [row["weight"] for row in rows] == ["part-2=1", "*=3"]
    assert [row["expected"] for row in rows] == [0.25, 0.75] == [row["realised"] for row in rows]
    assert record["facts"]["instances"] == 24 * BATCH
    assert "60.42% of the tokens (60.00% expected)" in read_log(trained, "order/small-until-12")


def test_the_page_and_diff_show_the_shares(trained: Project):
    assert trained.olmo("report", "small").status == 0
    text = page_text(trained.root / "report/small.html")
    table = text[text.index('id="mixture"') :]
    assert "part-0" in table and "60.00 %" in table and "60.42 %" in table and "25.00 %" in table
    diff = trained.olmo("diff", "checkpoints/small/step-12", "small").output
    assert "mixture.from step 12" in diff


def read_log(project: Project, name: str) -> str:
    return (project.root / f"logs/{name}.log").read_text()


def test_inspect_and_seen_know_earlier_parts(trained: Project, monkeypatch: pytest.MonkeyPatch):
    """Derived from the orders, not from the indices that the trainer wrote."""
    monkeypatch.setenv("OLMO_STORE", str(trained.store))
    run = open_run(trained)
    order = np.fromfile(trained.root / "checkpoints/small/global_indices.npy", "<u4")
    for step in (1, 12, 13, 24):
        assert run.batch(step)[0].tolist() == order[(step - 1) * 8 : step * 8].tolist()
    wanted = order[:1]
    found = [step for step, _, _ in run.find_instances(wanted)]
    assert found == (np.flatnonzero(order == wanted) // BATCH + 1).tolist()
    positions = trained.run("checkpoints/small/positions.npy", ok=False)
    assert positions.status and "each instance once, found a mixture's" in positions.output


def test_a_later_part_trains_only_its_own_link(trained: Project):
    before = (trained.root / "checkpoints/small/step-12").resolve(), trained.content()
    set_mixture(trained, [CURRICULUM[0], {**CURRICULUM[1], "temperature": 2.0}])
    changed = trained.run()
    assert changed.ran["training"] == 1 == changed.ran["mixture_order"]
    assert trained.content() != before[1]
    set_mixture(trained, CURRICULUM)
    assert not trained.run().ran["training"] and trained.content() == before[1]


def test_uncut_the_weights_are_the_same(trained: Project, tmp_path: Path):
    """By the trainer alone, on the whole order, without a stop where the parts meet."""
    given = yaml.safe_load((trained.final / "config.yaml").read_text())
    store = str(trained.store)
    text = yaml.safe_dump(given).replace("${oc.env:OLMO_STORE,store}", store)
    (tmp_path / "given.yaml").write_text(text)
    words = ["-m", "olmo.train", str(tmp_path / "given.yaml"), f"--save_folder={tmp_path / 'run'}"]
    subprocess.run([sys.executable, *words], env=trained.environment(), check=True)
    ours = safetensors.torch.load_file(trained.final / "model.safetensors")
    uncut = torch.load(tmp_path / "run/step24-unsharded/model.pt", weights_only=True)
    assert uncut.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in uncut.items())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"weights": ["part-0=1"]}], "found none for part-1; add *=1, or *=0"),
        ([{"weights": ["*=1"]}, {"from_step": 24, "weights": ["*=1"]}], "rising steps below 24"),
    ],
)
def test_bad_mixtures_fail_before_anything_runs(
    trained: Project, parts: list[dict], message: str, tmp_path: Path
):
    project = trained.copy(tmp_path / "project")
    set_mixture(project, parts)
    failed = project.run(ok=False)
    assert failed.status and not failed.ran and message in failed.output
    last = failed.output.strip().splitlines()[-1]
    assert "mixture" in last and "Traceback" not in failed.output
