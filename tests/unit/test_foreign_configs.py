"""What a config that came with a checkpoint, or from a URL, may learn of this machine: nothing."""

import json
import traceback
from pathlib import Path

import pytest
import small_run
import yaml
from small_run import run, settings

from olmo.checkpoint.read import load_model
from olmo.config import TrainConfig
from olmo.config.identity import identity
from olmo.inspect.run import TrainedRun
from olmo.pipeline.convert import convert
from olmo.pipeline.plan import Plan
from olmo.tokenizer import Tokenizer

SECRET = "hunter2-of-this-machine"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", SECRET)


def config(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.filterwarnings("ignore:register_new_resolver")  # what omegaconf 2.3 calls it
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("${oc.env:SECRET_KEY}", "${oc.env:SECRET_KEY}"),
        ("https://e.vil/${oc.env:SECRET_KEY}/x", "https://e.vil/${oc.env:SECRET_KEY}/x"),
        ("${oc.env:SECRET_KEY,none}", "none"),
        ("${oc.env:OLMO_STORE,store}/objects", "/my/store/objects"),
        ("${oc.${wandb.name}:SECRET_KEY}", "${oc.${wandb.name}:SECRET_KEY}"),
        ("${oc.env:${wandb.project}}", "${oc.env:${wandb.project}}"),
        ("${oc.decode:'${oc.env:SECRET_KEY}'}", "${oc.decode:'${oc.env:SECRET_KEY}'}"),
        ("${oc.env:NO,${oc.env:SECRET_KEY}}", "${oc.env:NO,${oc.env:SECRET_KEY}}"),
        ("${path.choose:/etc/passwd,/nowhere}", "${path.choose:/etc/passwd,/nowhere}"),
        ("${path.last_checkpoint:http://e.vil}", "${path.last_checkpoint:http://e.vil}"),
        ("${another.library:x}", "${another.library:x}"),
        ("${wandb.group}", "${wandb.group}"),
        ("step${save_interval}", "step1000"),
    ],
)
def test_foreign_config(
    text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    if not OmegaConf.has_resolver("another.library"):
        OmegaConf.register_new_resolver("another.library", lambda x: SECRET)
    monkeypatch.setenv("OLMO_STORE", "/my/store")
    names = {"name": "env", "project": "SECRET_KEY", "group": "${oc.env:SECRET_KEY}"}
    path = config(tmp_path, yaml.safe_dump({"wandb": names, "save_folder": text}))
    cfg = TrainConfig.load(path, untrusted=True)
    assert cfg.save_folder == found
    # What is saved of it is still nothing that a config of the project's own would look up.
    cfg.save(tmp_path / "again.yaml")
    assert TrainConfig.load(tmp_path / "again.yaml") == cfg
    # And OmegaConf is left as it was found.
    assert OmegaConf.create({"a": "${oc.env:SECRET_KEY}"}).a == SECRET
    assert OmegaConf.create({"a": "${another.library:x}"}).a == SECRET


@pytest.mark.parametrize(
    "text",
    [
        "seed: ${oc.env:SECRET_KEY}",
        "data: {paths: '${path.glob:/etc/*}'}",
        "save_folder: ${",
        "a: &a [*a]",
        "run_name: " + "[" * 100_000,
        "? [a, b]\n: c",
        "data: {datasets: &a {x: *a}}",
        "run_name: !!python/object/apply:os.system ['touch hacked']",
        "\x00",
    ],
)
def test_a_foreign_config_that_is_none_is_a_sentence(text: str, tmp_path: Path) -> None:
    path = config(tmp_path, text)
    with pytest.raises(ValueError, match=r"config\.yaml") as caught:
        TrainConfig.load(path, untrusted=True)
    assert SECRET not in str(caught.value)


@pytest.mark.slow
def test_a_small_config_does_not_become_a_large_one(tmp_path: Path) -> None:
    """Billion laughs: each name stands for ten of the one before it."""
    lines = ["data:", "  datasets:", "    l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"    l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ValueError, match="values"):
        TrainConfig.load(config(tmp_path, "\n".join(lines)), untrusted=True)
    merged = ["x0: &x0 {a: 1}"]
    merged += [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    with pytest.raises(ValueError, match="values"):
        TrainConfig.load(config(tmp_path, "\n".join(merged)), untrusted=True)


@pytest.mark.slow
def test_everything_that_is_saved_keeps_the_expression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose own config asks the environment has the value, and its folder has not."""
    wandb = pytest.importorskip("wandb")
    told = {}
    monkeypatch.setattr(wandb, "init", lambda **given: told.update(given) or Silent())
    names = {
        "run_name": "${oc.env:SECRET_KEY}",
        "remote_save_folder": None,
        "hf_datasets_cache_dir": "/cache/${run_name}",
        "wandb": {"project": "p", "group": "${oc.env:SECRET_KEY}"},
    }
    text = yaml.safe_dump(settings(tmp_path, max_duration=2, save_interval_unsharded=2, **names))
    asked = TrainConfig.load(config(tmp_path, text))
    monkeypatch.setattr(small_run, "config", lambda folder: asked)
    assert run(tmp_path) == 0
    assert told["group"] == SECRET and SECRET not in str(told["config"])
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    configs = [path for path in files if path.name == "config.yaml"]
    assert len(configs) >= 2
    for path in configs:
        saved = yaml.safe_load(path.read_text())
        assert saved["run_name"] == "${oc.env:SECRET_KEY}"
        assert saved["hf_datasets_cache_dir"] == "/cache/${run_name}"
        assert TrainConfig.load(path).run_name == SECRET


class Silent:
    def log(self, *_: object, **__: object) -> None: ...
    def finish(self, **_: object) -> None: ...


def test_a_changed_value_is_saved_as_it_is(tmp_path: Path) -> None:
    text = "run_name: ${oc.env:SECRET_KEY}\ndata: {paths: ['${oc.env:SECRET_KEY}/a', b]}"
    cfg = TrainConfig.load(config(tmp_path, text))
    assert cfg.data.paths == [f"{SECRET}/a", "b"]
    other = cfg.update_with(data=cfg.data.update_with(paths=["c", "d"]))
    other.save(tmp_path / "other.yaml")
    saved = yaml.safe_load((tmp_path / "other.yaml").read_text())
    assert saved["data"]["paths"] == ["c", "d"] and saved["run_name"] == "${oc.env:SECRET_KEY}"
    assert TrainConfig.load(tmp_path / "other.yaml") == other


def test_what_a_run_is_known_by_does_not_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED", "7")
    text = "seed: ${oc.env:SEED}\nwandb: {group: '${oc.env:SECRET_KEY}'}"
    cfg = TrainConfig.load(config(tmp_path, text))
    with pytest.raises(ValueError, match=r"seed: expected a value.*\$\{oc\.env:SEED\}"):
        identity(cfg)
    assert SECRET not in json.dumps(
        identity(TrainConfig.load(tmp_path / "config.yaml", ["seed=1"]))
    )


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("sources", {"files": ["${oc.env:SECRET_KEY}/*.json.gz"]}, False),
        ("sources", {"url_list": "https://a.org/${oc.env:SECRET_KEY}"}, True),
        ("tokenizer", {"hub": "${oc.env:SECRET_KEY}"}, True),
        ("documents", {"weights": ["${oc.env:SECRET_KEY}=2"]}, True),
    ],
)
def test_recipes_take_places_from_the_environment(
    key: str, value: dict, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"sources": {"files": ["x"]}, "tokenizer": {"hub": "gpt2"}} | {key: value}
    Path("config/data").mkdir(parents=True)
    Path("config/data/d.yaml").write_text(yaml.safe_dump(recipe))
    plan = Plan({"runs": {}})
    if not refused:
        assert SECRET in plan.recipe("d").sources.files[0]
        return
    with pytest.raises(ValueError, match=rf"d\.yaml: {key}\..*expected a value") as caught:
        plan.recipe("d")
    assert SECRET not in str(caught.value)


def test_a_checkpoint_with_a_hostile_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generated from, converted, inspected: nothing asks the environment, and nothing is told."""
    assert run(tmp_path, max_duration=1, save_interval=None, save_interval_unsharded=1) == 0
    there = tmp_path / "run/step1-unsharded"
    (there / "manifest.json").unlink()
    hostile = yaml.safe_load((there / "config.yaml").read_text())
    hostile["tokenizer"] = {"identifier": "${oc.env:SECRET_KEY}"}
    hostile["data"]["paths"] = ["http://127.0.0.1:9/${oc.env:SECRET_KEY}.npy"]
    hostile["remote_save_folder"] = "${oc.env:SECRET_KEY}"
    (there / "config.yaml").write_text(yaml.safe_dump(hostile))
    load_model(there)
    for kind in ("safetensors", "sharded", "unsharded"):
        convert(there, tmp_path / kind, kind=kind)
    with pytest.raises(Exception) as caught:
        Tokenizer.from_checkpoint(there)
    assert SECRET not in str(caught.value)
    looked = TrainedRun(str(there))
    assert looked.cfg.remote_save_folder == "${oc.env:SECRET_KEY}"
    with pytest.raises(ValueError, match=r"oc\.env:SECRET_KEY.*replace it by the path"):
        _ = looked.dataset
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_config_of_this_project_is_resolved_when_it_is_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config/train").mkdir(parents=True)
    text = yaml.safe_dump(settings(tmp_path, run_name="${oc.env:SECRET_KEY}"))
    Path("config/train/mine.yaml").write_text(text)
    assert TrainedRun("config/train/mine.yaml").cfg.run_name == SECRET
    Path("mine.yaml").write_text(text)
    assert TrainedRun("mine.yaml").cfg.run_name == "${oc.env:SECRET_KEY}"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("seed: ${oc.env:SECRET_KEY}", "seed"),
        ("model: {d_model: 'x${oc.env:SECRET_KEY}'}", "model.d_model"),
        ("optimizer: {name: '${oc.env:SECRET_KEY}'}", "optimizer.name"),
        ("data: {paths: {a: '${oc.env:SECRET_KEY}'}}", "data.paths"),
        ("wandb: ${oc.env:SECRET_KEY}", "wandb"),
    ],
)
def test_an_error_about_a_value_of_the_environment_does_not_tell_it(
    text: str, key: str, tmp_path: Path
) -> None:
    """As where a variable of another name was meant."""
    with pytest.raises(ValueError, match=rf"{key}.*expected .*found .*oc\.env:SECRET_KEY") as told:
        TrainConfig.load(config(tmp_path, text))
    assert SECRET not in "".join(traceback.format_exception(told.value))
