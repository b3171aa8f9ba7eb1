"""The matrix of benchmarks: which cells are timed, unavailable with a reason, or reused."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import polars
import pytest
import yaml

from olmo.bench import __main__ as runner
from olmo.bench import table
from olmo.bench.matrix import Cell, load_section
from olmo.config import TrainConfig
from olmo.report.bench import bench
from olmo.report.compare import compare
from olmo.store.action import Action
from olmo.store.stage import current_store

ROOT = Path(__file__).parents[2]
MODEL = {
    "rope": True,
    "include_bias": False,
    "layer_norm_with_affine": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "max_sequence_length": 32,
    "vocab_size": 128,
    "embedding_size": 128,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


SWITCHES = {
    "masters": {"master_weights": True},
    "packed": {"optimizer": {"packed_state": True}},
    "plain": {"cross_entropy": "plain"},
}


def matrix(folder: Path, *groups: dict, **changes: object) -> Path:
    section = {
        "model": MODEL,
        "shapes": {"small": {"d_model": 32, "n_heads": 2, "n_layers": 1}},
        "groups": [{"shape": ["small"], **group} for group in groups],
        "switches": SWITCHES,
        "warmup": 1,
        "steps": 3,
        **changes,
    }
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"cpu": section, "cuda": section}))
    return path


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_projects_matrix_is_complete(kind: str):
    section = load_section(ROOT / "config/bench/tps.yaml", kind)
    names = [cell.name for cell in section.cells()]
    assert len(names) == len(set(names)) > 10
    shapes = {cell.shape for cell in section.cells()}
    expected = {"cpu": {"tiny", "seed-quarter"}, "cuda": {"olmo-250m", "d1536", "seed-300m"}}
    assert shapes == expected[kind]
    assert {pair.theirs.whose for pair in section.pairs()} == {"ai2-olmo", "transformers"}
    assert section.steps >= 20 and section.rounds >= 5
    assert {cell.switch for cell in section.cells()} == {"none", *section.switches}
    if kind == "cuda":
        assert {cell.fp8 for cell in section.cells()} == {"none", "native", "torchao", "msamp"}
        assert all(section.train_config(cell).compile is None or cell.compile != "eager"
                   for cell in section.cells())  # fmt: skip
        published = {(r.attention[0], r.compile, r.microbatch): r.tokens_per_second
                for r in reversed(section.references)}  # fmt: skip
        assert published == {("math", "eager", 4): 16000, ("flash", "eager", 4): 17000,
                        ("flash", "default", 4): 17900, ("flash", "default", 6): 23000}  # fmt: skip
        cells = {(c.attention, c.compile, c.microbatch) for c in section.cells()
                 if c.shape == "seed-300m"}  # fmt: skip
        assert published.keys() <= cells, "expected a cell for each reference"


def test_each_cell_is_timed_once_and_an_unknown_value_is_refused(tmp_path: Path):
    section = load_section(matrix(tmp_path, {"microbatch": [1, 2]}, {"microbatch": [2, 4]}), "cpu")
    assert [cell.microbatch for cell in section.cells()] == [1, 2, 4]
    shapes = {name: {"d_model": 32, "n_heads": 2, "n_layers": 1} for name in ("small", "other")}
    both = load_section(matrix(tmp_path, {"shape": ["small", "other"]}, shapes=shapes), "cpu")
    assert [cell.shape for cell in both.restricted_to(["other"]).cells()] == ["other"]
    assert both.restricted_to([]).cells() == both.cells() and len(both.cells()) == 2
    with pytest.raises(ValueError, match="shape: expected other, small; found big"):
        both.restricted_to(["big"])
    for wrong in (
        {"shape": ["big"]},
        {"precision": ["bf8"]},
        {"fp8": ["fastest"]},
        {"switch": ["turbo"]},
        {"attention": ["flush"]},
        {"compile": ["yes"]},
        {"mb": [1]},
    ):
        with pytest.raises(ValueError, match=r"matrix\.yaml"):
            load_section(matrix(tmp_path, wrong), "cpu")


@pytest.mark.slow
def test_records_are_reused_and_unavailable_cells_have_reasons(tmp_path: Path, capfd):
    path = matrix(
        tmp_path,
        {"microbatch": [1], "compile": ["default"]},
        {"attention": ["math", "cudnn"], "fp8": ["none", "native"], "microbatch": [2]},
        {"fp8": ["msamp"]},
    )
    out = tmp_path / "out"
    records, _ = runner.run_matrix(path, out, kind="cpu")
    by_name = {Cell(**record["cell"]).name: record for record in records}
    compiled = by_name["small.auto.default.mb1.fp32.none"]
    assert compiled["status"] == "ok" and len(compiled["seconds"]) == 3
    assert compiled["tokens_per_step"] == 32 and compiled["last_loss"] > 0
    plain, eight = (by_name[f"small.math.eager.mb2.fp32.{fp8}"] for fp8 in ("none", "native"))
    assert plain["first_loss"] == pytest.approx(eight["first_loss"], rel=0.05)
    assert plain["first_loss"] != eight["first_loss"], "8 bits are not 32"
    cudnn = by_name["small.cudnn.eager.mb2.fp32.none"]
    assert cudnn["status"] == "unavailable" and "NVIDIA" in cudnn["why"]
    msamp = by_name["small.auto.eager.mb1.fp32.msamp"]
    assert msamp["status"] == "unavailable" and "msamp" in msamp["why"]

    # Only a missing record is timed again.
    files = {file: file.stat().st_mtime_ns for file in (out / "records").iterdir()}
    assert len(files) == len(records) == 6
    lost = next(file for file in files if ".math.eager.mb2.fp32.none." in file.name)
    lost.unlink()
    runner.run_matrix(path, out, kind="cpu")
    again = {file: file.stat().st_mtime_ns for file in (out / "records").iterdir()}
    assert {file for file in files if again[file] != files[file]} == {lost}

    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["status"] for row in rows].count("ok") == 3
    text = (out / "table.md").read_text()
    assert "unavailable: use_msamp: the package msamp" in text and "± " in text
    # Records of any machine are drawn on any machine.
    for file in files:
        other = json.loads(file.read_text()) | {"device": "another machine"}
        del other["cell"]["switch"]  # from before there were any
        file.rename(file.with_name(f"elsewhere.{file.name}"))
        file.with_name(f"elsewhere.{file.name}").write_text(json.dumps(other))
    bench(path, out, kind="cpu", draw_only=True)
    assert len(list((out / "records").iterdir())) == 6, "nothing was timed"
    assert "another machine" in (out / "table.md").read_text()
    drawn = (out / "heat.svg").read_text()
    assert drawn.startswith("<svg") and f"{eight['tokens_per_cpu_second']:,.0f}" in drawn
    ranked = (out / "best.svg").read_text()
    fastest = max((one for one in records if one["status"] == "ok"), key=table.ranking_speed)
    assert (
        f"small: use {fastest['attention_used']}, " in ranked and "unavailable: table.md" in ranked
    )
    frame = polars.read_parquet(out / "table.parquet")
    assert frame["status"].to_list() == [row["status"] for row in rows]
    with pytest.raises(ValueError, match="expected records"):
        bench(path, tmp_path / "nowhere", kind="cpu", draw_only=True)


def test_a_warning_about_a_busy_machine():
    quiet = {"kind": "cpu", "load": 1.0, "cores": 2}
    many = quiet | {"load": 5.0}
    assert table.format_cpu_load_warning([quiet, {"kind": "cpu"}]) == [], "old records have no load"
    assert "a load of 1 to 5 on 2 cores" in " ".join(table.format_cpu_load_warning([quiet, many]))
    assert table.format_cpu_load_warning([many | {"kind": "cuda"}]) == []


@pytest.mark.slow
def test_a_switch_changes_one_setting(tmp_path: Path):
    every = ["none", *SWITCHES]
    path = matrix(
        tmp_path,
        {"precision": ["amp_bf16"], "switch": every},
        {"precision": ["fp32"], "switch": ["masters"]},
        steps=20,
    )
    section = load_section(path, "cpu")
    learning_rates = {
        section.train_config(cell).optimizer.learning_rate for cell in section.cells()
    }
    assert learning_rates == {4e-4}, "expected a switch to change only the keys that it names"
    records, _ = runner.run_matrix(path, tmp_path / "out", kind="cpu")
    of = {(r["cell"]["switch"], r["cell"]["precision"]): r for r in records}
    base = of["none", "amp_bf16"]
    for switch in SWITCHES:
        switched = of[switch, "amp_bf16"]
        assert switched["first_loss"] == pytest.approx(base["first_loss"], rel=1e-2)
        change = [record["first_loss"] - record["last_loss"] for record in (switched, base)]
        assert change[0] == pytest.approx(change[1], rel=0.1) and change[0] != change[1], switch
    refused = of["masters", "fp32"]
    assert refused["status"] == "unavailable" and "amp_bf16" in refused["why"]
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [row["switch"] for row in rows] == [*every, "masters"]
    text = (tmp_path / "out/table.md").read_text()
    assert "| amp_bf16 | packed |" in text and "fp32, masters: unavailable" in text


@pytest.mark.slow
def test_cells_that_fail_have_records(tmp_path: Path):
    (late,), _ = runner.run_matrix(matrix(tmp_path, {}, limit_s=0.2), tmp_path / "out", kind="cpu")
    assert late["status"] == "too slow" and late["why"] == "it took longer than 0.2 s"
    shapes = {"large": {"d_model": 512, "n_heads": 2, "n_layers": 1,
                        "vocab_size": 300_000, "embedding_size": 300_000}}  # fmt: skip
    path = matrix(tmp_path, {"shape": ["large"]}, shapes=shapes, memory_bytes=1_200_000_000)
    (full,), _ = runner.run_matrix(path, tmp_path / "out", kind="cpu")
    assert full["status"] == "out of memory" and "allocate memory" in full["why"]


@pytest.mark.slow
def test_a_budget_is_kept_and_skipped_cells_are_listed(tmp_path: Path, capsys):
    path, out = matrix(tmp_path, {"microbatch": [1, 2, 3, 4]}), tmp_path / "out"
    drawn: list[int] = []
    write_tables = runner.write_tables

    def seen(records: list, *rest: object) -> None:
        drawn.append(len(records))
        write_tables(records, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_tables", seen)
        began = time.monotonic()
        first, _ = runner.run_matrix(path, out, kind="cpu", budget_s=6.0)
        assert time.monotonic() - began < 10
    assert 0 < len(first) < 4 and drawn == list(range(1, len(first) + 1)), "drawn after each"
    left = [f"small.auto.eager.mb{n}.fp32.none" for n in range(len(first) + 1, 5)]
    assert (
        f"the budget of 6 s is over, not timed: {', '.join(left)}. Run the"
        in capsys.readouterr().out
    )
    again, _ = runner.run_matrix(path, out, kind="cpu")
    done = [record for record in first if record["status"] == "ok"]  # the budget may cut the last
    assert again[: len(done)] == done and len(again) == 4 and len(done) >= len(first) - 1
    # One cell cannot exceed the budget.
    slow = matrix(tmp_path, {}, limit_s=600, steps=10**6)
    began = time.monotonic()
    (late,), _ = runner.run_matrix(slow, tmp_path / "slow", kind="cpu", budget_s=8.0)
    assert late["status"] == "too slow" and time.monotonic() - began < 12


def test_a_record_is_reused_unless_another_try_may_succeed(tmp_path: Path):
    path = tmp_path / "record.json"
    task = runner.Task("cell", path, 10.0, ("cell",), dict)
    assert runner.load_reusable_record(task) is None
    for record, reused in (
        ({"status": "ok"}, True),
        ({"status": "unavailable"}, True),
        ({"status": "out of memory"}, True),
        ({"status": "failed"}, False),
        ({"status": "too slow", "limit_s": 10.0}, True),
        ({"status": "too slow", "limit_s": 9.0}, False),
    ):
        path.write_text(json.dumps(record))
        assert (runner.load_reusable_record(task) == record) is reused, record


BLOCK_OTHER_PACKAGES = """
import importlib.metadata, os, re, sys

wanted, kept = ["torch", "numpy", "omegaconf", "olmo"], set()
while wanted:
    name = re.split(r"[^A-Za-z0-9._-]", wanted.pop())[0].lower().replace("_", "-")
    if name in kept:
        continue
    kept.add(name)
    try:
        found = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        continue
    if name != "olmo":
        wanted += [line for line in found if "extra ==" not in line]

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        of = owners.get(top, [])
        if of and not any(p.lower().replace("_", "-") in kept for p in of):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

owners = importlib.metadata.packages_distributions()
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.slow
def test_it_needs_only_torch_numpy_and_omegaconf(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK_OTHER_PACKAGES)  # runs in every process
    env = {k: v for k, v in os.environ.items() if k != "OLMO_PEER_PYTHON"}
    env["PYTHONPATH"] = str(tmp_path)

    def python(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    assert "No module named 'polars'" in python("-c", "import polars").stderr
    peers = [{"shape": ["small"], "peer": ["ai2-olmo"]}]
    path = matrix(tmp_path, {"microbatch": [2]}, peers=peers)
    ran = python("-m", "olmo.bench", "--matrix", path, "--out", tmp_path / "out", "--kind", "cpu")
    assert ran.returncode == 0, ran.stderr
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [row["status"] for row in rows] == ["ok", "unavailable"]
    assert "--peer ai2-olmo=PYTHON" in rows[1]["why"]


def test_the_table_names_references_and_sorts_by_speed(tmp_path: Path):
    references = [
        {"shape": "small", "attention": ["math"], "tokens_per_second": 16e3, "what": "log"}
    ]
    section = load_section(matrix(tmp_path, {"microbatch": [1, 2]}, references=references), "cpu")

    def record(cell: Cell, **more: object) -> dict:
        where = {
            "device": "a card",
            "kind": "cpu",
            "torch": "2",
            "python": "3",
            "threads": 1,
            "started": "2026-01-02T00:00:00Z",
        }
        return {"cell": asdict(cell), **where, **more}

    speeds = {"tokens_per_second_p10": 9.0, "tokens_per_second_p90": 11.0, "mfu_palm": 0.5,
              "mfu_causal": 0.4, "peak_memory_bytes": 2**21, "joules_per_token": None,
              "last_loss": 3.0, "status": "ok", "attention_used": "math"}  # fmt: skip
    slow, fast = section.cells()
    records = [
        record(slow, tokens_per_second=10.0, tokens_per_cpu_second=6.0, **speeds),
        record(fast, tokens_per_second=20.0, tokens_per_cpu_second=7.0, **speeds),
        record(Cell("small", "cudnn"), status="unavailable", why="no | card\nhere"),
    ]
    text = table.markdown(records, section, "the command")
    assert "a card, 1 CPU thread; torch 2, Python 3; 2026-01-02." in text
    assert "`OMP_NUM_THREADS=1 the command`" in text
    lines = [x for x in text.splitlines() if x.startswith("| ")]
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["2", "1", "1"]
    assert lines[2].endswith("| 20 ± 1 | 7 | 50.0%, 40.0% | 2 | 3.000 | 16,000 |")
    assert lines[4].endswith("| unavailable |  |  |  |  |  |")
    assert "- cudnn, eager, microbatch 1, fp32: unavailable: no | card here" in text
    assert "50.0% (PaLM)" in table.summary_line(records[0])
    assert (
        json.loads(json.dumps(table.record_row(records[0], section)))["tokens_per_second"] == 10.0
    )


def test_runs_are_compared_by_tokens_to_a_loss(tmp_path: Path):
    cfg = TrainConfig.new(global_train_batch_size=10, model={"max_sequence_length": 10})
    losses = {
        "reference": {0: 8.0, 10: 6.0, 20: 5.0},
        "fast": {0: 8.0, 10: 4.0, 20: 3.0},
        "slow": {0: 8.0, 20: 5.5},
    }
    finals = []
    for name, curve in losses.items():
        final = tmp_path / name / "final"
        final.mkdir(parents=True)
        cfg.save(final / "config.yaml")
        rows = [{"step": s, "eval/heldout/CrossEntropyLoss": v} for s, v in curve.items()]
        (final / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        finals.append(final)
    compare(finals, tmp_path / "table.md", tmp_path / "loss.svg")
    table_lines = (tmp_path / "table.md").read_text().splitlines()[-3:]
    assert table_lines == [
        "| reference | 2,000 | 5.0000 | 2,000 | 1.00 |",
        "| fast | 2,000 | 3.0000 | 750 | 0.38 |",  # on the line from 8.0 to 4.0
        "| slow | 2,000 | 5.5000 | never |  |",
    ]
    assert (tmp_path / "loss.svg").read_text().startswith("<svg")
    with pytest.raises(ValueError, match="expected evaluations on other"):
        compare(finals, tmp_path / "table.md", tmp_path / "loss.svg", label="other")


def shard(text: str, heldout: str, tokenizer: str) -> str:
    """Tokens as the pipeline makes them; their digest."""

    def made(stage: str, inputs: dict[str, str], **outputs: str) -> str:
        def build(work: Path) -> dict:
            for name, content in outputs.items():
                (work / "outputs" / name).write_text(content)
            return {}

        found = current_store().run(Action(stage, 1, {}, inputs), build)["outputs"]
        return found[next(iter(outputs))]["sha256"]

    kept = made("documents", {"source": text}, documents=text, heldout=heldout)
    trained = made("trained_tokenizer", {"documents": tokenizer}, tokenizer=tokenizer)
    inputs = {"documents": kept, "tokenizer": trained}
    return made("tokens", inputs, tokens=f"{text} in ids of {tokenizer}")


def test_runs_of_other_data_or_tokenizers_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_STORE", "store")
    for name, vocab_size, tokens in (
        ("a", 128, shard("text", "held out", "bpe")),
        ("alike", 128, shard("some of it", "held out", "bpe")),
        ("other-tokenizer", 128, shard("text", "held out", "unigram")),
        ("other-documents", 128, shard("other text", "others", "bpe")),
        ("other-size", 256, shard("text", "held out", "bpe")),
        ("from-elsewhere", 128, "0" * 64),
    ):
        final = Path("checkpoints", name, "final")
        final.mkdir(parents=True)
        model = {"max_sequence_length": 10, "vocab_size": vocab_size, "embedding_size": 256}
        cfg = TrainConfig.new(
            global_train_batch_size=10, model=model, data={"paths": [f"store/{tokens}"]}
        )
        cfg.save(final / "config.yaml")
        rows = [{"step": s, "eval/heldout/CrossEntropyLoss": 8.0 - s} for s in (0, 1)]
        if name not in ("alike", "other-size"):
            rows = [row | {"eval/heldout/BitsPerByte": 3.0 - row["step"]} for row in rows]
        (final / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def with_a(name: str) -> str:
        compare([Path("a"), Path(name)], Path("table.md"), Path("loss.svg"))
        return Path("table.md").read_text()

    assert "| alike | 100 | 7.0000 | 100 | 1.00 |" in with_a("alike")
    assert not capsys.readouterr().err
    # A loss per token says nothing beside that of other tokens; of the same documents bytes do.
    text = with_a("other-tokenizer")
    assert "Held-out loss in bits per byte (heldout); the target is a's last loss, 2.0000" in text
    assert "| other-tokenizer | 100 | 2.0000 | 100 | 1.00 |" in text
    assert "bits per byte" in Path("loss.svg").read_text()
    for name, found in (
        ("other-documents", "runs with the same held-out documents"),
        ("other-size", "evaluations in bits per byte, .* found none .* eval/other-size, then olmo"),
    ):
        with pytest.raises(ValueError, match=f"expected {found}"):
            with_a(name)
    with pytest.raises(ValueError, match="expected runs with the same tokenizer"):
        compare([Path("a"), Path("other-tokenizer")], Path("t.md"), Path("l.svg"), label="own")
    assert "| 100 | 1.00 | 2.0000 |" in with_a("from-elsewhere"), "both, where both can be compared"
    assert "| from-elsewhere |" in with_a("from-elsewhere")
    assert "the store has no record of the data of from-elsewhere" in capsys.readouterr().err
