"""Runs that leave something out, by the real Snakefile: the same bits as other ways to the same."""

import json
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


def log_of(project: Project, name: str) -> str:
    return (project.root / f"logs/{name}.log").read_text()


def weights(project: Project, name: str) -> bytes:
    return (project.root / "checkpoints" / name / "final/model.safetensors").read_bytes()


def test_a_link_that_is_taken_over_has_the_bytes_of_a_trained_one(trained: Project, tmp_path: Path):
    fork(trained, "masked", skip_documents=[document_used_at(trained, 14)], skip_after=12)
    other = trained.copy(tmp_path / "project")
    for folder in other.store.glob("work/*/attempt"):
        for checkpoint in folder.glob("step*"):
            subprocess.run(["rm", "-r", str(checkpoint)], check=True)
    link = (other.root / "checkpoints/masked/step-12").resolve()
    before = json.loads((link / "record.json").read_text())
    subprocess.run(["rm", "-r", str(link)], check=True)


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
