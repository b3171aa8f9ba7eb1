"""What the trainer says of a config before it starts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch

from olmo.bench import cell as bench_cell
from olmo.bench.matrix import Cell, load_section
from olmo.config import ModelConfig, TokenizerConfig, TrainConfig
from olmo.distributed.world import World
from olmo.train import loop, setup
from olmo.train.__main__ import main
from olmo.train.validate import check_special_tokens, validate, warn_of_other_tokenizer


def test_a_world_that_does_not_divide_the_batch():
    world = World(0, 0, 3, torch.device("cpu"), "three")
    with pytest.raises(ValueError, match=r"batch_size=8 is not a multiple of the 3 processes"):
        validate(TrainConfig(global_train_batch_size=8), world)


EVERY = {"eos_token_id": 50256, "pad_token_id": 50256, "vocab_size": 100, "embedding_size": 128}


def test_ids_that_nothing_needs_may_be_of_another_tokenizer(capsys: pytest.CaptureFixture[str]):
    check_special_tokens(TrainConfig.new(model=EVERY))
    said = capsys.readouterr().err
    assert "WARNING: model.eos_token_id=50256 is not below model.vocab_size=100" in said
    assert "WARNING: model.pad_token_id=50256 is not below" in said
    # Padding may be of the rows that the embedding has beyond the vocabulary.
    downstream = [{"label": "piqa", "type": "downstream"}]
    check_special_tokens(
        TrainConfig.new(model=EVERY | {"pad_token_id": 127}, evaluators=downstream)
    )


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
        check_special_tokens(TrainConfig.new(model=EVERY, **needs))


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


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention": "cudnn"}, "it is a kernel for NVIDIA GPUs"),
    ({"model": {"flash_attention": True}}, "model.flash_attention=true is not available"),
    ({"fp8": {"backend": "native", "scaling": "delayed", "recipe": "rowwise"}}, "tensorwise"),
    ({"master_weights": True}, "precision is fp32"),
    ({"use_msamp": True}, "the package msamp"),
    ({"cross_entropy": "torch", "softmax_auxiliary_loss": True}, "z-loss|2.13 has"),
    (
        {"compile": {"mode": "max-autotune", "coordinate_descent_tuning": True}},
        "--compile.mode=null",
    ),
    ({"optimizer": {"name": "lionw", "packed_state": True}}, "packed_state is for adamw"),
    ({"optimizer": {"packed_state": True, "selective_updates": True}}, "one scale for a whole"),
    ({"optimizer": {"name": "muon", "selective_updates": True}}, "Muon on whole matrices"),
    (
        {"optimizer": {"learning_rate": 1.0}, "scheduler": {"warmup_min_lr": 1.0}},
        r"scheduler\.warmup_min_lr must be from 0 to below",
    ),
    ({"fsdp": {"wrapping_strategy": "by_block_group"}}, "needs model.block_group_size above 1"),
    ({"wandb": {"name": "x"}}, "`wandb`, but the package is not installed"),
    ({"load_path": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_what_cannot_be_computed_is_refused_before_a_model_is_built(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Building one takes minutes, for a large model."""

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built first")

    monkeypatch.setattr(setup, "OLMo", built)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((ValueError, OSError), match=told):
        small_run.run(tmp_path, **changes)


@pytest.mark.slow
def test_a_bench_cell_is_refused_before_its_model_is_built(monkeypatch: pytest.MonkeyPatch):
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built first")

    monkeypatch.setattr(bench_cell, "OLMo", built)
    section = load_section(Path(__file__).parents[2] / "config/bench/tps.yaml", "cpu")
    for asked, told in (
        ({"attention": "cudnn"}, "NVIDIA"),
        ({"fp8": "msamp"}, "msamp"),
        ({"switch": "master_weights"}, "amp_bf16"),
    ):
        record = bench_cell.run_cell(section, Cell("tiny", **asked))
        assert record["status"] == "unavailable" and told in record["why"]


def test_a_full_gpu_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path):
    said = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB "
        "of which 1.00 GiB is free. Of the allocated memory 20.00 GiB is allocated by PyTorch."
    )

    def full(cfg: TrainConfig) -> int:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(loop, "train", full)
    config = Path(small_run.command(tmp_path)[-1])
    assert main([str(config)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "1.00 GiB is free. Halve --device_train_microbatch" in error[0]
