"""The tokenizer: trained alike on any number of threads, readable by the toolkit, checked."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from olmo.corpus.tokenizer import (
    check_tokenizer,
    local_tokenizer,
    to_portable,
    trained_tokenizer,
)

TEXTS = [
    f"def f_{n}(value):\n    return value * {n} + {n * n}  # größer als {n} 字\n"
    for n in range(300)
]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "a.gz"
    lines = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(TEXTS)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture(scope="module")
def trained(documents):
    path = documents.with_name("tokenizer.json")
    trained_tokenizer.build(documents=[documents], tokenizer=path, vocab_size=320)
    return path


def test_training_gives_the_same_bytes_on_any_number_of_threads(documents, trained):
    for threads in "1", "3":
        again = documents.with_name(f"again-{threads}.json")
        program = (
            "import sys; from pathlib import Path; a, b = map(Path, sys.argv[1:]);"
            "from olmo.corpus.tokenizer import trained_tokenizer as t;"
            "t.build(documents=[a], tokenizer=b, vocab_size=320)"
        )
        subprocess.run(
            [sys.executable, "-c", program, str(documents), str(again)],
            check=True,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
        )
        assert again.read_bytes() == trained.read_bytes()


def test_the_special_tokens_come_first_and_texts_come_back(trained):
    model = Tokenizer.from_file(str(trained))
    assert model.get_vocab_size() == 320
    assert [model.id_to_token(id) for id in range(3)] == ["<|endoftext|>", "<|padding|>", "!"]
    for text in [*TEXTS, "\x00\t\r\n 🙂 שלום e\u0301"]:
        ids = model.encode(text, add_special_tokens=False).ids
        assert model.decode(ids) == model.normalizer.normalize_str(text)


def test_merges_are_strings(trained):
    saved = json.loads(trained.read_text())
    assert saved["model"]["merges"] and all(isinstance(m, str) for m in saved["model"]["merges"])
    assert to_portable(trained.read_text()) == trained.read_text()


def test_too_few_documents_and_too_small_a_vocabulary_are_refused(documents, tmp_path):
    for vocab_size, message in (1_000_000, "no more pairs to merge"), (257, "at least 258"):
        with pytest.raises(ValueError, match=message):
            trained_tokenizer.build(
                documents=[documents], tokenizer=tmp_path / "t.json", vocab_size=vocab_size
            )


def test_a_given_tokenizer_is_kept_or_rewritten_but_encodes_alike(trained, tmp_path):
    copy, newer, mended = (tmp_path / name for name in ("copy.json", "newer.json", "mended.json"))
    local_tokenizer.build(source=trained, tokenizer=copy)
    assert copy.read_bytes() == trained.read_bytes()
    newer.write_text(Tokenizer.from_file(str(trained)).to_str())
    assert isinstance(json.loads(newer.read_text())["model"]["merges"][0], list)
    assert local_tokenizer.build(source=newer, tokenizer=mended) == {"vocab_size": 320}
    before, after = Tokenizer.from_file(str(newer)), Tokenizer.from_file(str(mended))
    assert [before.encode(t).ids for t in TEXTS] == [after.encode(t).ids for t in TEXTS]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"truncation": {"max_length": 8}}, "truncation: null"),
        ({"padding": {"pad_id": 1}}, "padding: null"),
        ({"model": {"dropout": 0.1}}, "dropout: null"),
        ({"model": {"type": "Unknown"}}, "expected a Hugging Face tokenizer.json"),
    ],
)
def test_a_tokenizer_that_would_lose_something_is_refused(trained, tmp_path, change, message):
    model = Tokenizer.from_file(str(trained))
    if "truncation" in change:
        model.enable_truncation(**change["truncation"])
    if "padding" in change:
        model.enable_padding(**change["padding"])
    content = json.loads(model.to_str())
    content["model"] |= change.get("model", {})
    source = tmp_path / "given.json"
    source.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        local_tokenizer.build(source=source, tokenizer=tmp_path / "out.json")


RIGHT = {"eos_token_id": 0, "pad_token_id": 1, "vocab_size": 320, "embedding_size": 384}


def test_a_matching_config_is_accepted(trained):
    check_tokenizer(trained, **RIGHT)
    check_tokenizer(trained, **{**RIGHT, "pad_token_id": 0, "embedding_size": None})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"eos_token_id": 50279}, r"eos_token_id: expected 0 \(<\|endoftext\|>\), found 50279"),
        ({"eos_token_id": 2}, r"found 2 \(!\)"),
        ({"pad_token_id": 2}, r"pad_token_id: expected 1 \(<\|padding\|>\), found 2"),
        ({"vocab_size": 321}, "vocab_size: expected the tokenizer's 320, found 321"),
        ({"embedding_size": 256}, "embedding_size: expected more .* 319; found 256"),
    ],
)
def test_each_mismatch_with_the_config_is_a_sentence(trained, wrong, message):
    with pytest.raises(ValueError, match=message):
        check_tokenizer(trained, **{**RIGHT, **wrong})
