"""`olmo blame`: the search against brute force, and a run with planted documents."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from poisoned_run import DESCENT, LENGTH, plant, spread
from project import page_text
from small_run import SETTINGS, run

from olmo.config import TrainConfig
from olmo.inspect.blame import find_causes
from olmo.inspect.documents import Document, find_token_shards
from olmo.inspect.group_testing import find_guilty
from olmo.inspect.replay import LOSS, read_step_metrics
from olmo.inspect.run import TrainedRun
from olmo.inspect.window import Window
from olmo.report.blame_page import blame
from olmo.store.stage import current_store
from olmo.train.metrics_buffer import NotFinite


@pytest.mark.parametrize("seed", range(30))
def test_a_search_finds_what_brute_force_finds(seed: int) -> None:
    """Of monotone effects: a sum of what each does, or the largest of it."""
    rng = random.Random(seed)
    effects = [rng.random() * (rng.random() < 0.1) for _ in range(rng.randrange(1, 200))]
    scores = [rng.random() * 4 for _ in effects]
    combine = sum if seed % 2 else max
    steps = [list(range(at, min(at + 7, len(effects)))) for at in range(0, len(effects), 7)]

    def search(budget: int):
        return find_guilty(
            [steps, []],
            lambda group: combine(effects[one] for one in group),
            len,
            scores.__getitem__,
            threshold=0.2,
            suspicious=math.inf,
            budget=budget,
        )

    found = search(10**9)
    guilty = {one: effect for one, effect in enumerate(effects) if effect > 0.2}
    assert {k: v for k, v in found.effects.items() if v > 0.2} == guilty and found.is_complete
    assert search(found.spent).effects == found.effects
    short = search(found.spent - 1)
    assert short.spent < found.spent and not short.is_complete


def test_a_suspect_is_found_though_others_hide_its_effect() -> None:
    effects, scores = [0.0] * 40 + [0.5, -3.0], [0.0] * 40 + [9.0, 5.0]
    found = find_guilty(
        [[list(range(42))]],
        lambda group: sum(effects[one] for one in group),
        lambda group: 1,
        scores.__getitem__,
        threshold=0.1,
        suspicious=3.0,
        budget=20,
    )
    assert found.effects[40] == 0.5 and found.tests < 12


@pytest.mark.slow
def test_planted_documents_are_found_and_their_effect_is_that_of_label_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    last = 40
    plants = [(last, "random"), *spread(2, last, "repeated")]
    planted = plant(tmp_path, plants, last, 700, **DESCENT)
    opened = TrainedRun(str(planted.folder))
    found = find_causes(opened, last, last - 6, 300, tmp_path / "work")
    assert found.agreement == f"{last - 30} steps, equal to the bit to the record"
    causes = {cause.seen.document.id: cause for cause in found.causes}
    moved = [(c.seen.document.id, c.seen.step, c.effect) for c in found.causes[:8]]
    assert set(planted.ids) <= causes.keys(), moved
    assert found.causes[0].seen.document.id == "poison-0", moved
    assert found.searched <= 300

    # Each document that the window's earlier steps saw, left out alone.
    window = Window(opened, last - 6, last, planted.folder / "step30-unsharded", tmp_path / "all")
    window.train()
    earlier = [seen for seen in window.seen if seen.step < last]
    truth = {seen: window.losses[last] - window.loss_without([seen]) for seen in earlier}
    measured = {c.seen: c.effect for c in found.causes if c.seen.step < last}
    assert measured.items() <= truth.items()
    assert max(measured.values()) > max(truth.values()) / 2, (moved, max(truth.values()))

    # The same steps, really trained again, with OLMo's label masks.
    cause = causes["poison-1"]
    document = cause.seen.document
    cfg = TrainConfig.load(planted.folder / "config.yaml", validate_paths=False)
    (path,) = cfg.data.paths
    mask = np.ones(Path(path).stat().st_size // 2, bool)
    mask[document.start : document.end] = False
    mask.tofile(tmp_path / "mask.npy")
    again = {
        **cfg.asdict(),
        "save_folder": str(tmp_path / "masked"),
        "load_path": str(planted.folder / "step30-unsharded"),
        "reset_trainer_state": False,
        "reset_optimizer_state": False,
    }
    again["data"] = {**again["data"], "label_mask_paths": [str(tmp_path / "mask.npy")]}
    assert run(tmp_path, **again) == 0
    losses = [
        read_step_metrics(folder / "metrics.jsonl")[last][LOSS]
        for folder in (planted.folder, tmp_path / "masked")
    ]
    assert cause.effect == losses[0] - losses[1]

    capsys.readouterr()
    blame(str(planted.folder), step=last, from_=last - 2, budget=40, folder=tmp_path / "report")
    said = capsys.readouterr().out
    assert 'skip_documents: ["poison-' in said and "skip_steps: [" in said
    page = page_text(tmp_path / f"report/run-blame-{last}.html")
    assert "poison-0" in page and "Loss of each instance" in page and str(tmp_path) not in page
    blame(str(planted.folder), step=last, from_=last, folder=tmp_path / "report", json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["id"] == "poison-0" and rows[0]["step"] == last and rows[0]["text"]
    with pytest.raises(ValueError, match=f"expected a step from 1 to {last}, found 99"):
        blame(str(planted.folder), step=99)
    with pytest.raises(ValueError, match=f"--from: expected a step from 1 to {last}, found 99"):
        blame(str(planted.folder), step=last, from_=99)
    assert opened.sequence_length == LENGTH


@pytest.mark.slow
def test_the_document_that_made_a_step_nan_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint's embedding of a token is damaged, which one document of step 12 has."""
    monkeypatch.chdir(tmp_path)
    model = SETTINGS["model"] | {
        "max_sequence_length": LENGTH,
        "vocab_size": 512,
        "embedding_size": 512,
        "weight_tying": False,
    }
    planted = plant(tmp_path, [(12, "unseen")], 20, 400, model=model, max_duration=10)
    opened = TrainedRun(str(planted.folder))
    tokens = np.fromfile(opened.dataset.paths[0], np.uint16)
    (rare,) = (one for one in find_documents("poison-0"))
    damaged = tmp_path / "damaged/step10-unsharded"
    shutil.copytree(planted.folder / "step10-unsharded", damaged)
    (damaged / "manifest.json").unlink()
    weights = torch.load(damaged / "model.pt", weights_only=True)
    weights["transformer.wte.weight"][int(tokens[rare.start])] = math.inf
    torch.save(weights, damaged / "model.pt")
    again = {
        **TrainConfig.load(planted.folder / "config.yaml", validate_paths=False).asdict(),
        "save_folder": str(tmp_path / "broken"),
        "load_path": str(damaged),
        "reset_trainer_state": False,
        "reset_optimizer_state": False,
        "max_duration": 20,
    }
    with pytest.raises(NotFinite, match="step 12: the gradient is not finite"):
        run(tmp_path, **again)
    capsys.readouterr()
    blame(str(tmp_path / "broken"), step=12, json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["step"], row["effect"]) for row in rows] == [
        ("poison-0", 12, "Infinity")
    ]
    with pytest.raises(ValueError, match=r"step 8 was not trained here.* continues from step 10"):
        blame(str(tmp_path / "broken"), step=8)
    with pytest.raises(ValueError, match="expected a checkpoint before step 9"):
        blame(str(tmp_path / "broken"), step=12, from_=9)


def find_documents(name: str) -> list[Document]:
    shards = find_token_shards(current_store()).values()
    return [document for shard in shards for document in shard.documents(id=name)]
