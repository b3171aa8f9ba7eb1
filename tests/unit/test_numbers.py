"""Numbers at the edge: a diverged run is measured, told and read again."""

import doctest
import json
import math
from pathlib import Path

import polars
import pytest
import torch
from small_run import run, settings
from test_huggingface import OLMO2, checkpoint

from olmo.checkpoint.read import load_checkpoint
from olmo.eval.choices import compute_score
from olmo.eval.tasks import Request
from olmo.pipeline.convert import convert
from olmo.pipeline.evaluate import evaluation, heldout_perplexity
from olmo.pipeline.train import heldout_losses
from olmo.report.card import _evaluation
from olmo.report.compare import draw_curves, find_tokens_to_loss
from olmo.report.loss import plot_losses
from olmo.report.scores import compute_bits_per_byte, read_results, scores
from olmo.report.series import collect_series
from olmo.runtime import numbers
from olmo.runtime.numbers import encode_non_finite, from_json, perplexity, to_json
from olmo.store.stage import current_store

DIVERGED = {"init_fn": "normal", "init_std": 300.0}  # a loss of some 3,000 nats


def strictly(text: str) -> None:
    """Each line read by a reader that knows JSON alone."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for line in text.splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_number_that_json_has_no_word_for_comes_back():
    assert doctest.testmod(numbers).failed == 0
    assert perplexity(math.inf) == math.inf and math.isnan(perplexity(math.nan))
    assert perplexity(709.0) == math.exp(709) and perplexity(-1e9) == 0.0
    row = {"a": math.inf, "b": -math.inf, "c": [1.5, 'NaN Infinity\\"', {"d": math.inf}], "": None}
    strictly(to_json(row))
    assert from_json(to_json(row, indent=1)) == row
    assert math.isnan(from_json(to_json({"a": math.nan}))["a"])
    assert to_json({"a": 1.5}) == json.dumps({"a": 1.5})


def test_a_diverged_run_is_evaluated_and_its_metrics_are_json(tmp_path: Path):
    assert run(tmp_path, model=DIVERGED, optimizer={"learning_rate": 1e-6}, max_duration=2) == 0
    text = (tmp_path / "run/metrics.jsonl").read_text()
    strictly(text)
    rows = [from_json(line) for line in text.splitlines()]
    assert rows[0]["eval/heldout/Perplexity"] == rows[1]["train/Perplexity"] == math.inf
    assert rows[0]["eval/heldout/CrossEntropyLoss"] > 1000
    assert heldout_losses(rows)["heldout"]["last"] > 1000
    rows[1]["train/CrossEntropyLoss"], rows[0]["eval/heldout/CrossEntropyLoss"] = math.inf, math.nan
    plot_losses(collect_series(rows), tmp_path / "loss.svg", "a run")
    assert "<svg" in (tmp_path / "loss.svg").read_text()
    assert "| heldout | nan |" in _evaluation(encode_non_finite(heldout_losses(rows)), "run")


def test_a_setting_without_a_limit_stays_one(tmp_path: Path):
    unlimited = {"max_grad_norm": math.inf, "evaluators": []}
    assert run(tmp_path, max_duration=4, **unlimited) == 0
    convert(tmp_path / "run/step4-unsharded", tmp_path / "out", kind="safetensors")
    text = (tmp_path / "out/train.json").read_text()
    strictly(text.replace("\n", " "))
    assert json.loads(text)["optimizer"][0]["max_grad_norm"] == "Infinity"
    found = load_checkpoint(tmp_path / "out").optim
    assert found is not None
    _, groups = found
    assert groups[0]["max_grad_norm"] == math.inf


def test_a_diverged_checkpoint_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    checkpoint(tmp_path / "final", OLMO2)
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "final/model.safetensors")
    save_file({k: v * 3000 for k, v in weights.items()}, tmp_path / "final/model.safetensors")
    settings(tmp_path)
    found, final = tmp_path / "heldout.json", tmp_path / "final"
    files = {"model": final / "model.safetensors", "config": final / "config.yaml"}
    heldout = [tmp_path / "heldout.npy"]
    heldout_perplexity(**files, heldout=heldout, results=found, checkpoint=final)
    strictly(found.read_text().replace("\n", " "))
    assert from_json(found.read_text())["Perplexity"] == math.inf
    record = next(current_store().records())
    assert record["facts"]["Perplexity"] == "Infinity"
    runs = [tmp_path / "eval" / name for name in ("diverged", "again")]
    for folder in runs:
        evaluation(heldout=found, scores=[], questions=[], requests=[], results=folder)
    (row,) = [r for r in read_results(tmp_path / "eval/diverged") if r["metric"] == "perplexity"]
    assert row["value"] == math.inf
    scores(runs, tmp_path / "table.md", tmp_path / "all.parquet")
    assert "inf" in (tmp_path / "table.md").read_text()
    assert math.inf in polars.read_parquet(tmp_path / "all.parquet")["value"].to_list()


def test_a_model_that_computes_nan_has_no_accuracy():
    asked = [Request(n // 2, n % 2, "c", " o", "", 0) for n in range(4)]
    found = compute_score("acc", asked, torch.tensor([-1.0, -2.0, math.nan, math.nan]))
    assert math.isnan(found.value) and found.documents == 2
    assert compute_score("acc", asked, torch.tensor([-1.0, -2.0, -3.0, -math.inf])).value == 1.0


def test_reports_of_runs_that_diverged(tmp_path: Path):
    for before in (math.inf, math.nan):
        assert find_tokens_to_loss(2.5, [(0, before), (5, 2.0)]) == 5.0
    assert find_tokens_to_loss(2.5, [(0, 3.5), (5, math.nan), (9, 2.5)]) == 9.0
    assert find_tokens_to_loss(2.5, [(0, 3.5), (6, 2.0)]) == 4.0
    assert compute_bits_per_byte([math.inf, 1.0], [5, 5]) == (math.inf, None)
    draw_curves({"a": [(0, math.nan), (5, math.inf)], "b": [(0, 3.0)]}, tmp_path / "picture.svg")
