"""The plan: names of files, from configs and recipes, without running anything."""

import json
import math
import os
import shlex
from pathlib import Path

import pytest
import yaml

from olmo.corpus.ingest import parse_sources
from olmo.corpus.listing import Entry, write_listing
from olmo.corpus.order import order
from olmo.io import sealed
from olmo.pipeline.parts import previous_link
from olmo.pipeline.plan import Plan
from olmo.pipeline.workspace import describe_finished_runs

RECIPE = {
    "sources": {"files": ["in/*.json.gz"]},
    "documents": {"keep_one_in": 10, "allow": ["no-id", "no-text"]},
    "tokenizer": {"train_vocab_size": 512},
}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OLMO_STORE", raising=False)
    (tmp_path / "config/data").mkdir(parents=True)
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / f"in/part-{number}.json.gz").touch()
    return tmp_path


def plan(**changes) -> Plan:
    Path("config/data/mine.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))
    runs = {"r": {"train": "t.yaml", "dataset": "mine"}}
    return Plan({"runs": runs, "shards_per_job": 2})


def test_batches():
    assert plan().batches("mine") == ["000", "001", "002"]
    assert [source.name for source in plan().batch_sources("mine", "002")] == ["part-4"]
    assert plan().listings("mine", "tokens")[0] == "data/mine/tokens/000.tsv"


def test_flags_quote_what_a_shell_minds():
    flag, given = shlex.split(plan().section("mine", "documents"))
    assert flag == "--config" and "offset" not in given, "which is the default"
    assert '"keep_one_in": 10' in given and '"allow": ["no-id", "no-text"]' in given
    Path("in/a b; $(touch x).json.gz").touch()
    words = shlex.split(plan(sources={"files": ["in/a*"]}).source_flags("mine", "000"))
    assert words == ["--sources", "a_b____touch_x_=in/a b; $(touch x).json.gz"]


def test_a_file_among_the_results_of_runs_is_refused():
    Path("eval").mkdir()
    Path("eval/questions.json.gz").touch()
    with pytest.raises(ValueError, match="but eval/ is for results"):
        plan(sources={"files": ["eval/*.gz"]}).sources("mine")


def test_a_pattern_takes_all_that_it_says_and_tells_how_many(capsys: pytest.CaptureFixture[str]):
    for name in ("web/a", "web/deep/b", "c"):
        Path("corpus", name).parent.mkdir(parents=True, exist_ok=True)
        Path("corpus", f"{name}.json.gz").touch()
    every = plan(
        sources={"files": ["corpus/**/*.json.gz", "corpus/c.json.gz"]},
        decontaminate={"against": ["corpus/**/*.json.gz"]},
    )
    assert [source.name for source in every.sources("mine")] == ["c", "a", "b", "c"]
    found = ["corpus/c.json.gz", "corpus/web/a.json.gz", "corpus/web/deep/b.json.gz"]
    assert every.decontamination_files("mine") == every.decontamination_files("mine") == found
    assert capsys.readouterr().err.splitlines() == [
        "mine: sources.files names 4 files, 1 of them again",
        "mine: decontaminate.against names 3 files",
    ]


def test_a_pattern_that_takes_nothing_or_too_much_is_refused():
    Path("data/mine/sources").mkdir(parents=True)
    Path("data/mine/sources/part-0.json.gz").touch()
    for files, message in (
        (["in/**/*.jsonl"], r"names in/\*\*/\*.jsonl, which does not exist"),
        (["**/*.json.gz"], "names data/mine/sources/part-0.json.gz, but data/mine/ is for outputs"),
        (["in"], "expected files, found the folder in; end the pattern"),
        (["https://x/a.json.gz"], "found the URL https://x/a.json.gz; download it first"),
    ):
        with pytest.raises(ValueError, match=f"^config/data/mine.yaml: sources.files.*{message}"):
            plan(sources={"files": files}).sources("mine")
    weights = {"weights": ["part-*=2", "parts-*=0.5"]}
    with pytest.raises(
        ValueError, match=r"weights: parts-\* matches no source; they are part-0, par"
    ):
        plan(documents=weights).sources("mine")


def test_a_place_and_its_mirrors_are_parted_again():
    Path("in/a#1 100%.json.gz").touch()
    mirrors = ["in/a=https://b/#", "elsewhere/=x"]
    sources = {"files": ["in/a*"], "mirrors": mirrors, "allow_missing": True}
    words = shlex.split(plan(sources=sources).source_flags("mine", "000"))
    assert words[0] == "--sources" and words[2:] == ["--allow-missing"]
    [file] = parse_sources(words[1:2])
    assert file.place == "in/a#1 100%.json.gz" and file.mirrors == ("https://b/##1 100%.json.gz",)
    with pytest.raises(ValueError, match="expected beginning=beginning, found 'x'"):
        plan(sources={"files": ["in/a*"], "mirrors": ["x"]}).recipe("mine")


def test_a_vocabulary_that_does_not_fit_is_told_before_anything_is_tokenized():
    ends = {"eos_token_id": 0, "pad_token_id": 1}
    for model, message in (
        (
            {"vocab_size": 4096},
            r"^t.yaml: model.vocab_size is 4096, but config/data/mine.yaml .* 512",
        ),
        (
            {"vocab_size": 512, "embedding_size": 500},
            r"at least model.vocab_size \(512\), found 500",
        ),
    ):
        Path("t.yaml").write_text(yaml.safe_dump({"model": model | ends}))
        with pytest.raises(ValueError, match=message):
            plan().train_config("r")
    for model in ({"vocab_size": 512}, {"vocab_size": 512, "embedding_size": 512}):
        Path("t.yaml").write_text(yaml.safe_dump({"model": model | ends}))
        assert plan().train_config("r").model.vocab_size == 512


def test_a_run_without_a_data_set_takes_the_tokens_that_its_config_names():
    model = {"vocab_size": 512, "eos_token_id": 7, "pad_token_id": 1}
    data = {"datasets": {"b": ["https://x/b/part-0.npy"], "a": ["https://x/a/part-0.npy"]}}
    config = {
        "model": model,
        "data": data,
        "tokenizer": {"identifier": "tokenizers/allenai_dolma2.json"},
    }
    Path("t.yaml").write_text(yaml.safe_dump(config))
    given = Plan({"runs": {"r": {"train": "t.yaml"}}})
    assert given.dataset("r") == "r"
    assert [source.name for source in given.sources("r")] == ["a-part-0", "b-part-0"]
    tokenizer = given.recipe("r").tokenizer
    assert (tokenizer.hub, tokenizer.eos_token_id) == ("allenai/dolma2-tokenizer", 7)

    overrides = ["data.datasets=null", "data.paths=[https://x/c.npy]", "tokenizer.identifier=lab/y"]
    given = Plan({"runs": {"r": {"train": "t.yaml", "overrides": overrides}}})
    assert [source.name for source in given.sources("r")] == ["c"]
    assert given.recipe("r").tokenizer.hub == "lab/y"
    given = Plan({"runs": {"r": {"train": "t.yaml", "overrides": ["tokenizer.identifier=y.json"]}}})
    with pytest.raises(ValueError, match=r"allenai_dolma2.json.*found no file y.json"):
        given.recipe("r")


def test_patterns_in_a_config_that_match_nothing():
    Path("t.npy").touch()

    def given(data: str) -> Plan:
        Path("t.yaml").write_text(f"data: {data}")
        return Plan({"runs": {"r": {"train": "t.yaml"}}})

    for data, message in (
        ("{paths: '${path.glob:none/*.npy}'}", "expected files in data.paths"),
        ("{paths: '${path.glob:*.npy,none/*.npy}'}", r"no file matches none/\*.npy"),
        (
            "{datasets: {a: '${path.glob:*.npy}', b: '${path.glob:no/*.npy}'}}",
            "data.datasets.b: expected files, found none",
        ),
    ):
        with pytest.raises(ValueError, match=f"^t.yaml: .*{message}"):
            given(data).recipe("r")


def test_a_run_is_asked_what_there_is_to_ask():
    held = plan(documents={"heldout_share": 0.1})
    assert held.heldout_results("r") == ["checkpoints/r/heldout.json"]
    with pytest.raises(ValueError, match=r"eval/r: expected .*config/data/mine.yaml"):
        plan().heldout_results("r")
    Path("t.yaml").write_text(yaml.safe_dump({"data": {"paths": ["https://x/a.npy"]}}))
    given = Plan({"runs": {"r": {"train": "t.yaml"}}})
    with pytest.raises(ValueError, match=r"evaluation: config/eval/hub.yaml") as raised:
        given.heldout_results("r")
    assert "documents.heldout_share" not in str(raised.value), "it has no recipe"
    Path("e.yaml").write_text("choices: [piqa]\n")
    asked = Plan({"runs": {"r": {"train": "t.yaml", "evaluation": "e.yaml"}}})
    assert asked.heldout_results("r") == []


def test_what_a_plan_refuses():
    with pytest.raises(ValueError, match="shards_per_job: expected at least 1, found 0"):
        Plan({"runs": {}, "shards_per_job": 0})
    Path("t.yaml").write_text("data: {custom_dataset: {name: a.B}}\n")
    with pytest.raises(ValueError, match=r"custom_dataset works with `python -m olmo.train` only"):
        plan().train_config("r")
    with pytest.raises(ValueError, match=r"^config/data/mine.yaml: documents.x: no such key"):
        plan(documents={"x": 1}).recipe("mine")


def test_an_order_of_any_type_of_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OLMO_STORE", "store")
    write_listing(Path("000.tsv"), [Entry("a", "tokens", "tokens/a.npy", "0" * 64, 96)])
    for dtype, instances in (("uint16", 12), ("int32", 6)):
        order([Path("000.tsv")], Path(dtype), sequence_length=4, seed=1, dtype=dtype)
        assert Path(dtype).stat().st_size == 4 * instances
    with pytest.raises(ValueError, match=r"dtype: expected one of uint16, .*, found 'uint99'"):
        order([Path("000.tsv")], Path("o"), sequence_length=4, seed=1, dtype="uint99")


def test_numbers_that_cannot_be_are_told_when_it_is_planned():
    for part, key, value, wanted in (
        ("documents", "keep_one_in", 0, "at least 1"),
        ("documents", "offset", 10, "from 0 to keep_one_in - 1, 9;"),
        ("documents", "offset", -1, "from 0 to keep_one_in - 1, 9;"),
        ("documents", "heldout_share", 1.0, "from 0 to below 1,"),
        ("documents", "heldout_share", -0.1, "from 0 to below 1,"),
        ("documents", "max_text_bytes", 0, "at least 1"),
        ("tokens", "audit_share", 1.5, "from 0 to 1"),
        ("tokenizer", "train_vocab_size", -1, "at least 1"),
        ("tokenizer", "pad_token_id", -1, "at least 0"),
        ("instructions", "sequence_length", 0, "at least 2"),
        ("sources", "stdlib", 10**9, "from 1 to 100"),
        ("documents", "heldout_share", math.nan, "a number"),
        ("documents", "keep_one_in", -1, "at least 1"),
        ("documents", "keep_one_in", 1.5, "a whole number"),
        ("documents", "keep_one_in", math.inf, "a whole number"),
    ):
        message = f"^config/data/mine.yaml: {part}.{key}: expected {wanted}.* found {value}"
        with pytest.raises(ValueError, match=message):
            plan(**{part: {**RECIPE.get(part, {}), key: value}}).recipe("mine")


def test_numbers_of_a_run_and_of_weights_are_told_when_it_is_planned():
    for weight in ("a", "a=x", "=2", "a=0", "a=-1", "a=nan", "a=inf", "a=1e12"):
        message = f"^config/data/mine.yaml: documents.weights: expected .* found '{weight}'"
        with pytest.raises(ValueError, match=message):
            plan(documents={"weights": [weight]}).recipe("mine")
    model = {"vocab_size": 512, "eos_token_id": 0, "pad_token_id": 1}
    for config, message in (
        ({"global_train_batch_size": 0}, "global_train_batch_size: expected at least 1, found 0"),
        ({"eval_interval": 0}, "eval_interval: expected at least 1, found 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: expected a number, found nan"),
        ({"scheduler": {"t_warmup": math.nan}}, "t_warmup: expected int or float, found nan"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate: expected .*inf"),
        ({"model": {"d_model": 60, "n_heads": 7}}, "a multiple of model.n_heads; found 60 and 7"),
        ({"model": {"n_heads": 12, "n_kv_heads": 5}}, "model.n_kv_heads; found 12 and 5"),
        ({"model": {"alibi": True, "rope": True}}, "model.alibi and model.rope exclude"),
        ({"model": {"block_group_size": 5}}, "a multiple of model.block_group_size"),
    ):
        Path("t.yaml").write_text(
            yaml.safe_dump({**config, "model": {**model, **config.get("model", {})}})
        )
        with pytest.raises(ValueError, match=f"^t.yaml: .*{message}"):
            plan().train_config("r")
    Path("t.yaml").write_text("global_train_batch_size: 1e9\nmodel: " + json.dumps(model))
    assert plan().train_config("r").global_train_batch_size == 10**9


def test_the_next_steps_can_be_pasted():
    made = plan(documents={"heldout_share": 0.1})
    assert not describe_finished_runs(made)
    final = Path("checkpoints/r/final")
    final.mkdir(parents=True)
    losses = {"heldout": {"first": 8.0, "last": 5.0}, "b": {"first": "Infinity", "last": "NaN"}}
    facts = {"steps": 10, "tokens": 2000, "heldout_loss": losses}
    (final / "record.json").write_text(sealed.dumps({"facts": facts}))
    told = describe_finished_runs(made)
    ready = "r/final is ready: 10 steps, held-out loss 8.000 → 5.000 (heldout), inf → nan (b)"
    assert ready in told
    commands = [line.split(": ", 1)[1].strip() for line in told.splitlines() if " uv run " in line]
    assert [command.split()[:4] for command in commands] == [
        ["uv", "run", "olmo", "chat"],
        ["uv", "run", "olmo", "report"],
        ["uv", "run", "olmo", "store"],
        ["uv", "run", "snakemake", "--cores"],
    ]
    made.recipe("mine").documents.heldout_share = 0  # nothing to evaluate on
    assert "snakemake --cores 2 eval/r hf/r" in told and "eval/r" not in describe_finished_runs(
        made
    )


def test_exactly_one_kind_of_source():
    with pytest.raises(ValueError, match="found stdlib and files"):
        plan(sources={"stdlib": 2, "files": ["x"]}).recipe("mine")
    with pytest.raises(ValueError, match="found none"):
        plan(sources={}).recipe("mine")


def test_documents_become_tokens_as_they_are_unless_the_recipe_takes_some_out():
    assert plan().documents_stage("mine") == "documents" and not plan().section("mine", "dedupe")
    Path("quiz.gz").touch()
    mixed = plan(
        documents={"heldout_share": 0.1},
        dedupe={"exact": True},
        decontaminate={"against": ["*.gz"], "ngram": 8},
    )
    assert mixed.documents_stage("mine") == "mixed" and mixed.decontamination_files("mine") == [
        "quiz.gz"
    ]
    assert mixed.section("mine", "dedupe", "dedupe") == """--dedupe '{"exact": true}'"""
    assert mixed.section("mine", "decontaminate").endswith(', "ngram": 8}\'')
    for wrong, message in (
        ({"dedupe": {}}, "expected exact or paragraphs to be true"),
        ({"dedupe": {"exact": True, "parts": 0}}, "dedupe.parts: expected"),
        ({"dedupe": {"paragraphs": True, "near": {}}}, "expected near or paragraphs, found both"),
        ({"dedupe": {"near": {"bands": 256}}}, "dedupe.near.bands: expected"),
        ({"decontaminate": {}}, "expected files in against or a documents.heldout_share"),
        ({"decontaminate": {"against": ["x"], "ngram": 0}}, "ngram of at least 1"),
        ({"decontaminate": {"heldout": False}}, "expected against or heldout"),
        (
            {"dedupe": {"exact": True}, "documents": {"weights": ["a=2"]}},
            "whose copies are duplicates",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**wrong).recipe("mine")
    gone = plan(decontaminate={"against": ["none/*.gz"]})
    with pytest.raises(ValueError, match=r"decontaminate.against names none/\*.gz"):
        gone.decontamination_files("mine")


def test_a_recipe_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"recipe config/data/yours.yaml.*known are mine"):
        plan().recipe("yours")


def test_a_list_that_is_not_at_hand_says_what_follows(capsys: pytest.CaptureFixture[str]):
    lists = plan(sources={"url_list": "https://somewhere/urls.txt"})
    assert lists.needs_source_list("mine") and lists.needs_source_list("mine")
    said = capsys.readouterr().err
    assert said.count("known after its list") == 1 and "sources → documents → tokens" in said
    Path("data/mine").mkdir(parents=True)
    Path("data/mine/sources.tsv").write_text(
        "url\tbytes\tsha256\tlicence\nhttps://x/a.json.gz\t12\t\t\n"
    )
    assert not lists.needs_source_list("mine")
    words = "--sources a=https://x/a.json.gz --table data/mine/sources.tsv"
    assert lists.source_flags("mine", "000") == words


def test_the_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    assert plan().store == os.path.abspath("store")
    monkeypatch.setenv("OLMO_STORE", "/big/disk")
    assert plan().store == "/big/disk"


def tuning(**changes) -> Plan:
    """A plan of a run on conversations that starts from another; `changes` are of all its files."""
    model = {"max_sequence_length": 64, "vocab_size": 512, "eos_token_id": 0, "pad_token_id": 1}
    config = {"model": model, "reset_trainer_state": True} | changes.pop("config", {})
    talks = {
        "sources": {"stdlib_questions": 2},
        "instructions": {"sequence_length": 64},
        "tokenizer": {"dataset": "mine"},
    } | changes.pop("talks", {})
    Path("config/data/mine.yaml").write_text(yaml.safe_dump(RECIPE))
    Path("config/data/talks.yaml").write_text(yaml.safe_dump(talks))
    Path("t.yaml").write_text(yaml.safe_dump(config))
    tuned = {"train": "t.yaml", "dataset": "talks", "start_from": "base"} | changes
    return Plan({"runs": {"base": {"train": "t.yaml", "dataset": "mine"}, "tuned": tuned}})


def test_a_tuned_run_starts_from_another_or_from_a_checkpoint():
    plan = tuning()
    assert plan.instruction_datasets() == ["talks"] and plan.start_checkpoint("base") == []
    assert plan.start_checkpoint("tuned") == ["checkpoints/base/final"]
    assert plan.train_config("tuned").reset_trainer_state
    assert plan.tokenizer_file("talks") == ["data/mine/tokenizer.json"]
    assert plan.line_kind_flags("talks") == "--kind messages"
    assert plan.section("talks", "instructions") == """--config '{"sequence_length": 64}'"""
    words = "--sources stdlib-questions-00=stdlib-questions:0/2 "
    assert plan.source_flags("talks", "000").startswith(words)
    assert plan.source_flags("talks", "000").endswith(" --conversations")
    given = tuning(start_from="https://x/step5-unsharded", config={"reset_optimizer_state": True})
    assert given.start_checkpoint("tuned") == ["checkpoints/tuned/start"]
    assert given.external_start("tuned") == "https://x/step5-unsharded"
    assert given.start_flags("tuned") == "" and tuning().start_flags("tuned") == "--optimizer"
    with pytest.raises(ValueError, match="expected start_from with a checkpoint, found base"):
        tuning().external_start("tuned")


def test_a_tuned_run_that_does_not_fit_is_refused():
    for changes, message in (
        ({"talks": {"instructions": {"sequence_length": 32}}}, "max_sequence_length of t.yaml, 64"),
        (
            {"talks": {"tokenizer": {"train_vocab_size": 512}}},
            "config/data/talks.yaml: expected the tokenizer of base",
        ),
        ({"config": {"reset_trainer_state": False}}, "expected reset_trainer_state: true"),
    ):
        with pytest.raises(ValueError, match=message):
            tuning(**changes).train_config("tuned")


def test_a_further_attempt_asks_for_nodes_that_share_a_batch():
    def elastic(least: int, nodes: int = 8) -> Plan:
        plan = tuning(config={"global_train_batch_size": 2048})
        many = {"nodes": nodes, "min_nodes": least, "gpus_per_node": 8}
        runs = {"big": {"train": "t.yaml", "dataset": "mine", **many}}
        return Plan({**plan.pipeline.asdict(), "runs": runs})

    plan = elastic(4)
    assert previous_link(plan, "big") == []
    assert [plan.scheduler_resource("big", "nodes", attempt) for attempt in (1, 2, 3)] == [8, 4, 4]
    assert plan.geometry_flags("big") == "--processes 8 --nodes 8 --min-nodes 4"
    said = r"runs.big.min_nodes: .* 8 on each, share global_train_batch_size=2048 evenly; found 6. "
    with pytest.raises(ValueError, match=said + "Valid, up to 8: 1, 2, 4, 8"):
        previous_link(elastic(6), "big")
    with pytest.raises(ValueError, match=r"runs.big.nodes: .*found 7. .*, up to 7: 1, 2, 4"):
        previous_link(elastic(4, nodes=7), "big")


def test_a_soup_is_made_of_runs_and_evaluated_as_the_first():
    runs = {name: {"train": "t.yaml", "dataset": d} for name, d in (("a", "mine"), ("b", "other"))}
    runs["c"] = {"train": "t.yaml", "dataset": "mine", "start_from": "soup"}
    plan = Plan({"runs": runs, "soups": {"soup": ["b", "a"]}})
    assert plan.dataset("soup") == "other" and plan.run("soup").dataset == "other"
    assert plan.start_checkpoint("c") == ["checkpoints/soup/final"]
    with pytest.raises(ValueError, match=r"soups.soup: expected runs, found d; known are a, b"):
        Plan({"runs": runs, "soups": {"soup": ["a", "d"]}})
    with pytest.raises(ValueError, match="soups: a is also a run"):
        Plan({"runs": runs, "soups": {"a": ["a", "b"]}})
