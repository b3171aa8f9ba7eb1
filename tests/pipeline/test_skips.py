"""Runs that leave something out, by the real Snakefile: the same bits as other ways to the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars
import pytest
import safetensors.torch
import torch
import yaml
from project import Outcome, Project

BATCH, LENGTH, STEPS = 8, 64, 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Project:
    """A run without links, which still has its checkpoints of steps 21 and 24, and 9 by chance."""
    project = Project(tmp_path_factory.mktemp("skips") / "project")
    project.use_given_tokenizer(tokenizer)
    project.change(
        "config/train/small.yaml",
        save_data_indices=True,
        save_num_unsharded_checkpoints_to_keep=-1,
    )
    project.run()
    return project


def fork(project: Project, name: str, **settings: object) -> Outcome:
    """Train a run like `small` that leaves something out."""
    run = {"train": "config/train/small.yaml", "dataset": "small", **settings}
    project.change("config/config.yaml", **{f"runs__{name}": run})
    return project.run(f"checkpoints/{name}/final")


def shards(project: Project) -> list[tuple[str, Path, Path]]:
    """Name, tokens and table of each token file, in the data set's order."""
    files: dict[str, dict[str, Path]] = {}
    for listing in sorted(project.root.glob("data/small/tokens/0*.tsv")):
        for row in (line.split("\t") for line in listing.read_text().splitlines()):
            if len(row) > 3 and row[1] in ("tokens", "index"):
                path = project.store / "objects" / row[3][:2] / row[3]
                files.setdefault(row[0], {})[row[1]] = path
    return [(name, found["tokens"], found["index"]) for name, found in files.items()]


def read_order(project: Project) -> np.ndarray:
    return np.fromfile(project.root / "checkpoints/small/global_indices.npy", "<u4")


def document_used_at(project: Project, step: int) -> str:
    """A document of one of a step's instances that is in no earlier step."""
    order, begin = read_order(project), 0
    for _, tokens, index in shards(project):
        count = tokens.stat().st_size // 2 // LENGTH
        for row in polars.read_parquet(index).iter_rows(named=True):
            last = min((row["end"] - 1) // LENGTH, count - 1)
            instances = begin + np.arange(row["start"] // LENGTH, last + 1)
            used = np.flatnonzero(np.isin(order, instances)) // BATCH + 1
            if len(used) and used.min() == step:
                return str(row["id"])
        begin += count
    raise AssertionError(f"no document begins at step {step}")


def train_alone(project: Project, folder: Path, **data: object) -> dict[str, torch.Tensor]:
    """The weights of the trainer alone, from scratch, with other data settings than `small`."""
    given = yaml.safe_load((project.final / "config.yaml").read_text())
    given["data"] |= data
    text = yaml.safe_dump(given).replace("${oc.env:OLMO_STORE,store}", str(project.store))
    folder.mkdir()
    (folder / "given.yaml").write_text(text)
    words = ["-m", "olmo.train", str(folder / "given.yaml"), f"--save_folder={folder / 'run'}"]
    subprocess.run([sys.executable, *words], env=project.environment(), check=True)
    found: dict[str, torch.Tensor] = torch.load(
        folder / f"run/step{STEPS}-unsharded/model.pt", weights_only=True
    )
    return found


def assert_equal(project: Project, name: str, expected: dict[str, torch.Tensor]) -> None:
    found = safetensors.torch.load_file(
        project.root / "checkpoints" / name / "final/model.safetensors"
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def write_masks(project: Project, folder: Path, dropped: str) -> list[str]:
    """OLMo's own label masks, a byte for each token: False in the document of this id."""
    folder.mkdir()
    paths = []
    for number, (_, tokens, index) in enumerate(shards(project)):
        mask = np.ones(tokens.stat().st_size // 2, bool)
        for row in polars.read_parquet(index).iter_rows(named=True):
            if row["id"] == dropped:
                mask[row["start"] : row["end"]] = False
        mask.tofile(folder / f"{number}.npy")
        paths.append(str(folder / f"{number}.npy"))
    return paths


def test_a_document_is_masked_from_its_first_step_on(trained: Project, tmp_path: Path):
    """As by OLMo's own masks, from scratch; the steps before are the run's own, taken over."""
    dropped = document_used_at(trained, 14)
    ran = fork(trained, "masked", skip_documents=[dropped], skip_after=12)
    assert ran.ran["training"] == 2 and ran.ran["skipped"] == 1
    assert "steps 1 to 12: taken over" in log_of(trained, "train/masked-step-12")
    masks = write_masks(trained, tmp_path / "masks", dropped)
    assert_equal(
        trained, "masked", train_alone(trained, tmp_path / "alone", label_mask_paths=masks)
    )
    assert weights(trained, "masked") != weights(trained, "small")


def test_seen_says_that_a_document_was_not_learned(trained: Project):
    dropped = document_used_at(trained, 14)
    fork(trained, "masked", skip_documents=[dropped], skip_after=12)
    said = trained.olmo("seen", "--run", "masked", "--id", dropped).output
    assert "step 14" in said and "read and not learned" in said
    assert "not learned" not in trained.olmo("seen", "--run", "small", "--id", dropped).output


def log_of(project: Project, name: str) -> str:
    return (project.root / f"logs/{name}.log").read_text()


def weights(project: Project, name: str) -> bytes:
    return (project.root / "checkpoints" / name / "final/model.safetensors").read_bytes()


def test_a_link_that_is_taken_over_has_the_bytes_of_a_trained_one(trained: Project, tmp_path: Path):
    fork(trained, "masked", skip_documents=[document_used_at(trained, 14)], skip_after=12)
    link = trained.root / "checkpoints/masked/step-12"
    taken = json.loads((link / "record.json").read_text())
    other = trained.copy(tmp_path / "project")
    shutil.rmtree(other.store / "work")
    for path in other.store.glob("actions/*/*.json"):
        if json.loads(path.read_text())["action"]["stage"] == "training":
            path.unlink()
    shutil.rmtree(other.root / "checkpoints/masked/step-12")
    other.run("checkpoints/masked/step-12")
    assert "taken over" not in log_of(other, "train/masked-step-12")
    again = json.loads((other.root / "checkpoints/masked/step-12/record.json").read_text())
    assert again["key"] == taken["key"] and again["content"] == taken["content"]


def test_steps_move_up(trained: Project, tmp_path: Path):
    """As by an order without them, made by hand."""
    ran = fork(trained, "without-steps", skip_steps=["10..11"])
    assert ran.ran["training"] == 2
    assert "steps 1 to 9: taken over" in log_of(trained, "train/without-steps-step-9")
    order = read_order(trained)
    kept = np.concatenate([order[: 9 * BATCH], order[11 * BATCH :]])
    kept.tofile(tmp_path / "order.npy")
    expected = train_alone(
        trained, tmp_path / "alone", order_path=str(tmp_path / "order.npy"), mixture=True
    )
    assert_equal(trained, "without-steps", expected)
    assert "skip.steps: none → ['10..11']" in trained.olmo("diff", "small", "without-steps").output


def test_a_source_by_the_next_instances(trained: Project, tmp_path: Path):
    """As on a data set without its file, by an order of the instances that remain."""
    fork(trained, "without-source", skip_sources=["part-1"], skip_by="next")
    counts = [tokens.stat().st_size // 2 // LENGTH for _, tokens, _ in shards(trained)]
    first, last = counts[0], counts[0] + counts[1]
    order = read_order(trained)
    kept = order[(order < first) | (order >= last)]
    renamed = np.where(kept < first, kept, kept - counts[1]).astype("<u4")
    renamed.tofile(tmp_path / "order.npy")
    paths = [str(tokens) for name, tokens, _ in shards(trained) if name != "part-1"]
    settings = {"paths": paths, "order_path": str(tmp_path / "order.npy")}
    expected = train_alone(trained, tmp_path / "alone", **settings, mixture=True)
    assert_equal(trained, "without-source", expected)


def test_fork_says_what_it_costs_and_adds_the_run(trained: Project):
    config = (trained.root / "config/config.yaml").read_text()
    dropped = document_used_at(trained, 17)
    said = trained.olmo("fork", "small", "--without", dropped)
    assert said.status == 0 and "first used at step 17" in said.output
    assert "steps shared: 15" in said.output
    assert "steps to train: 9 of 24 (38%)" in said.output
    assert (trained.root / "config/config.yaml").read_text() == config

    assert not trained.olmo("fork", "small", "--without", dropped, "--name", "forked").status
    settings = trained.read("config/config.yaml")["runs"]["forked"]
    assert settings["skip_documents"] == [dropped] and settings["skip_after"] == 15
    ran = trained.run("checkpoints/forked/final")
    assert "steps 1 to 15: taken over" in log_of(trained, "train/forked-step-15")
    record = json.loads((trained.root / "checkpoints/forked/final/record.json").read_text())
    diff = trained.olmo("diff", "small", "forked").output
    assert f"skip.documents: none → ['{dropped}']" in diff
    assert [s["after"] for s in record["facts"]["segments"]] == [15] and ran.status == 0


def test_a_run_on_other_data_is_not_forked(trained: Project, tmp_path: Path):
    project, dropped = trained.copy(tmp_path / "project"), document_used_at(trained, 17)
    project.change("config/data/small.yaml", documents={"heldout_share": 0.1})
    project.run("data/small/tokens/000.tsv", "data/small/tokens/001.tsv")
    said = project.olmo("fork", "small", "--without", dropped)
    assert said.status and "was trained on other token files than small has now" in said.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "--without", "no-such-document"], "expected ids of documents"),
        (["small", "--without", "source:part-9"], "the sources are part-0, part-1, part-2"),
        (["small", "--without", "20..30"], "expected steps up to 24, where small ends"),
        (["small", "--without", "steps:9..3"], "expected the earlier step first"),
        (["small", "--without"], "found nothing"),
        (["small", "--without", "part-1", "--by", "random"], "--by"),
        (["smal", "--without", "part-1"], "the nearest is 'small'"),
        (["small", "--without", "part-1", "--name", "small"], "expected a new name"),
        (["small", "--without", "part-1", "--name", "../a"], "--name"),
    ],
)
def test_what_cannot_be_forked_is_one_sentence(trained: Project, words: list[str], message: str):
    said = trained.olmo("fork", *words)
    assert said.status and message in said.output.strip().splitlines()[-1]
    assert "Traceback" not in said.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_documents": ["no-such"]}, "expected ids of documents"),
        ({"skip_sources": ["*"], "skip_by": "next"}, "expected instances for 24 steps, found 0"),
        ({"skip_sources": ["part-0"], "skip_after": 20}, "a step before 2, the first one"),
    ],
)
def test_bad_skips_are_one_sentence(trained: Project, settings: dict, message: str, tmp_path: Path):
    project = trained.copy(tmp_path / "project")
    run = {"train": "config/train/small.yaml", "dataset": "small", **settings}
    project.change("config/config.yaml", runs__bad=run)
    failed = project.run("checkpoints/bad/final", ok=False)
    assert failed.status and not failed.ran["training"] and message in failed.output
    assert "Traceback" not in failed.output
