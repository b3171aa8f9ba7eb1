"""What the trainer says of a config before it starts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from olmo.config import ModelConfig, TokenizerConfig, TrainConfig
from olmo.train.parallel import World
from olmo.train.start import check, check_ends, origin_of_threads, warn_of_other_tokenizer


def test_a_world_that_does_not_divide_the_batch():
    world = World(0, 0, 3, torch.device("cpu"), "three")
    with pytest.raises(ValueError, match=r"batch_size=8 is not a multiple of the 3 processes"):
        check(TrainConfig(global_train_batch_size=8), world)


EVERY = {"eos_token_id": 50256, "pad_token_id": 50256, "vocab_size": 100, "embedding_size": 128}


def test_ids_that_nothing_needs_may_be_of_another_tokenizer(capsys: pytest.CaptureFixture[str]):
    check_ends(TrainConfig.new(model=EVERY))
    said = capsys.readouterr().err
    assert "WARNING: model.eos_token_id=50256 is not below model.vocab_size=100" in said
    assert "WARNING: model.pad_token_id=50256 is not below" in said
    # Padding may be of the rows that the embedding has beyond the vocabulary.
    downstream = [{"label": "piqa", "type": "downstream"}]
    check_ends(TrainConfig.new(model=EVERY | {"pad_token_id": 127}, evaluators=downstream))


@pytest.mark.parametrize(
    "needs, id",
    [
        ({"data": {"generate_doc_lengths": True}}, "eos"),
        ({"data": {"generate_attention_mask": True}}, "pad"),
        ({"evaluators": [{"label": "a", "data": {"generate_attention_mask": True}}]}, "pad"),
        ({"evaluators": [{"label": "piqa", "type": "downstream"}]}, "pad"),
        ({"data": {"custom_dataset": {"name": "a.b"}}}, "pad"),
    ],
)
def test_ids_that_something_needs_are_of_the_vocabulary(needs: dict[str, Any], id: str):
    with pytest.raises(ValueError, match=rf"model.{id}_token_id=50256 is not below .* needs it"):
        check_ends(TrainConfig.new(model=EVERY, **needs))


def test_who_says_how_many_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `olmo train` and torchrun do
    assert origin_of_threads(TrainConfig(intra_op_threads=2)) == "intra_op_threads"
    assert origin_of_threads(TrainConfig()) == "OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert origin_of_threads(TrainConfig()) == "torch's choice"


PII = "tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"


def said(identifier: str, eos: int, capsys: pytest.CaptureFixture[str]) -> str:
    model = ModelConfig(eos_token_id=eos, vocab_size=100278)
    warn_of_other_tokenizer(
        TrainConfig(model=model, tokenizer=TokenizerConfig(identifier=identifier))
    )
    return capsys.readouterr().err


def test_the_public_configs_name_another_tokenizer(capsys: pytest.CaptureFixture[str]):
    assert "ends a text with 0, but model.eos_token_id is 50279" in said(PII, 50279, capsys)
    assert said(PII, 0, capsys) == ""
    assert said("allenai/gpt-neox-olmo-dolma-v1_5", 50279, capsys) == ""
    assert said("somebody/unknown", 3, capsys) == ""
    assert said("tokenizers/allenai_dolma2.json", 100257, capsys) == ""
    assert "ends a text with 100257, but" in said("allenai/dolma2-tokenizer", 100277, capsys)


def test_a_file_is_looked_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": [{"id": 7, "content": "<|endoftext|>"}]}))
    assert said(str(path), 7, capsys) == ""
    assert "ends a text with 7, but model.eos_token_id is 8" in said(str(path), 8, capsys)
