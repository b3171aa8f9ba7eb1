"""The names that OLMo's users import are where they look for them, and do what they expect."""

import doctest
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import olmo
from olmo import BlockType, LayerNorm, ModelConfig, OLMo, Tokenizer, TrainConfig
from olmo.checkpoint import FullCheckpointer
from olmo.compat.data.util import get_document_lengths
from olmo.compat.exceptions import OLMoConfigurationError
from olmo.compat.initialization import init_normal
from olmo.compat.torch_util import get_cumulative_document_lengths, get_world_size, seed_all
from olmo.config import (
    BaseConfig,
    CustomDatasetCollatorConfig,
    CustomDatasetConfig,
    DataConfig,
    PaddingDirection,
    StrEnum,
)
from olmo.data import (
    DataCollator,
    IterableDataset,
    MemMapDataset,
    build_collator,
    build_train_dataloader,
)
from olmo.data.collator import CustomDatasetDataCollator
from olmo.data.custom_datasets import build_custom_dataset, extract_module_and_class
from olmo.model import (
    BufferCache,
    LayerNormBase,
    OLMoBlock,
    OLMoLlamaBlock,
    OLMoSequentialBlock,
)
from olmo.optim import (
    AdamW,
    BoltOnWarmupScheduler,
    LinearWithWarmup,
    build_optimizer,
    build_scheduler,
)

SMALL = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "max_sequence_length": 8,
    "vocab_size": 64,
    "embedding_size": 64,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}


@pytest.fixture
def cfg(tmp_path: Path) -> TrainConfig:
    np.arange(2, 42, dtype=np.uint16).tofile(tmp_path / "tokens.npy")
    return TrainConfig.new(
        model=SMALL,
        optimizer={"name": "adamw"},
        data={"paths": [str(tmp_path / "tokens.npy")]},
        global_train_batch_size=2,
        device_train_batch_size=2,
        save_folder=str(tmp_path / "run"),
    )


@pytest.mark.parametrize("name", olmo.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert inspect.isclass(getattr(olmo, name)) or name == "load_model"


@pytest.mark.parametrize(
    "path",
    [
        "olmo.exceptions:OLMoConfigurationError",
        "olmo.initialization:init_normal",
        "olmo.torch_util:seed_all",
        "olmo.data.iterable_dataset:IterableDataset",
        "olmo.data.memmap_dataset:MemMapDataset",
        "olmo.data.util:get_document_lengths",
    ],
)
def test_olmos_import_paths(path: str) -> None:
    assert pkgutil.resolve_name(path)


def test_importing_costs_nothing() -> None:
    program = "import olmo, olmo.data, olmo.model, olmo.checkpoint, olmo.train, sys"
    heavy = "assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{program}\n{heavy}"], check=True)
    with pytest.raises(AttributeError, match=r"module 'olmo\.data' has no attribute 'Nothing'"):
        _ = olmo.data.Nothing


def test_what_the_first_batch_held(
    cfg: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/inspect.md, the steps of OLMo's own README: from a config and an order to tokens."""
    list(build_train_dataloader(cfg))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg.asdict()))
    (tmp_path / "run/train_data/global_indices.npy").rename(tmp_path / "global_indices.npy")
    monkeypatch.chdir(tmp_path)

    page = Path(__file__).parents[2] / "docs/inspect.md"
    test = doctest.DocTestParser().get_doctest(page.read_text(), {}, page.name, str(page), 0)
    assert doctest.DocTestRunner().run(test, clear_globs=False) == (0, len(test.examples))
    instances = test.globs["get_batch_instances"](0)
    first = next(iter(build_train_dataloader(cfg.update_with(save_overwrite=True))))
    assert instances == first["input_ids"].tolist() and len(instances[0]) == 8


def test_configs_are_built_changed_and_saved_by_their_owner(tmp_path: Path) -> None:
    config = ModelConfig(block_type="llama", **SMALL)  # type: ignore[arg-type]
    assert config.block_type is BlockType.llama and isinstance(BlockType.llama, StrEnum)
    config.n_layers = 1
    config.save(tmp_path / "model.yaml")
    assert ModelConfig.load(tmp_path / "model.yaml") == config and isinstance(config, BaseConfig)
    assert OLMoConfigurationError is ValueError
    with pytest.raises(OLMoConfigurationError):
        ModelConfig.load(tmp_path / "model.yaml", overrides=["d_modle=3"], validate_paths=False)


def test_a_model_as_olmo_calls_it() -> None:
    config = ModelConfig(rope=True, **SMALL)  # type: ignore[arg-type]
    seed_all(3)
    model = OLMo(config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = model(ids, attention_mask=torch.ones(1, 4)).logits
    past = model(ids[:, :3], use_cache=True).attn_key_values
    last = model(ids[:, 3:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(whole[:, 3:], last)
    for block in (OLMoBlock, OLMoSequentialBlock, OLMoLlamaBlock):
        made = block(layer_id=0, config=config, cache=BufferCache())
        made.reset_parameters()
        assert made.ff_out.weight.std().item() == pytest.approx(0.02, rel=0.2)
    norm = LayerNorm.build(config, size=4)
    assert isinstance(norm, LayerNormBase) and norm.weight is not None
    torch.testing.assert_close(
        norm(torch.eye(4)), torch.nn.functional.layer_norm(torch.eye(4), [4])
    )
    linear = torch.nn.Linear(100, 100)
    init_normal(linear, std=0.5, init_cutoff_factor=2.0)
    assert linear.weight.abs().max() <= 1.0 and not linear.bias.any()


def test_optimizer_and_schedules(cfg: TrainConfig) -> None:
    optimizer, scheduler = build_optimizer(cfg, OLMo(cfg.model)), build_scheduler(cfg)
    assert isinstance(optimizer, AdamW) and len(optimizer.param_groups) == 2
    assert scheduler.get_lr(1.0, 100, 1000) == 1.0
    line = LinearWithWarmup(
        grad_clip_warmup_steps=None, grad_clip_warmup_factor=None, warmup_steps=10,
        warmup_min_lr=None,
    )  # fmt: skip
    assert BoltOnWarmupScheduler.wrap(line, 50, 60).get_lr(1.0, 50, 100) == 0.0


@pytest.mark.parametrize("block_group_size", [1, 2])
def test_an_unsharded_checkpoint_by_hand(
    cfg: TrainConfig, tmp_path: Path, block_group_size: int
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])

    def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = OLMo(cfg.model.update_with(block_group_size=block_group_size))
        optimizer = build_optimizer(cfg, model)
        model(ids).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        return model, optimizer

    (model, optimizer), (other, its_optimizer) = trained(), trained()
    checkpointer, folder = FullCheckpointer(cfg), tmp_path / "checkpoint"
    checkpointer.save_checkpoint(folder, model, optimizer, {"global_step": 1})
    with pytest.raises(ValueError, match="already exists; set save_overwrite"):
        checkpointer.save_checkpoint(folder, model, optimizer, {})
    state = checkpointer.restore_checkpoint(folder, other, its_optimizer)
    assert state == {"global_step": 1} and torch.equal(model(ids).logits, other(ids).logits)
    first, second = (next(iter(o.state.values()))["exp_avg"] for o in (optimizer, its_optimizer))
    assert torch.equal(first, second) and first.any()

    weights, kept = checkpointer.load_checkpoint(folder, device=torch.device("cpu"))
    assert weights.keys() == model.state_dict().keys() and kept is not None
    assert kept["state"].keys() == weights.keys()
    assert kept["param_groups"][0]["lr"] == cfg.optimizer.learning_rate


def test_data_as_olmo_calls_it(cfg: TrainConfig) -> None:
    assert cfg.data.paths is not None
    dataset = MemMapDataset(*cfg.data.paths, chunk_size=8, metadata={"label": "x"})
    joined = dataset + dataset
    assert len(joined) == 10 and joined[-1]["metadata"] == {"label": "x"}
    share = IterableDataset(dataset, 2, seed=1, epoch=2, world_size=2, rank=1, shuffle=False)
    assert [item["index"] for item in share] == [1, 3, 0]
    assert share.get_global_indices().tolist() == [0, 1, 2, 3, 4, 0]
    cfg.data.pad_direction = PaddingDirection.left
    collator = build_collator(cfg)
    assert isinstance(collator, DataCollator)
    assert collator([[5], [6, 7]])["input_ids"].tolist() == [[1, 5], [6, 7]]
    lengths = get_document_lengths(torch.tensor([3, 0, 4, 4, 0, 5]), eos_token_id=0)
    assert lengths.tolist() == [2, 3, 1]
    ends = get_cumulative_document_lengths(torch.tensor([[2, 3, 1], [6, 0, 0]]))
    assert ends.tolist() == [0, 2, 5, 6, 12] and get_world_size() == 1


def test_custom_data_sets(cfg: TrainConfig) -> None:
    assert extract_module_and_class("a.b.C") == ("a.b", "C")
    assert extract_module_and_class("C") == (None, "C")
    cfg.data.custom_dataset = CustomDatasetConfig(name="collections.Counter", args={"x": 9})
    assert build_custom_dataset(cfg)["x"] == 9
    with pytest.raises(ValueError, match=r"excludes data\.paths"):
        build_train_dataloader(cfg)
    fields = CustomDatasetCollatorConfig(input_id_field="ids", label_mask_field="counts")
    cfg.data = DataConfig(custom_dataset=CustomDatasetConfig(name="C", collate_config=fields))
    collator = build_collator(cfg)
    assert isinstance(collator, CustomDatasetDataCollator)
    batch = collator([{"ids": [4, 5], "counts": [True, False], "other": 3}])
    assert batch["input_ids"].tolist() == [[4, 5]]
    assert batch["label_mask"].tolist() == [[True, False]] and "other" not in batch

    cfg.data.custom_dataset.collate_fn = "random.uniform"
    assert build_collator(cfg)(3, 3) == 3  # type: ignore[call-arg]
    cfg.data.custom_dataset = CustomDatasetConfig(name="json.loads", collate_fn="dumps")
    assert build_collator(cfg)([1]) == "[1]"
    cfg.data.custom_dataset = CustomDatasetConfig(name="Nothing")
    with pytest.raises(ValueError, match=r"no module; set data\.custom_dataset\.module"):
        build_custom_dataset(cfg)


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<end>", "<pad>", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    return tmp_path / "words.json"


def test_tokenizer(tokenizer_file: Path, cfg: TrainConfig) -> None:
    tokenizer = Tokenizer.from_file(tokenizer_file, eos_token_id=0, pad_token_id=1)
    assert tokenizer.encode("a b <end>") == [2, 3, 0] and tokenizer.encode("a b") == [2, 3, 0]
    assert tokenizer.encode_batch(["a", "b c"], add_special_tokens=False) == [[2], [3, 4]]
    assert tokenizer.decode([2, 3]) == "a b" and tokenizer.eos_token == "<end>"
    tokenizer.truncate_to = 3
    assert tokenizer.encode("a b c d") == [2, 3, 0]
    tokenizer.truncate_direction = "left"  # type: ignore[assignment]
    assert tokenizer.encode("a b c d", add_special_tokens=False) == [3, 4, 5]

    cfg.tokenizer.identifier = str(tokenizer_file)
    with pytest.raises(ValueError, match=r"expected model\.vocab_size=64 tokens, found 6"):
        Tokenizer.from_train_config(cfg)
    cfg.model.vocab_size = 6
    assert Tokenizer.from_train_config(cfg).pad_token == "<pad>"
    cfg.save(tokenizer_file.parent / "config.yaml")
    assert Tokenizer.from_checkpoint(tokenizer_file.parent).vocab_size == 6
    assert Tokenizer.from_file(tokenizer_file).eos_token_id == 5


def test_tokenizers_of_olmos_package_are_on_the_hub(
    tokenizer_file: Path, cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def from_pretrained(identifier: str, **options: int) -> Tokenizer:
        asked.append(identifier)
        return Tokenizer.from_file(tokenizer_file, **options)

    monkeypatch.setattr(Tokenizer, "from_pretrained", from_pretrained)
    cfg.model.vocab_size = 6
    for name in ("tokenizers/allenai_dolma2.json", "gpt2"):
        cfg.tokenizer.identifier = name
        Tokenizer.from_train_config(cfg)
    assert asked == ["allenai/dolma2-tokenizer", "gpt2"]
