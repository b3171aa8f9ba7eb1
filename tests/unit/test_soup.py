"""A soup is the mean of several checkpoints' weights."""

from pathlib import Path

import pytest
import torch

from olmo.checkpoint.final import write_safetensors
from olmo.checkpoint.read import load_model
from olmo.config import ModelConfig, TrainConfig
from olmo.model import OLMo
from olmo.pipeline.soup import averaged, soup

MODEL = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 128, "embedding_size": 128,
         "rope": True, "include_bias": False, "eos_token_id": 0, "pad_token_id": 1}  # fmt: skip


def final(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **changes: int) -> Path:
    cfg = TrainConfig.new(model=MODEL | changes, run_name=folder.name)
    torch.manual_seed(seed)
    folder.mkdir()
    cfg.save(folder / "config.yaml")
    write_safetensors(folder, OLMo(cfg.model).to(dtype).state_dict(), {})
    return folder


def made(folders: list[Path], out: Path) -> Path:
    files = [folder / "model.safetensors" for folder in folders]
    config = folders[0] / "config.yaml"
    averaged.build(weights=files, config=config, final=out, checkpoints=folders)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soup_is_the_mean_of_its_weights(tmp_path: Path, dtype: torch.dtype):
    folders = [final(tmp_path / str(seed), seed, dtype) for seed in range(3)]
    weights = load_model(made(folders, tmp_path / "soup")).state_dict()
    each = [load_model(folder).state_dict() for folder in folders]
    for name, found in weights.items():
        stacked = torch.stack([one[name].double() for one in each])
        assert torch.equal(found, stacked.mean(0).to(dtype).to(found.dtype))
    assert not torch.equal(weights["transformer.wte.weight"], each[0]["transformer.wte.weight"])
    config = ModelConfig.load(tmp_path / "soup/config.yaml", key="model", validate_paths=False)
    assert config.d_model == 16
    again = made(folders, tmp_path / "again")
    assert {p.name for p in again.iterdir()} == {"config.yaml", "model.safetensors"}
    file = "model.safetensors"
    assert (again / file).read_bytes() == (tmp_path / "soup" / file).read_bytes()


def test_the_mean_of_one_model_with_itself_is_that_model(tmp_path: Path):
    one = final(tmp_path / "one", 0)
    three = made([one, one, one], tmp_path / "soup")
    assert (three / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_other_models_and_single_ones_are_refused(tmp_path: Path):
    one, other = final(tmp_path / "one", 0), final(tmp_path / "other", 0, n_layers=2)
    with pytest.raises(ValueError, match=r"one model, found different ones in .*one and .*other"):
        made([one, other], tmp_path / "soup")
    with pytest.raises(ValueError, match="at least two checkpoints to average, found 1"):
        soup([one], tmp_path / "soup")
