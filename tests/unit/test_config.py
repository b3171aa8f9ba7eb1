"""Loading is strict, tells what is wrong, and never surprises."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from olmo.config import (
    BlockType,
    DataConfig,
    EvaluatorConfig,
    ModelConfig,
    OptimizerConfig,
    SingleGPUConfig,
    TrainConfig,
)
from olmo.config.identity import NOT_IN_IDENTITY, identity


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_reads_olmo_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        run_name: small
        model: {d_model: 64, n_heads: 4, mlp_ratio: 8, init_fn: mitchell}
        optimizer: {name: adamw, learning_rate: 4e-4, betas: [0.9, 0.95]}
        wandb: {name: "${run_name}"}
        save_folder: ${path.choose:${oc.env:NOT_SET_ANYWHERE,no_exist}/checkpoints,/}/${run_name}
        max_duration: 739_328
        eval_interval: ${save_interval}
        device_eval_batch_size: ${device_train_microbatch_size}
        evaluators: [{label: a, data: {paths: [x.npy]}}]
        """,
    )
    cfg = TrainConfig.load(path)
    assert cfg.save_folder == "//small" and cfg.wandb is not None and cfg.wandb.name == "small"
    assert cfg.optimizer.learning_rate == 4e-4 and cfg.optimizer.betas == (0.9, 0.95)
    assert cfg.eval_interval == 1000, "an interpolation sees defaults that the file does not set"
    assert cfg.max_duration == 739_328 and cfg.device_eval_batch_size == 16
    assert cfg.evaluators == [EvaluatorConfig(label="a", data=DataConfig(paths=["x.npy"]))]
    assert ModelConfig.load(path, key="model") == cfg.model


def test_overrides_win_and_take_part_in_interpolation(tmp_path: Path) -> None:
    path = write(tmp_path, "eval_interval: ${save_interval}\nsave_overwrite: false")
    overrides = [
        "--save_interval=7",
        "--save-overwrite",
        "data.paths=[a,b]",
        "--model.n_heads=2",
        "--save_folder=${path.choose:s3://x}",
        "--max_duration=2e9T",
    ]
    cfg = TrainConfig.load(path, overrides)
    assert cfg.eval_interval == 7 and cfg.save_overwrite and cfg.data.paths == ["a", "b"]
    assert cfg.model.n_heads == 2 and cfg.save_folder == "s3://x" and cfg.max_duration == "2e9T"


def test_a_mapping_joins_its_section_and_a_list_replaces(tmp_path: Path) -> None:
    text = """
        optimizer: {name: adamw, weight_decay: 0.25}
        data: {datasets: {a: [p], b: [r, s]}}
        evaluators: [{label: one}, {label: two}]
        """
    overrides = [
        "--optimizer={learning_rate: 0.5}",
        "--model={n_layers: 3}",
        "--data.datasets={b: [q], c: [t]}",
        "--evaluators=[{label: three}]",
        "--wandb={name: here}",
    ]
    cfg = TrainConfig.load(write(tmp_path, text), [*overrides, "--wandb={group: there}"])
    optimizer = OptimizerConfig(name="adamw", learning_rate=0.5, weight_decay=0.25)  # type: ignore[arg-type]
    assert cfg.optimizer == optimizer and cfg.model == ModelConfig(n_layers=3)
    assert cfg.data.datasets == {"a": ["p"], "b": ["q"], "c": ["t"]}
    assert [evaluator.label for evaluator in cfg.evaluators] == ["three"]
    assert cfg.wandb is not None and (cfg.wandb.name, cfg.wandb.group) == ("here", "there")
    emptied = TrainConfig.load(tmp_path / "run.yaml", ["--data.datasets=null"])
    assert emptied.data.datasets is None


def test_path_resolvers(tmp_path: Path) -> None:
    for name in ("b.npy", "a.npy"):
        (tmp_path / name).touch()
    for name in ("step9-unsharded", "step10", "step10-unsharded", "step7"):
        (tmp_path / name).mkdir()
    text = "data: {paths: '${path.glob:%s/*.npy}'}\nload_path: ${path.last_checkpoint:%s}"
    cfg = TrainConfig.load(write(tmp_path, text % (tmp_path, tmp_path)))
    assert cfg.data.paths == [f"{tmp_path}/a.npy", f"{tmp_path}/b.npy"], "sorted"
    assert cfg.load_path == f"{tmp_path}/step10"
    (tmp_path / "more/deep").mkdir(parents=True)
    (tmp_path / "more/deep/c.npy").touch()
    every = TrainConfig.load(write(tmp_path, text.replace("/*", "/**/*") % (tmp_path, tmp_path)))
    assert every.data.paths == [f"{tmp_path}/{name}.npy" for name in ("a", "b", "more/deep/c")]
    (tmp_path / "step12").mkdir()
    (tmp_path / "step12/model.pt").touch()
    there = write(tmp_path, f"load_path: ${{path.last_checkpoint:file://{tmp_path}}}")
    assert TrainConfig.load(there).load_path == f"file://{tmp_path}/step12"
    there = write(tmp_path, "load_path: ${path.last_checkpoint:/nowhere}")
    with pytest.raises((FileNotFoundError, ValueError), match=r"no checkpoint .* in /nowhere"):
        TrainConfig.load(there)

    nowhere = write(tmp_path, "data: {paths: '${path.glob:/nowhere/*.npy}'}")
    with pytest.raises((FileNotFoundError, ValueError), match="/nowhere"):
        TrainConfig.load(nowhere)
    assert TrainConfig.load(nowhere, validate_paths=False).data.paths == []


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "optimizer: {learnin_rate: 1}",
            r"optimizer\.learnin_rate.*nearest is 'learning_rate'",
        ),
        ("seed: abc", "seed: expected a whole number, found 'abc'"),
        ("seed: 1.5", "seed: expected a whole number"),
        (
            "model: {block_type: lama}",
            "model.block_type: expected one of sequential, llama",
        ),
        ("dry_run: 3", "dry_run: expected true or false"),
        ("max_duration: 0.5", "max_duration: expected int or str, found 0.5"),
        ("evaluators: [{type: lm}]", r"evaluators\[0\]: the key 'label' is missing"),
        ("data: {paths: a.npy}", "data.paths: expected a list"),
        ("data: {memmap_dtype: uint99}", "data.memmap_dtype: expected one of uint16, .*'uint99'"),
        ("sed: 1", r"^/.*/run\.yaml: sed: no such key"),
        ("model: {d_model: null}", "model.d_model: expected a whole number"),
        ("seed: 1\nseed: 2", "the key 'seed' twice"),
        ("seed: [", "not readable as YAML"),
        ("- seed", "expected a mapping"),
        ("optimizer: [seed]", "optimizer: expected keys, as `name: …`, found"),
        ("evaluators: {label: lm}", "evaluators: expected a list, found"),
        ("run_name: ${nothing.here}", "run_name: .*nothing.here.* not found; give --run_name=…"),
        ("wandb: {name: '${oc.env:NOT_SET}'}", r"wandb\.name: .*NOT_SET.* not found"),
        (
            "save_folder: '${path.choose:/x,/y}/z'",
            "yaml: save_folder: none of these exist: /x, /y; give",
        ),
        ("run_name: '${'", "run_name: no viable alternative"),
        ("model: {use_liger: true}", r"model\.use_liger: expected false, found True: .*fork"),
        ("model: {use_mod: true, mod_every: 2}", r"model\.use_mod: expected false"),
        ("reset_scheduler_state: true", "reset_scheduler_state: expected false"),
        ("optimizer: {name: mars}", "expected one of lionw, adamw, muon, found 'mars'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig.load(write(tmp_path, text))


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file at nowhere\.yaml"):
        TrainConfig.load("nowhere.yaml")


def test_built_with_keywords() -> None:
    model = ModelConfig(block_type="llama", d_model=8)  # type: ignore[arg-type]
    assert model.block_type is BlockType.llama
    cfg = TrainConfig.new(model={"d_model": 8}, optimizer=OptimizerConfig(betas=[0.5, 0.6]))  # type: ignore[arg-type]
    assert cfg.model.d_model == 8 and cfg.optimizer.betas == (0.5, 0.6)
    with pytest.raises(ValueError, match="nearest"):
        ModelConfig.new(d_modle=8)


def test_kv_heads() -> None:
    assert ModelConfig(n_heads=8).effective_n_kv_heads == 8
    assert ModelConfig(n_heads=8, multi_query_attention=True).effective_n_kv_heads == 1
    assert ModelConfig(n_heads=8, n_kv_heads=2).effective_n_kv_heads == 2
    with pytest.raises(ValueError, match="contradicts"):
        _ = ModelConfig(n_heads=8, n_kv_heads=2, multi_query_attention=True).effective_n_kv_heads


def test_legacy_spellings(tmp_path: Path) -> None:
    text = "activation_checkpointing: true\noptimizer: {name: decoupled_lionw, eps: 1e-3}"
    cfg = TrainConfig.load(write(tmp_path, text))
    assert cfg.activation_checkpointing == "whole_layer" and cfg.optimizer.name == "lionw"


def test_saved_and_read_back(tmp_path: Path) -> None:
    cfg = TrainConfig.new(max_duration="1ep", data={"datasets": {"x": ["1.npy"]}}, compile={})
    cfg.save(tmp_path / "out.yaml")
    assert TrainConfig.load(tmp_path / "out.yaml") == cfg
    text = (tmp_path / "out.yaml").read_text()
    assert "intra_op_threads" not in text, "OLMo must be able to read what does not use ours"
    cfg.intra_op_threads = 2
    cfg.save(tmp_path / "out.yaml")
    assert TrainConfig.load(tmp_path / "out.yaml").intra_op_threads == 2


def test_a_copy_has_no_field_that_there_is_not() -> None:
    cfg = TrainConfig()
    assert cfg.update_with(save_folder="x").save_folder == "x" != cfg.save_folder
    with pytest.raises(ValueError, match=r"savefolder: no such key.*'save_folder'"):
        cfg.update_with(savefolder="x")


@pytest.mark.parametrize("text", ["1e-4", "1.5", "1_000", "yes", "2024-01-01", "a: b", "", "1ep"])
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    TrainConfig(run_name=text, max_duration=text).save(tmp_path / "out.yaml")
    cfg = TrainConfig.load(tmp_path / "out.yaml")
    assert cfg.run_name == text and cfg.max_duration == text


def test_thousands_of_paths_are_kept_out_of_omegaconf(tmp_path: Path, monkeypatch) -> None:
    import omegaconf

    seen = []
    create = omegaconf.OmegaConf.create
    monkeypatch.setattr(omegaconf.OmegaConf, "create", lambda x: seen.append(str(x)) or create(x))
    paths = [f"https://x/part-{i}.npy" for i in range(5000)]
    text = "data:\n  paths:\n" + "".join(f"    - {p}\n" for p in paths)
    assert TrainConfig.load(write(tmp_path, text)).data.paths == paths
    assert seen and not any("part-1.npy" in s for s in seen)


def test_keys_of_forks_that_change_nothing(tmp_path: Path) -> None:
    """As the seed's configs have them; what is saved is OLMo's alone."""
    text = "model: {use_liger: false, use_mod: null, mod_every: 2}\nreset_scheduler_state: false"
    cfg = TrainConfig.load(write(tmp_path, text))
    assert cfg == TrainConfig() and "use_liger" not in cfg.asdict()["model"]
    assert ModelConfig.load(tmp_path / "run.yaml", key="model") == ModelConfig()


def test_the_device_of_one_process(tmp_path: Path) -> None:
    """AI2's trainer of today writes this section into every config."""
    cfg = TrainConfig.load(write(tmp_path, "single: {device: cpu}"))
    assert cfg.single.get_device() == torch.device("cpu")
    assert identity(cfg) == {} and "single" not in TrainConfig().asdict()
    assert TrainConfig.load(write(tmp_path, "single: {device: auto}")) == TrainConfig()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"single\.device: expected auto or cpu.*found 'cuda'"):
            SingleGPUConfig("cuda").get_device()
    with pytest.raises(ValueError, match=r"single\.device: expected auto.*found 'mps'"):
        SingleGPUConfig("mps").get_device()


def test_an_unknown_type_of_tokens_is_a_type_error() -> None:
    data = DataConfig()
    data.memmap_dtype = "uint32"  # type: ignore[assignment]
    assert data.effective_memmap_dtype == np.uint32
    data.memmap_dtype = "unknown"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"data\.memmap_dtype: expected one of uint16.*'unknown'"):
        _ = data.effective_memmap_dtype


def test_every_field_of_ours_is_said_to_be() -> None:
    page = (Path(__file__).parents[2] / "docs/deviations.md").read_text()
    told = page.partition("- Our own keys, absent from saved configs")[2].partition("\n- ")[0]

    def ours(cls: type, before: str = "") -> set[str]:
        named = {before + f.name for f in dataclasses.fields(cls) if f.metadata.get("extension")}
        inner = [f for f in dataclasses.fields(cls) if f.name in ("data", "optimizer", "scheduler")]
        return named.union(*(ours(f.default_factory, f"{f.name}.") for f in inner))  # type: ignore[arg-type]

    assert {name for name in ours(TrainConfig) if f"`{name}`" not in told} == set()


def test_identity_holds_what_decides_the_bytes() -> None:
    assert identity(TrainConfig()) == {}
    cfg = TrainConfig.new(
        seed=1,
        model={"d_model": 8},
        compile={},
        save_folder="/somewhere",
        save_interval=3,
        wandb={"name": "x"},
        evaluators=[{"label": "x"}],
        data={"paths": ["a"], "num_workers": 3, "drop_last": True},
        optimizer={"name": "adamw"},
        intra_op_threads=2,
    )
    assert identity(cfg) == {
        "seed": 1,
        "model": {"d_model": 8},
        "optimizer": {"name": "adamw"},
        "data": {"drop_last": True},
        "compile": {},
        "intra_op_threads": 2,
    }
    # Read back as a config, it gives the same identity.
    assert identity(TrainConfig.new(**identity(cfg))) == identity(cfg)
    custom = {"name": "a.B", "args": {"n": 1}, "collate_config": {"index_field": "i"}}
    assert identity(TrainConfig.new(data={"custom_dataset": custom})) == {
        "data": {"custom_dataset": custom}
    }


def test_every_free_field_exists() -> None:
    for name in NOT_IN_IDENTITY:
        config: object = TrainConfig()
        for part in name.split("."):
            assert part in {f.name for f in dataclasses.fields(config)}, name  # type: ignore[arg-type]
            config = getattr(config, part)
