"""What pages are made of: curves, lineage, texts that anyone may see; and a run without records."""

import base64
import dataclasses
import gzip
import json
import math
import os
import re
import struct
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import until
from small_run import run

from olmo.config import TrainConfig
from olmo.report.charts import choose_charts, curve_specs
from olmo.report.graph import build_graph
from olmo.report.html import content_policy, hide_paths
from olmo.report.loss import redrawing
from olmo.report.pages import report
from olmo.report.run_page import format_page
from olmo.report.runs import TAIL_BYTES, RunState, last_metrics
from olmo.report.samples import choose_prompts, read_samples, sample_checkpoints
from olmo.report.scores import read_results
from olmo.report.series import (
    LOSS,
    MetricsFollower,
    Series,
    find_metrics,
    pack,
    read_series,
    smooth,
    thin,
)
from olmo.report.watch import frame, plots, watch
from olmo.store.action import Action
from olmo.store.lineage import ancestors, find_parents, records_by_content
from olmo.store.record import Record, content
from olmo.store.stage import current_store
from olmo.store.store import Store
from olmo.train.sinks import METRICS, parse_row


def unpacked(series: Series) -> list[float]:
    packed = pack(series)
    code = {"f4": "f", "f8": "d"}[packed["type"]]
    data = base64.b64decode(packed["values"])
    return list(struct.unpack(f"<{len(series.values)}{code}", data))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([8.294055938720703, 0.5], "f4"),
        ([0.00058, 0.1], "f8"),
        ([1e300, 1.0], "f8"),
        ([math.inf, -math.inf, 2.0], "f4"),
        ([], "f4"),
    ],
)
def test_values_are_packed_exactly(values: list[float], kind: str) -> None:
    series = Series("x", list(range(1, len(values) + 1)), values)
    assert pack(series)["type"] == kind and unpacked(series) == values


def test_steps_with_gaps_are_packed() -> None:
    packed = pack(Series("x", [0, 40, 80], [1.0, math.nan, 2.0]))
    assert struct.unpack("<3i", base64.b64decode(packed["steps"])) == (0, 40, 80)
    assert pack(Series("x", [5, 6, 7], [1.0, 2.0, 3.0]))["steps"] == 5


def test_thinning_loses_no_peak() -> None:
    values = [math.sin(i / 50) for i in range(10_000)]
    values[1234], values[7777], values[5000] = 9.0, -9.0, math.nan
    series = Series("x", list(range(10_000)), values)
    thinned = thin(series, 100)
    assert len(thinned.steps) <= 202 and {1234, 7777, 0, 9999} <= set(thinned.steps)
    assert all(
        values[step] is value for step, value in zip(thinned.steps, thinned.values, strict=True)
    )
    assert thin(series, 5000) is series


def test_smoothing_has_no_bias_and_skips_nan() -> None:
    assert smooth([4.0, 4.0, math.nan, 4.0]) == pytest.approx([4.0] * 4)
    assert smooth([1.0, 0.0])[1] == pytest.approx(0.9 / 1.9)


def write(path: Path, steps: range, loss: float, more: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"step": step, LOSS: loss}) + "\n" for step in steps)
    draft = path.with_suffix(".draft")
    draft.write_text(rows + more)
    draft.replace(path)


def test_a_follower_takes_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "run/metrics.jsonl"
    follower = MetricsFollower(partial(find_metrics, tmp_path))
    assert not follower.update() and follower.series == {}
    write(path, range(1, 51), 5.0, more='{"step": 51, "train/Cro')  # being written
    assert follower.update() and follower.series[LOSS].steps == list(range(1, 51))
    assert not follower.update()
    with path.open("a") as file:
        file.write('ssEntropyLoss": 5.0}\n')
    assert follower.update() and follower.series[LOSS].steps[-1] == 51
    write(path, range(1, 41), 5.0)  # cut back to a checkpoint
    assert follower.update() and follower.series[LOSS].steps == list(range(1, 41))
    write(path, range(1, 91), 3.0)  # and again, by now longer than what was read
    assert follower.update() and follower.series[LOSS].values == [3.0] * 90
    write(path, range(1, 41), 5.0)
    follower.update()
    with path.open("a") as file:
        file.write(json.dumps({"step": 41, LOSS: 4.0}) + "\n")
        file.write(json.dumps({"step": 41, "eval/heldout/CrossEntropyLoss": 4.5}) + "\n")
    follower.update()
    found = follower.series
    assert (found[LOSS].steps[-1], found[LOSS].values[-1]) == (41, 4.0)
    assert found["eval/heldout/CrossEntropyLoss"].steps == [41]
    assert read_series(find_metrics(tmp_path))[LOSS].steps == list(range(1, 42))


def test_a_step_is_put_in_its_place() -> None:
    series = Series("x", [], [])
    for step, value in ((2, 1.0), (5, 2.0), (2, 3.0), (3, 4.0), (5, 5.0), (6, 6.0), (1, 7.0)):
        series.put(step, value)
    assert series.steps == [1, 2, 3, 5, 6] and series.values == [7.0, 3.0, 4.0, 5.0, 6.0]


def test_the_loss_is_drawn_while_a_run_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("olmo.report.loss.REDRAW_S", 0.05)
    metrics, picture = tmp_path / METRICS, tmp_path / "loss.svg"
    with redrawing(tmp_path, "my run"):
        time.sleep(0.2)
        assert not picture.exists(), "nothing is trained yet"
        write(metrics, range(1, 20), 5.0)
        until(lambda: picture.exists() and "</svg>" in picture.read_text(), 60)
        first = picture.read_text()
        assert ">my run<" in first
        with metrics.open("a") as file:
            file.write(json.dumps({"step": 20, LOSS: 3.0}) + "\n")
        until(lambda: picture.read_text() not in (first, "") and picture.stat().st_size > 0, 60)
        picture.unlink()
        picture.mkdir()  # it cannot be drawn any more
        with metrics.open("a") as file:
            file.write(json.dumps({"step": 21, LOSS: 2.0}) + "\n")
        until(lambda: "loss.svg is not drawn" in caplog.text, 60)


def test_two_runs_with_the_same_weights_have_samples_each(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    assert run(tmp_path, model={"vocab_size": 300, "embedding_size": 384}, max_duration=4) == 0
    cfg = TrainConfig.load(tmp_path / "run/config.yaml")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run").symlink_to(tmp_path / "run")
        sample_checkpoints(tmp_path / name, cfg, tokenizer, name, 4, [""])
    store = current_store()
    made_by = records_by_content(store)
    found = [read_samples(store, {name}, made_by) for name in ("one", "other")]
    assert [one["step"] for one in found[0]] == [4] and found[0] == found[1]


def test_links_of_a_chain_are_one_curve(tmp_path: Path) -> None:
    write(tmp_path / "step-20/metrics.jsonl", range(1, 21), 5.0)
    write(tmp_path / "step-100/metrics.jsonl", range(1, 101), 5.0)
    write(tmp_path / "run/metrics.jsonl", range(101, 111), 4.0)
    assert read_series(find_metrics(tmp_path))[LOSS].steps == list(range(1, 111))
    write(tmp_path / "final/metrics.jsonl", range(1, 201), 3.0)
    assert find_metrics(tmp_path) == [tmp_path / "final/metrics.jsonl"]


def add(
    store: Store,
    stage: str,
    made: dict[str, str],
    inputs: dict[str, Any],
    started: str,
    **facts: Any,
) -> Record:
    """The record of an action that made outputs with these digests."""
    action = Action(stage, 1, {"started": started}, inputs)
    outputs = {name: {"sha256": digest, "size": 10} for name, digest in made.items()}
    record = Record(
        key=action.key,
        action=action.as_dict(),
        content=content(outputs),
        outputs=outputs,
        facts=facts,
        conditions={},
        run={"started": started, "wall_s": 2.0},
    )
    store.create()
    store._write_record(record)
    return record


def test_what_is_made_of_a_checkpoint_is_no_source_of_it(tmp_path: Path) -> None:
    """A copy has the digest of what it copies; an export has its run's tokenizer."""
    store = Store(tmp_path / "store")
    text, words, ids, weights = ("abcd"[i] * 64 for i in range(4))
    add(store, "local_source", {"source": text}, {"file": text}, "2026-01-02")
    add(store, "local_conversations", {"source": text}, {"file": text}, "2026-01-03")
    add(store, "trained_tokenizer", {"tokenizer": words}, {"documents": [text]}, "2026-01-04")
    inputs = {"documents": text, "tokenizer": words}
    add(store, "tokens", {"tokens": ids}, inputs, "2026-01-05", tokens=7)
    training = add(
        store, "training", {"final": weights}, {"tokens": [ids]}, "2026-01-06", run_name="r"
    )
    add(store, "huggingface_export", {"words": words}, {"weights": weights}, "2026-01-07", tokens=1)
    found = [record["action"]["stage"] for _, record in ancestors(store, training)]
    assert found[:2] == ["training", "tokens"] and "huggingface_export" not in found
    assert set(found[2:]) == {"local_source", "local_conversations", "trained_tokenizer"}
    graph = build_graph(store, [training], records_by_content(store))
    names = [[graph.stages[i].name for i in column] for column in graph.columns]
    assert names[-1] == ["training: r"] and names[-2] == ["tokens"]
    assert "trained_tokenizer" in names[-3]
    assert list(graph.tokens_by_source({training["key"]}).values()) == [7]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data/a.npy", "…/a.npy"),
        ("file:///home/me/a", "…/a"),
        ("~/texts/b.txt", "…/b.txt"),
        ("https://me:word@host/a/b.gz", "https://host/a/b.gz"),
        ("s3://bucket/a/b and /x/y", "s3://bucket/a/b and …/y"),
        ("config/train/a.yaml", "config/train/a.yaml"),
        ("1/2 of /", "1/2 of /"),
        ("cfg:/home/alice/data/x.npy", "cfg:…/x.npy"),
        ("file:/home/alice/x", "…/x"),
        ("-I/home/alice/inc", "-I…/inc"),
        ("~alice/data/x", "…/x"),
        ("//nas/alice/x", "…/x"),
        ("/home/alice", "…"),
        ("12:30/45", "12:30/45"),
        ("${oc.env:HOME}/a", "${oc.env:HOME}/a"),
    ],
)
def test_paths_and_secrets_are_hidden(text: str, expected: str) -> None:
    assert hide_paths(text) == expected
    assert hide_paths({text: [text, 1]}) == {expected: [expected, 1]}


def test_paths_below_the_project_are_shown_without_it() -> None:
    assert hide_paths(f"{os.getcwd()}/data/x.npy") == "data/x.npy"


@pytest.mark.slow
def test_a_run_of_the_trainer_alone_has_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record, no data set, no held-out documents: what is known is shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    assert run(tmp_path, evaluators=[], max_duration=3, save_overwrite=True) == 0
    Path("checkpoints/alone").mkdir(parents=True)
    Path("checkpoints/alone/run").symlink_to(tmp_path / "run")
    Path("config").mkdir()
    Path("config/config.yaml").write_text(yaml.safe_dump({"runs": {"alone": {"train": "t"}}}))
    page = format_page("alone")
    assert "Its tokens were made elsewhere." in page and str(tmp_path) not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy and "connect-src &#39;none&#39;" in policy[1]
    assert page.count("</script>") == 4


def test_a_page_allows_its_own_programs_only() -> None:
    policy = content_policy(["alert(1)"], is_live=False)
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert "sha256-" in policy and "connect-src 'none'" in policy
    assert "connect-src 'self'" in content_policy([], is_live=True)


def test_a_frame_fits_its_terminal() -> None:
    steps = list(range(1, 2001))
    found = {
        LOSS: Series(LOSS, steps, [5 + math.cos(step) for step in steps]),
        "throughput/device/tokens_per_second": Series("s", steps, [1000.0] * 2000),
        "throughput/device/batches_per_second": Series("p", steps, [4.0] * 2000),
    }
    state = RunState("r", "running", 2000, 4000)
    for width in (60, 80, 120, 200):
        lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in frame(state, found, width)]
        assert max(map(len, lines)) <= width, width
        assert lines[0].startswith("r: running, step 2,000/4,000, 8:20 left")
    assert plots({}, "eval/heldout/CrossEntropyLoss", 80) == []
    broken = {LOSS: Series(LOSS, [1, 2], [math.nan, math.inf])}
    assert frame(dataclasses.replace(state, state="failed"), broken, 80)


def test_prompts_without_held_out_documents(tmp_path: Path) -> None:
    assert choose_prompts(Store(tmp_path), []) == [""]


def test_the_last_metrics_of_a_diverged_run_and_of_a_long_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "eval/heldout/CrossEntropyLoss": 8.0}]
    rows += [{"step": step, LOSS: 5.0, "padding": 1.0} for step in range(1, 3000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert path.stat().st_size > 2 * TAIL_BYTES
    assert last_metrics(path)["eval/heldout/CrossEntropyLoss"] == 8.0, "far back"
    with path.open("a") as file:
        file.write(f'{{"step": 3000, "{LOSS}": "NaN"}}\nnull\n{{"step": 3001, "{LOSS}": 1')
    found = last_metrics(path)
    assert found["step"] == 3000 and math.isnan(found[LOSS])
    path.write_text("")
    assert last_metrics(path) == {}


def test_rows_that_no_run_writes_are_damaged() -> None:
    huge = f'{{"step": 1, "x": {10**320}}}'
    for text in ("null", "3", '{"step": 3000000000}', '{"step": -1}', huge):
        assert parse_row(text.encode()) is None, text
    assert parse_row(b'{"step": 7, "x": "Infinity"}') == {"step": 7, "x": math.inf}


def test_a_run_that_learns_answers_has_two_losses() -> None:
    label = "eval/heldout/CrossEntropyLoss"
    found = choose_charts([LOSS, label, f"{label}PerLabel", "eval/heldout/Perplexity"])
    assert {title: names for title, (names, _) in found.items()} == {
        "Loss on answers": [f"{label}PerLabel"],
        "Loss on all tokens": [LOSS, label],
    }
    assert choose_charts([LOSS, label]) == {"Loss": ([LOSS, label], "nats a token")}


def test_two_curves_never_share_a_label() -> None:
    [chart, *_] = curve_specs([LOSS, "eval/training/CrossEntropyLoss"])
    labels = [curve["label"] for curve in chart["curves"]]
    assert len(set(labels)) == 2


@pytest.mark.parametrize("text", ["[", "[null]", '[{"task": "x"}]', '{"a": 1}'])
def test_damaged_results_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"results.json is damaged: expected rows .* make it again"
    ):
        read_results(tmp_path)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the run "r" in its config, and an empty store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", str(tmp_path / "store"))
    Path("config").mkdir()
    Path("config/config.yaml").write_text(yaml.safe_dump({"runs": {"r": {"train": "t"}}}))


def test_what_report_and_watch_refuse(project: None) -> None:
    for runs in (["index"], ["../x"], ["a/b"]):
        with pytest.raises(ValueError, match="expected"):
            report(runs)
    with pytest.raises(ValueError, match="expected a run, found 'nothing'"):
        watch("nothing")
    with pytest.raises(ValueError, match="r has not begun; start it: uv run snakemake"):
        watch("r")
    write(Path("checkpoints/r/run/metrics.jsonl"), range(1, 5), 5.0)
    with pytest.raises(ValueError, match="--port from 0 to 65535, found 99999"):
        watch("r", page=True, port=99_999)


def test_the_index_links_to_the_pages_beside_it(project: None) -> None:
    write(Path("checkpoints/r/run/metrics.jsonl"), range(1, 5), 5.0)
    report([], folder=Path("pages"))
    assert "r.html" not in Path("pages/index.html").read_text()
    Path("pages/r.html").touch()
    report([], folder=Path("pages"))
    assert 'href="r.html"' in Path("pages/index.html").read_text()


def test_watch_into_a_pipe_shows_curves(project: None, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("checkpoints/r/run/metrics.jsonl"), range(1, 50), 5.0)
    watch("r")
    shown = capsys.readouterr().out
    assert shown.startswith("r: stopped, step 49") and "loss 5.0000" in shown


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"messages": []}, [""]),
        ({"id": "x"}, [""]),
        ({"text": None}, [""]),
        ({"text": "one two thr"}, ["", "one two"]),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
            ["q"],
        ),
    ],
)
def test_a_prompt_is_the_start_of_what_was_held_out(
    line: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    store.create()
    (tmp_path / "heldout.gz").write_bytes(gzip.compress(json.dumps(line).encode() + b"\n"))
    record: Any = {"outputs": {"heldout": store.put(tmp_path / "heldout.gz")}}
    assert choose_prompts(store, [record]) == expected


def test_a_file_that_another_run_has_by_chance_makes_it_no_parent():
    """Trainings of two sizes save the same train.json at one step."""

    def action(key: str, inputs: dict[str, Any], *outputs: str) -> Any:
        files = {name: {"sha256": name, "size": 1} for name in outputs}
        outputs_of = {"final": {"files": files, "aside": {}}}
        return {"key": key, "action": {"inputs": inputs}, "outputs": outputs_of}

    tokens = [action("t1", {}, "t1"), action("t2", {}, "t2")]
    given = {"tokens": ["t1", "t2"]}
    small = action("small", given, "model-small", "train-9")
    large = action("large", given, "model-large", "train-9")
    decay = action("decay", given | {"after": ["model-small", "train-9"]}, "end")
    made_by: dict[str, list[Any]] = {}
    for one in (*tokens, large, small):
        for name in one["outputs"]["final"]["files"]:
            made_by.setdefault(name, []).append(one)
    parents = find_parents(decay, made_by)
    assert {key: {p["key"] for p in found} for key, found in parents.items()} == {
        "decay": {"small", "t1", "t2"},
        "small": {"t1", "t2"},
        "t1": set(),
        "t2": set(),
    }
