"""Bits per byte: exact by UTF-8 bytes, for any tokenizer, in the loop and of whole documents."""

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars
import pytest
import torch
import yaml
from test_huggingface import OLMO1, OLMO2, checkpoint
from test_sft import Made, talk
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from olmo.config import DataConfig, EvaluatorConfig, TrainConfig
from olmo.corpus.listing import Entry, write_listing
from olmo.corpus.token_bytes import NO_TEXT, ByteCounter, token_bytes
from olmo.data.checks import check_token_files
from olmo.data.memmap import MemMapDataset
from olmo.distributed.world import World
from olmo.eval.harness import run_harness
from olmo.eval.perplexity import PerplexityEvaluator
from olmo.model import OLMo
from olmo.pipeline.convert import convert
from olmo.pipeline.document_losses import digest_text, document_losses
from olmo.pipeline.evaluate import evaluation
from olmo.pipeline.train import find_token_bytes
from olmo.report.scores import compute_bits_per_byte, heldout_scores

ALONE = World(0, 0, 1, torch.device("cpu"), "")
EOS, PAD, LENGTH = 0, 1, 16
SPECIAL = ["<|endoftext|>", "<|padding|>"]
TEXTS = [
    "  def f(x):\n    return x ** 2  # größer als 字 \u2028 🦜🦜\n",
    "plain words, plain words, and more plain words\n",
    "cafe\u0301 naïve",  # not in NFC: its é is three bytes here, and two in NFC
    f"before {SPECIAL[0]} after",
    f"it ends so {SPECIAL[0]}",
    "x",
    "long " * 60,
]


def train_bpe(normalizer: Any = None, vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE, as OLMo's; with 258 entries its tokens are bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def train_unigram() -> Tokenizer:
    """Whole letters, with a space put before the text and unknown tokens: not byte-level."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS[1:2], trainer)
    return made


TOKENIZERS = {
    "bytes": lambda: train_bpe(vocab_size=258),
    "bpe": train_bpe,
    "bpe, NFC": lambda: train_bpe(normalizers.NFC()),
    "unigram": train_unigram,
}


class Shard:
    """Held-out documents, their tokens as the pipeline makes them, and the bytes of these."""

    def __init__(self, folder: Path, name: str, texts: list[str] = TEXTS) -> None:
        made = TOKENIZERS[name]()
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer, self.size = folder / "tokenizer.json", made.get_vocab_size()
        self.documents, self.tokens, self.index, self.bytes = (
            folder / name for name in ("documents.gz", "tokens.npy", "index.parquet", "bytes.npy")
        )
        made.save(str(self.tokenizer))
        rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]
        self.documents.write_bytes(
            gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        )
        self.ids = [made.encode(text.strip(), add_special_tokens=False).ids for text in texts]
        self.ids = [ids if ids[-1] == EOS else [*ids, EOS] for ids in self.ids]
        np.concatenate(self.ids).astype(np.uint16).tofile(self.tokens)
        ends = np.cumsum([len(ids) for ids in self.ids])
        frame = {"start": [0, *ends[:-1]], "end": ends, "id": [row["id"] for row in rows]}
        polars.DataFrame(frame).write_parquet(self.index)
        self.facts = token_bytes.build(
            documents=self.documents,
            tokens=self.tokens,
            index=self.index,
            tokenizer=self.tokenizer,
            token_bytes=self.bytes,
        )
        self.sizes = np.split(np.fromfile(self.bytes, np.int32), ends[:-1])

    def evaluate(self, model: torch.nn.Module, length: int = LENGTH) -> dict[str, float]:
        """The metrics of the loop's evaluator."""
        sizes = {"vocab_size": self.size, "embedding_size": self.size}
        cfg = TrainConfig.new(model={**OLMO1, **sizes, "max_sequence_length": length})
        data = DataConfig(paths=[str(self.tokens)], token_bytes_paths=[str(self.bytes)])
        settings = EvaluatorConfig("heldout", data=data, device_eval_batch_size=3)
        with torch.no_grad():
            return PerplexityEvaluator(cfg, settings, ALONE)(model)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_bytes_of_tokens_add_up_to_the_text(name: str, tmp_path: Path) -> None:
    shard = Shard(tmp_path, name)
    assert shard.facts["uncounted"] == 0
    for text, ids, sizes in zip(TEXTS, shard.ids, shard.sizes, strict=True):
        assert sizes[sizes >= 0].sum() == len(text.strip().encode())
        appended = not text.strip().endswith(SPECIAL[0])  # else the last token is the text's own
        assert (sizes == NO_TEXT).tolist() == [False] * (len(ids) - 1) + [appended]
        if name == "bytes" and SPECIAL[0] not in text:
            assert set(sizes[:-1]) == {1}
    assert shard.sizes[3].max() == shard.sizes[4][-1] == len(SPECIAL[0])


def test_a_letter_of_several_tokens_is_split_as_they_split_it(tmp_path: Path) -> None:
    counter = ByteCounter(Shard(tmp_path, "bytes").tokenizer.read_bytes())
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("字é").ids
    assert counter.count("字é", [*ids, EOS]).tolist() == [1] * 5
    assert counter.count("字é", ids[:2], is_cut=True).tolist() == [1, 1]
    assert counter.count("字e", [*ids, EOS]) is None, "tokens of another text"


def test_special_names_may_be_text(tmp_path: Path) -> None:
    shard = Shard(tmp_path, "bpe")
    encoder = Tokenizer.from_file(str(shard.tokenizer))
    encoder.encode_special_tokens = True
    ids = encoder.encode(TEXTS[4]).ids
    counter = ByteCounter(shard.tokenizer.read_bytes(), special_as_text=True)
    assert EOS not in ids and counter.count(TEXTS[4], [*ids, EOS]).sum() == len(TEXTS[4])


def test_tokens_from_before_have_no_bytes(tmp_path: Path) -> None:
    """Some or all of a data set's: with a part of the files, bytes would be other tokens'."""
    for name, outputs in (
        ("none", {"tokens": 8}),
        ("new", {"heldout-tokens": 8, "heldout-token_bytes": 16}),
        ("empty", {"heldout-tokens": 0, "heldout-token_bytes": 0}),
        ("old", {"heldout-tokens": 8}),
    ):
        entries = [Entry("a", o, o, "0" * 64, size) for o, size in outputs.items()]
        write_listing(tmp_path / name, entries)
    assert len(find_token_bytes([tmp_path / "new", tmp_path / "empty"]) or ()) == 1
    assert find_token_bytes([tmp_path / "new", tmp_path / "old"]) is None
    assert find_token_bytes([tmp_path / "none"]) is None


class Constant(torch.nn.Module):
    """A model with one answer, whatever it is asked: the logits (V,)."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_in_the_loop_by_hand(name: str, tmp_path: Path) -> None:
    """A uniform answer, and one that is not; documents are cut where instances end."""
    shard = Shard(tmp_path, name)
    ids, sizes = np.concatenate(shard.ids).tolist(), np.concatenate(shard.sizes)
    whole = len(ids) // LENGTH * LENGTH
    predicted = [i for i in range(whole) if i % LENGTH and sizes[i] != NO_TEXT]
    total = sum(sizes[predicted].tolist())
    found = shard.evaluate(Constant(torch.zeros(shard.size)))["eval/heldout/BitsPerByte"]
    assert found == pytest.approx(len(predicted) * math.log2(shard.size) / total, rel=1e-7)
    if name == "bytes":  # each token one byte, but for the special names in texts
        names = sum(sizes[i] > 1 for i in predicted) * (len(SPECIAL[0]) - 1)
        assert total == len(predicted) + names
    logits = torch.randn(shard.size, generator=torch.Generator().manual_seed(0)) * 3
    nats = -logits.double().log_softmax(0)
    found = shard.evaluate(Constant(logits))["eval/heldout/BitsPerByte"]
    expected = sum(nats[ids[i]].item() for i in predicted) / math.log(2) / total
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_bytes_of_other_files_are_refused(tmp_path: Path) -> None:
    one, two = Shard(tmp_path / "one", "bpe"), Shard(tmp_path / "two", "bpe", TEXTS[1:])
    sizes = [len(np.concatenate(shard.ids)) for shard in (one, two)]
    files = [str(shard.tokens) for shard in (one, two)], [str(two.bytes), str(one.bytes)]
    dataset = MemMapDataset(*files[0], chunk_size=LENGTH, token_bytes_paths=files[1])
    expected = f"files of {4 * sizes[1]}, {4 * sizes[0]} bytes for {sizes[0]}, {sizes[1]} tokens"
    with pytest.raises(ValueError, match=f"file by file, found {expected}; correct --data.token"):
        check_token_files(dataset, one.size)


def final_of_zeros(folder: Path, vocab_size: int) -> Path:
    """A checkpoint whose every answer is uniform over its vocabulary."""
    settings = OLMO1 | {"vocab_size": vocab_size, "embedding_size": vocab_size}
    checkpoint(folder, settings | {"max_sequence_length": LENGTH})
    from olmo.checkpoint.final import write_safetensors

    model = OLMo.from_checkpoint(folder)
    write_safetensors(folder, {k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    return folder


def measure(shard: Shard, final: Path, losses: Path) -> polars.DataFrame:
    document_losses.build(
        model=final / "model.safetensors",
        config=final / "config.yaml",
        documents=[shard.documents],
        tokenizer=shard.tokenizer,
        losses=losses,
        checkpoint=final,
    )
    return polars.read_parquet(losses)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_of_whole_documents_by_hand(name: str, tmp_path: Path) -> None:
    shard = Shard(tmp_path / "shard", name)
    found = measure(shard, final_of_zeros(tmp_path / "final", shard.size), tmp_path / "losses")
    encoder = Tokenizer.from_file(str(shard.tokenizer))
    counts = [len(encoder.encode(text).ids) for text in TEXTS]
    assert found["document"].to_list() == [f"d{i}" for i in range(len(TEXTS))]
    assert found["tokens"].to_list() == counts
    assert found["digest"].to_list() == [digest_text(text) for text in TEXTS]
    assert found["bytes"].to_list() == [len(text.encode()) for text in TEXTS]
    expected = [n * math.log(shard.size) for n in counts]
    assert found["nats"].to_list() == pytest.approx(expected, rel=1e-6)
    bits, error = compute_bits_per_byte(found["nats"].to_list(), found["bytes"].to_list())
    total = sum(len(text.encode()) for text in TEXTS)
    assert bits == pytest.approx(sum(counts) * math.log2(shard.size) / total, rel=1e-6)
    assert error is not None and error > 0


def test_the_error_of_a_ratio() -> None:
    """Of documents of one size it is that of a mean; one that is alike everywhere has none."""
    bits, error = compute_bits_per_byte([10.0, 20.0, 60.0], [10, 10, 10])
    assert bits == pytest.approx(3 / math.log(2))
    assert error == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3) / math.log(2))
    assert compute_bits_per_byte([10.0, 20.0], [5, 10])[1] == pytest.approx(0)
    assert compute_bits_per_byte([10.0], [5])[1] is None
    for nats, is_known in ((math.inf, math.isinf), (math.nan, math.isnan)):  # of a diverged run
        bits, error = compute_bits_per_byte([10.0, nats], [5, 5])
        assert is_known(bits) and error is None


def test_documents_without_text_have_no_bits_per_byte() -> None:
    found = {"CrossEntropyLoss": 1.0, "Perplexity": 2.0, "stderr": 0.1, "instances": 3}
    for documents, metrics in (([0, 0], 2), ([0, 5], 3)):
        frame = polars.DataFrame({"bytes": documents, "nats": [0.0, 1.0]})
        assert len(heldout_scores(found, "heldout", frame)) == metrics


@pytest.mark.slow  # lm-eval's import alone is seconds
def test_the_same_number_as_lm_eval(tmp_path: Path) -> None:
    """The export of a model, by lm-eval's loglikelihood_rolling on the same documents."""
    # No window twice: lm-eval's logits_cache takes it for the same request, also where it predicts
    # another number of tokens.
    lengths = (127, 128, 129, 256, 257, 600)  # of windows of 128
    encoder = train_bpe(normalizers.NFC())
    numbered = {n: encoder.encode(" ".join(f"{i}" for i in range(n, n + 200))) for n in lengths}
    cut = [encoder.decode(text.ids[:n]) for n, text in numbered.items()]
    texts = [*TEXTS[:-1], *cut, "\n \n x\n\n"]
    shard = Shard(tmp_path / "shard", "bpe, NFC", texts)
    sizes = {"vocab_size": shard.size, "embedding_size": 384}
    checkpoint(tmp_path / "final", OLMO2 | sizes)
    found = measure(shard, tmp_path / "final", tmp_path / "losses.parquet")
    assert tuple(found["tokens"])[-7:-1] == lengths
    results = {"CrossEntropyLoss": 1.0, "Perplexity": 2.0, "stderr": 0.1, "instances": 3}
    (tmp_path / "heldout.json").write_text(json.dumps(results))
    evaluation.build(
        heldout=tmp_path / "heldout.json",
        scores=[],
        questions=[],
        requests=[],
        results=tmp_path / "eval",
        losses=[tmp_path / "losses.parquet"],
    )
    rows = json.loads((tmp_path / "eval/results.json").read_text())
    ours = next(row for row in rows if row["metric"] == "bits_per_byte")
    table = polars.read_parquet(tmp_path / "eval/documents.parquet")
    assert table.columns == ["dataset", "document", "digest", "tokens", "bytes", "nats"]
    assert table.drop("dataset").equals(found) and set(table["dataset"]) == {"heldout"}

    (tmp_path / "tasks").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "tasks/texts.jsonl").write_text(lines)
    files = {"test": str(tmp_path / "tasks/texts.jsonl")}
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tasks/texts.yaml").write_text(yaml.safe_dump(task))
    hf = convert(tmp_path / "final", tmp_path / "hf", kind="hf", tokenizer=shard.tokenizer)
    theirs = run_harness(hf, ["texts"], [tmp_path / "tasks"], batch_size=4)
    value = next(row["value"] for row in theirs.scores if row["metric"] == "bits_per_byte")
    assert ours["value"] == pytest.approx(value, abs=1e-6) and value > 1
    assert ours["documents"] == len(texts)


@pytest.mark.parametrize("packed", [False, True])
def test_of_conversations_the_answers_count(packed: bool, tokenizer: Path, tmp_path: Path) -> None:
    answers = [["It is so, naïve. ", " Then no."], ["Yes"], ["字 " + "far too long " * 20]]
    lines = [
        talk(*(text for answer in each for text in ("What is it?", answer))) for each in answers
    ]
    made = Made(tmp_path / "made", tokenizer, lines, sequence_length=96, packed=packed)
    inputs = {name: made.folder / name for name in ("documents", "tokens", "index", "labels")}
    token_bytes.build(**inputs, tokenizer=tokenizer, token_bytes=tmp_path / "bytes")
    sizes = np.fromfile(tmp_path / "bytes", np.int32).reshape(made.ids.shape)
    assert ((sizes >= 0) <= made.labels).all() and not (sizes[made.ids == EOS] >= 0).any()
    by_row = [sizes.ravel()[r["start"] : r["end"]] for r in made.index.iter_rows(named=True)]
    totals = [int(row[row >= 0].sum()) for row in by_row]
    whole = [sum(len(text.strip().encode()) for text in each) for each in answers]
    assert totals[:2] == whole[:2] and 0 < totals[2] < whole[2], "the last one is cut"

    final = final_of_zeros(tmp_path / "final", 300)
    document_losses.build(
        model=final / "model.safetensors",
        config=final / "config.yaml",
        documents=[inputs["documents"]],
        tokenizer=tokenizer,
        losses=tmp_path / "losses",
        checkpoint=final,
        **{name: [inputs[name]] for name in ("tokens", "index", "labels")},
    )
    found = polars.read_parquet(tmp_path / "losses")
    assert found["bytes"].to_list() == totals
    assert found["tokens"].to_list() == [int((row >= 0).sum()) for row in by_row]
    expected = [n * math.log(300) for n in found["tokens"]]
    assert found["nats"].to_list() == pytest.approx(expected, rel=1e-6)
