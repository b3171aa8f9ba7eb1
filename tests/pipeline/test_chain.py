"""The whole chain, and what a second run of it does and does not do."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from project import Project, read_source, when_seen, write_source

NOTHING = "Nothing to be done"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Project:
    """A project with a given tokenizer whose chain has run once; tests in order change it."""
    project = Project(tmp_path_factory.mktemp("chain") / "project")
    project.use_given_tokenizer(tokenizer)
    first = project.run()
    assert first.ran["training"] == 1 and first.ran["tokens"] == 6 and not first.found
    return project


def touch_everything(project: Project) -> None:
    for path in project.root.rglob("*"):
        if path.exists() and path.suffix != ".log":  # whose time tells the test who ran
            path.touch()


def test_the_final_folder_is_whole(finished: Project):
    names = {path.name for path in finished.final.iterdir()} - {".snakemake_timestamp"}
    assert names == {
        "config.yaml",
        "model.safetensors",
        "optim.safetensors",
        "train.json",
        "record.json",
        "metrics.jsonl",
        "loss.svg",
    }
    assert (finished.final / "loss.svg").read_text().startswith("<svg")
    assert finished.half_written() == []
    config = (finished.final / "config.yaml").read_text()
    assert str(finished.root) not in config and "/objects/" in config


def test_it_learns(finished: Project):
    rows = [row for row in finished.metrics() if "eval/heldout/CrossEntropyLoss" in row]
    losses = [row["eval/heldout/CrossEntropyLoss"] for row in rows]
    assert abs(losses[0] - math.log(512)) < 0.2
    assert losses[-1] < losses[0] - 0.5


def test_again_runs_nothing(finished: Project):
    again = finished.run()
    assert NOTHING in again.output and not again.ran and not again.found


def test_touched_files_run_no_work(finished: Project):
    before = finished.content()
    touch_everything(finished)
    assert not finished.run().ran
    assert finished.content() == before


def test_deleted_outputs_are_restored_from_the_store(finished: Project):
    before = finished.content()
    for name in ("data", "checkpoints", ".snakemake", "logs"):
        shutil.rmtree(finished.root / name)
    restored = finished.run()
    assert not restored.ran and restored.found["training"] == 1
    assert finished.content() == before


def test_a_deleted_shard_is_restored(finished: Project):
    shard = finished.root / "data/small/tokens/part-1.npy"
    shard.unlink()
    journal = finished.root / "data/small/damage.log"
    planned = finished.run("checkpoints/small/final", "-n").output
    assert "train" in planned and NOTHING not in planned
    assert str(shard.relative_to(finished.root)) not in journal.read_text()
    restored = finished.run()
    assert shard.exists() and not restored.ran
    assert NOTHING in finished.run().output


def test_a_parameter_there_and_back_only_hits(finished: Project):
    before = finished.content()
    recipe = "config/data/small.yaml"
    target = "checkpoints/small/global_indices.npy"
    finished.change(recipe, documents__heldout_share=0.2)
    there = finished.run(target)
    assert there.ran["documents"] == 3 and there.ran["tokens"] == 6
    finished.change(recipe, documents__heldout_share=0.1)
    back = finished.run()
    assert not back.ran and finished.content() == before


def test_changed_bytes_that_the_subsample_drops_stop_there(finished: Project):
    before = finished.content()
    path = finished.root / "sources/part-1.json.gz"
    lines = read_source(path)
    lines[1]["text"] += " changed"  # one in two is kept: the first, the third, …
    write_source(path, lines)
    changed = finished.run()
    assert changed.ran == {"local_source": 1, "documents": 1}
    assert finished.content() == before


def test_a_changed_source_runs_its_chain_the_order_and_training(finished: Project):
    before = finished.content()
    path = finished.root / "sources/part-2.json.gz"
    lines = read_source(path)
    for line in lines:
        line["text"] += "\n# " + line["id"] * 20
    write_source(path, lines)
    changed = finished.run()
    assert changed.ran == {
        "local_source": 1,
        "documents": 1,
        "tokens": 2,  # its training and its held-out documents
        "token_bytes": 1,
        "global_order": 1,
        "training": 1,
    }
    assert finished.content() != before


def test_a_corrupt_object_is_found_quarantined_and_rebuilt(finished: Project):
    before = finished.content()
    for number, find in enumerate(("verify", "hit")):
        shard = (finished.root / f"data/small/tokens/part-{number}.npy").resolve()
        data = bytearray(shard.read_bytes())
        data[100] ^= 4
        shard.chmod(0o644)
        shard.write_bytes(data)
        if find == "verify":
            found = finished.olmo("store", "verify")
            assert found.status == 1 and shard.name[:12] in found.output
            assert not shard.exists()
        else:
            touch_everything(finished)
            (finished.root / "data/small/tokens/000.tsv").unlink()
        rebuilt = finished.run()
        assert rebuilt.ran == {"tokens": 1}, rebuilt.output
        assert finished.content() == before
        assert len(list((finished.store / "quarantine").iterdir())) == number + 1


def test_evaluation_agrees_with_the_run(finished: Project):
    finished.run("checkpoints/small/heldout.json")
    found = json.loads((finished.root / "checkpoints/small/heldout.json").read_text())
    last = finished.metrics()[-1]["eval/heldout/CrossEntropyLoss"]
    assert found["CrossEntropyLoss"] == pytest.approx(last, abs=1e-6)


def test_statistics_count_what_there_is(finished: Project):
    made = finished.run("data/small/statistics.txt").ran
    assert made["statistics"] == 1
    text = (finished.root / "data/small/statistics.txt").read_text()
    assert "part-0" in text and "documents" in text


def test_the_way_back_reaches_the_sources(finished: Project):
    lines = finished.olmo("store", "trace", "checkpoints/small/final").output.splitlines()
    stages = [line.strip().split("  ")[1].split(",")[0] for line in lines]
    assert lines[0].startswith("checkpoints/small/final  training, ")
    assert {"tokens", "documents", "local_source", "global_order", "local_tokenizer"} < set(stages)
    # Three files, and the one from before the bytes changed that the subsample drops.
    assert stages.count("local_source") == 4


def test_what_was_pushed_and_pulled_is_not_made_again(finished: Project, tmp_path: Path):
    finished.run()
    pushed = finished.olmo("store", "push", str(tmp_path / "second"), "--inputs")
    assert pushed.status == 0, pushed.output
    other = finished.copy(tmp_path / "other")
    for name in ("store", "data", "checkpoints", ".snakemake"):
        shutil.rmtree(other.root / name)
    other.store = other.root / "store"
    # A laptop takes the checkpoint and what one step saw: the order and some of three shards.
    some = other.olmo(
        "store", "pull", str(tmp_path / "second"), "checkpoints/small/final", "--steps", "5"
    )
    assert some.status == 0, some.output
    saw = re.search(r"steps 5 of checkpoints/small/final: (\d) objects", some.output)
    assert saw and 2 <= int(saw[1]) <= 4 and other.content() == finished.content()
    pulled = other.olmo("store", "pull", str(tmp_path / "second"), "--inputs")
    assert pulled.status == 0, pulled.output
    assert not other.run().ran
    assert other.content() == finished.content()


def test_inspect_and_seen_are_inverse(finished: Project, monkeypatch: pytest.MonkeyPatch):
    from olmo.inspect.commands import find_sightings
    from olmo.inspect.run import TrainedRun
    from olmo.store.stage import current_store

    finished.run()
    monkeypatch.chdir(finished.root)
    monkeypatch.setenv("OLMO_STORE", str(finished.store))
    run = TrainedRun("small")
    saw = when_seen(run)
    assert len(saw) > 100
    for source in ("part-0", "part-1", "part-2"):
        digest = current_store().digest(finished.root / f"data/small/sources/{source}.json.gz")
        for document, times in find_sightings(run, sha256=digest):
            assert document.source == f"{source}.json.gz"
            assert set(times) == saw.get((document.source, document.line), set())

    (file, line), times = max(saw.items(), key=lambda item: len(item[1]))
    step = min(times)[0]
    shown = finished.olmo("inspect", "--run", "small", "--step", str(step)).output
    assert f"({file}:{line})" in shown
    named = re.search(r"^  (\S+) \(" + re.escape(f"{file}:{line})"), shown, re.M)
    assert named, shown
    told = finished.olmo("seen", "--run", "small", "--id", named[1])
    assert told.output.count("\n  step ") == len(times) and f"step {step}, " in told.output
    text = read_source(finished.root / "sources" / file)[line - 1]["text"]
    by_text = finished.olmo("seen", "--run", "small", "--text", text)
    for place in re.findall(r"step \d+, position \d+ \(rank \d+\), instance \d+", told.output):
        assert place in by_text.output
    for words, message in {
        ("seen", "--run", "small", "--id", "nobody"): "no document of small's data has the id",
        ("inspect", "--run", "small", "--step", "99"): "expected a step from 1 to 24, found 99",
    }.items():
        refused = finished.olmo(*words)
        assert refused.status == 1 and message in refused.output


def test_a_replay_is_equal_to_the_bit_until_a_token_is_not(finished: Project):
    finished.run()
    equal = finished.olmo("replay", "small", "--steps", "20..24")
    assert equal.status == 0 and "5 steps, equal to the bit" in equal.output, equal.output
    assert "weights: largest difference 0" in equal.output
    # One token of an instance that step 22 saw.
    shown = finished.olmo("inspect", "--run", "small", "--step", "22", "--json").output
    instance = json.loads(shown.splitlines()[3])
    shard = Path(instance["path"])
    tokens, at = bytearray(shard.read_bytes()), 2 * (instance["start"] + 5)
    tokens[at : at + 2] = (tokens[at] ^ 1, tokens[at + 1])
    whole = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(tokens)
    found = finished.olmo("replay", "small", "--steps", "20..24")
    shard.write_bytes(whole)
    assert found.status == 1 and "the first difference is step 22" in found.output, found.output
    beyond = finished.olmo("replay", "small", "--steps", "20..25")
    assert beyond.status == 1 and "expected steps from 1 to 24, found 20..25" in beyond.output
