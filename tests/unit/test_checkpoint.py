"""A checkpoint is whole or not there, and what is broken is told and never loaded."""

import base64
import functools
import http.server
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from servers import serving
from small_run import metrics, run, same, state

from olmo import checkpoint
from olmo.checkpoint import layout
from olmo.checkpoint.read import find_newest
from olmo.cli import main
from olmo.config import TrainConfig
from olmo.config.identity import identity
from olmo.model import OLMo
from olmo.pipeline.convert import convert


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder) == 0
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def test_layout(finished: Path) -> None:
    folder = finished / "step10-unsharded"
    files = {"config.yaml", "model.pt", "optim.pt", "train.pt", "manifest.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert (finished / "latest").resolve() == folder == (finished / "latest-unsharded").resolve()
    assert (finished / "latest").readlink() == Path("step10-unsharded"), "movable with its folder"
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert {"transformer.wte.weight", "transformer.blocks.1.att_proj.weight"} <= set(weights)
    train = torch.load(folder / "train.pt", weights_only=True)
    assert train["global_step"] == 10 and train["global_train_tokens_seen"] == 10 * 8 * 16
    groups = torch.load(folder / "optim.pt", weights_only=True)["param_groups"]
    assert groups[1]["param_names"] == ["transformer.wte.weight"]


def cut_off(folder: Path) -> None:
    path = folder / "optim.pt"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_a_file(folder: Path) -> None:
    (folder / "train.pt").unlink()


def spoil_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "damage, said",
    [
        (cut_off, "is truncated or overwritten: optim.pt has"),
        (flip_a_bit, "is corrupt: model.pt has sha256"),
        (lose_a_file, "lacks train.pt"),
        (spoil_the_manifest, "unreadable manifest"),
    ],
)
def test_a_broken_one_is_refused_and_the_one_before_taken(
    copy: Path, damage: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(copy)
    damage(copy / "step10-unsharded")
    with pytest.raises(ValueError, match=said):
        checkpoint.load_checkpoint(copy / "step10-unsharded")
    assert find_newest(copy) == copy / "step8-unsharded"
    warned = capsys.readouterr().err
    assert "WARNING: skipping a broken checkpoint" in warned and said in warned
    # The run goes on from there and comes to the same end.
    assert run(copy.parent, try_load_latest_save=True) == 0
    assert same(before, state(copy))


def test_pickled_code_does_not_run(copy: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = copy / "step10-unsharded"
    (folder / "manifest.json").unlink()
    torch.save({"weight": Trap()}, folder / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: it contains pickled code"):
        checkpoint.load_checkpoint(folder)
    (folder / "model.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"cannot read .*model\.pt"):
        checkpoint.load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_another_models_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    load = {"load_path": str(finished / "latest"), "reset_trainer_state": True}
    with pytest.raises(ValueError, match=r"wte\.weight is \(128, 16\), the config's model has"):
        run(tmp_path, model={"d_model": 32}, **load)
    with pytest.raises(ValueError, match=r"has no weight transformer\.blocks\.2"):
        run(tmp_path, model={"n_layers": 3}, save_overwrite=True, **load)
    with pytest.raises(ValueError, match=r"has a weight transformer\.blocks\.1"):
        run(tmp_path, model={"n_layers": 1}, save_overwrite=True, **load)


def test_retention(tmp_path: Path) -> None:
    """Each kind has a count of its own."""
    changes: dict[str, Any] = {"save_interval_unsharded": 5, "save_interval": 2, "evaluators": []}
    changes |= {"save_num_unsharded_checkpoints_to_keep": 2, "save_num_checkpoints_to_keep": 1}
    run(tmp_path, **changes)
    names = [path.name for path in layout.list_checkpoints(tmp_path / "run")]
    assert names == ["step5-unsharded", "step8", "step10-unsharded"]
    none: dict[str, Any] = {"save_num_checkpoints_to_keep": 0, "save_overwrite": True}
    run(tmp_path, **changes | none)
    assert not layout.list_checkpoints(tmp_path / "run", unsharded=False)


def test_what_was_written_over_is_not_taken_for_the_newest(copy: Path) -> None:
    assert run(copy.parent, save_overwrite=True, seed=1, stop_after=3) == 75
    assert find_newest(copy) == copy / "step3-unsharded"
    assert run(copy.parent, try_load_latest_save=True, save_overwrite=True, seed=1) == 0
    assert [line["step"] for line in metrics(copy)] == list(range(11))


def test_an_optimizer_goes_on_though_the_steps_are_counted_anew(
    finished: Path, tmp_path: Path
) -> None:
    run(tmp_path, load_path=str(finished / "latest"), reset_trainer_state=True, max_duration=2)
    optim = torch.load(tmp_path / "run/latest/optim.pt", weights_only=True)
    assert {kept["step"].item() for kept in optim["state"].values()} == {12}
    train = torch.load(tmp_path / "run/latest/train.pt", weights_only=True)
    assert train["global_step"] == 2


def test_blocks_may_be_grouped_anew(finished: Path, tmp_path: Path) -> None:
    """A checkpoint of single blocks goes on in groups of two, optimizer and all."""
    load = {"load_path": str(finished / "step4-unsharded"), "save_folder": str(tmp_path / "on")}
    assert run(tmp_path, model={"block_group_size": 2}, **load) == 0
    losses = [
        [m["train/CrossEntropyLoss"] for m in metrics(folder)[-6:]]
        for folder in (finished, tmp_path / "on")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_final_has_the_same_bytes_in_equal_runs(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    run(other, stop_after=7, save_interval_unsharded=3, console_log_interval=5)
    assert run(other, try_load_latest_save=True) == 0
    for save_folder, out in ((finished, "a"), (other / "run", "b")):
        cfg = TrainConfig.load(save_folder / "config.yaml")
        train = checkpoint.export_final(save_folder, tmp_path / out, identity(cfg))
        assert train["global_step"] == 10
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    assert set(first) == {"config.yaml", "model.safetensors", "optim.safetensors", "train.json"}
    assert first == second
    assert not any(str(tmp_path).encode() in text for text in first.values())


def test_final_is_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    cfg = TrainConfig.load(finished / "config.yaml")
    checkpoint.export_final(finished, tmp_path / "final", identity(cfg))
    of_final = checkpoint.load_model(tmp_path / "final")
    of_run = checkpoint.load_model(finished / "latest")
    ids = torch.arange(2, 18)[None]
    assert torch.equal(of_final(ids).logits, of_run(ids).logits)
    # And a run goes on from it as from the run's own.
    for name, load_path in (("a", tmp_path / "final"), ("b", finished / "latest")):
        changes = {"load_path": str(load_path), "save_folder": str(tmp_path / name)}
        assert run(tmp_path, max_duration=14, **changes) == 0
    assert same(state(tmp_path / "a"), state(tmp_path / "b"))
    assert metrics(tmp_path / "a")[0]["step"] == 11


def test_an_unfinished_run_has_no_final(tmp_path: Path) -> None:
    run(tmp_path, stop_after=2)
    with pytest.raises(ValueError, match="has not finished"):
        checkpoint.export_final(tmp_path / "run", tmp_path / "final", {})


def test_an_optimizer_state_by_name_fits_other_groupings() -> None:
    """FSDP's form, names in the place of numbers and wrappers in the names."""
    from olmo.checkpoint.optim_state import load_named_state, to_named_state

    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [parameter], "param_names": ["a.weight"]}])
    state = {"_fsdp_wrapped_module.a.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2),
             "exp_avg_sq": torch.ones(2)}}  # fmt: skip
    groups = [{"params": ["_fsdp_wrapped_module.a.weight"], "lr": 0.5}]
    load_named_state(optimizer, *to_named_state({"state": state, "param_groups": groups}))
    assert optimizer.state[parameter]["exp_avg"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no param_names"):
        to_named_state({"state": {}, "param_groups": [{"params": [0]}]})
    with pytest.raises(ValueError, match=r"nothing for a\.weight"):
        load_named_state(optimizer, {}, [{"param_names": ["b"]}])


def test_sweeping_leaves_what_is_whole(copy: Path) -> None:
    shutil.copytree(copy / "step8-unsharded", copy / "step9-unsharded.partial")
    shutil.move(copy / "step4-unsharded", copy / "step4-unsharded.replaced")
    layout.remove_leftovers(copy)
    names = [path.name for path in sorted(copy.glob("step*"))]
    assert names == ["step0-unsharded", "step10-unsharded", "step8-unsharded"]
    assert json.loads((copy / "step8-unsharded/manifest.json").read_text())["files"]


def test_unknown_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains none of model\.pt.*unshard\.py"):
        checkpoint.load_checkpoint(tmp_path)


def olmo_key(path: tuple[str, ...], pickled: bool) -> str:
    """A key as OLMo writes it."""
    return base64.urlsafe_b64encode(pickle.dumps((path, pickled))).decode()


def as_olmo_writes(folder: Path) -> None:
    """model.pt and optim.pt as OLMo's safetensors files."""
    weights = torch.load(folder / "model.pt", weights_only=True)
    optim = torch.load(folder / "optim.pt", weights_only=True)
    state = {
        olmo_key(("state", name, part), False): tensor
        for names, numbers in ((g["param_names"], g["params"]) for g in optim["param_groups"])
        for name, number in zip(names, numbers, strict=True)
        for part, tensor in optim["state"][number].items()
    }
    groups = [g | {"params": g["param_names"]} for g in optim["param_groups"]]
    state[olmo_key(("param_groups",), True)] = torch.frombuffer(
        bytearray(pickle.dumps(groups)), dtype=torch.uint8
    )
    for name, tensors in (
        ("model", {olmo_key((name,), False): t for name, t in weights.items()}),
        ("optim", state),
    ):
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.pt").unlink()
    (folder / "manifest.json").unlink()


def test_olmos_own_safetensors(copy: Path) -> None:
    plain = checkpoint.load_checkpoint(copy / "latest")
    as_olmo_writes(copy / "step10-unsharded")
    encoded = checkpoint.load_checkpoint(copy / "latest")
    assert same(plain.model, encoded.model) and plain.optim and encoded.optim
    assert same(plain.optim[0], encoded.optim[0])
    changes: dict[str, Any] = {"max_duration": 12, "save_folder": str(copy.parent / "on")}
    assert run(copy.parent, load_path=str(copy / "latest"), **changes) == 0


def test_olmos_own_safetensors_run_no_code(copy: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = copy / "step10-unsharded"
    as_olmo_writes(folder)
    key = base64.urlsafe_b64encode(pickle.dumps((("a", Trap()), False))).decode()
    save_file({key: torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"which is not allowed"):
        checkpoint.load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def served(finished: Path) -> Iterator[str]:
    """The finished run by http."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            return self.send_error(403) if "secret" in self.path else super().send_head()

    handler = functools.partial(Handler, directory=str(finished))
    with serving(handler) as address:
        yield address


def test_by_url(finished: Path, served: str, tmp_path: Path) -> None:
    for name, place in (
        ("a", str(finished / "step8-unsharded")),
        ("b", served + "/step8-unsharded"),
    ):
        changes = {"load_path": place, "save_folder": str(tmp_path / name)}
        assert run(tmp_path, **changes) == 0
    assert same(state(tmp_path / "a"), state(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"cannot load http.*step9-unsharded: .*404"):
        run(tmp_path, load_path=f"{served}/step9-unsharded")
    with pytest.raises(ValueError, match=r"cannot load http.*step8-unsharded: .*403 .*refused"):
        run(tmp_path, load_path=f"{served}/secret/step8-unsharded", save_overwrite=True)
    # Sharded, which names its files in its index.
    convert(finished / "step8-unsharded", finished / "other", "sharded")
    sharded = {"load_path": f"{served}/other/step8", "save_folder": str(tmp_path / "c")}
    assert run(tmp_path, **sharded) == 0
    assert same(state(tmp_path / "a"), state(tmp_path / "c"))
    # Two URLs that end alike are two checkpoints.
    shutil.copytree(finished / "step4-unsharded", finished / "other/step8-unsharded")
    other = {"load_path": f"{served}/other/step8-unsharded", "save_folder": str(tmp_path / "b")}
    run(tmp_path, dry_run=True, save_overwrite=True, **other)
    found = {
        torch.load(p, weights_only=True)["global_step"]
        for p in tmp_path.rglob("loaded/*/*/train.pt")
    }
    assert found == {4, 8}
    shutil.rmtree(finished / "other")


def test_a_package_that_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cached_path", None)
    with pytest.raises(ValueError, match=r"config\.yaml needs a package: .*cached_path"):
        run(tmp_path, load_path="hf://somebody/something/step1-unsharded")


def test_the_command_converts(
    finished: Path, served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between all kinds, from a path and from a URL."""
    original = torch.load(finished / "step10-unsharded/optim.pt", weights_only=True)
    at = f"{served}/step10-unsharded"
    for kind in ("sharded", "safetensors", "unsharded"):
        main(["checkpoint", "convert", at, str(tmp_path / kind), "--kind", kind])
        at = capsys.readouterr().out.strip().removeprefix("written: ")
    assert same(original, torch.load(Path(at) / "optim.pt", weights_only=True))
    assert sorted(path.name for path in (tmp_path / "sharded").iterdir()) == ["latest", "step10"]
    with pytest.raises(SystemExit, match="--kind: expected one of unsharded, sharded, safe"):
        main(["checkpoint", "convert", at, str(tmp_path / "x"), "--kind", "gguf"])


def test_a_model_by_olmos_own_name(finished: Path, served: str, tmp_path: Path) -> None:
    sharded = convert(finished / "latest", tmp_path, "sharded")
    ids = torch.arange(2, 18)[None]
    places = [finished / "latest", str(sharded), f"{served}/step10-unsharded"]
    models = [OLMo.from_checkpoint(place) for place in places]
    logits = [model(ids).logits for model in models]
    assert not models[0].training
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_converted_there_and_back(finished: Path, tmp_path: Path) -> None:
    """A run goes on from each kind as from the original."""
    kinds = {"sharded": finished / "latest"}
    kinds["safetensors"] = convert(kinds["sharded"], tmp_path / "sharded", "sharded")
    kinds["unsharded"] = convert(kinds["safetensors"], tmp_path / "st", "safetensors")
    back = convert(kinds["unsharded"], tmp_path / "back", "unsharded")
    assert back.name == "step10-unsharded"
    original = checkpoint.load_checkpoint(finished / "latest")
    for folder in (*kinds.values(), back):
        found = checkpoint.load_checkpoint(folder)
        assert same(original.model, found.model) and original.optim and found.optim
        assert same(original.optim[0], found.optim[0])
    for name in ("model.pt", "train.pt"):
        old, new = (torch.load(f / name, weights_only=True) for f in (finished / "latest", back))
        assert same(old, new)
    changes: dict[str, Any] = {"max_duration": 12, "evaluators": []}
    for name, folder in (("a", finished / "latest"), ("b", back)):
        save = str(tmp_path / f"run-{name}")
        assert run(tmp_path, load_path=str(folder), save_folder=save, **changes) == 0
    assert same(state(tmp_path / "run-a"), state(tmp_path / "run-b"))
    with pytest.raises(ValueError, match="expected one of unsharded, sharded, safetensors"):
        convert(back, tmp_path / "x", "gguf")


def test_a_trainer_state_of_olmos_is_written_as_json(copy: Path, tmp_path: Path) -> None:
    """With the state of numpy's generator, which JSON has no words for, and paths."""
    folder = copy / "step8-unsharded"
    (folder / "manifest.json").unlink()
    train = torch.load(folder / "train.pt", weights_only=True)
    generators = {"numpy": np.random.get_state(), "torch": torch.random.get_rng_state()}
    theirs = {"rng": generators, "checkpoints": [Path("/weka/step4")]}
    torch.save(train | theirs, folder / "train.pt")
    convert(folder, tmp_path / "out", "safetensors")
    told = json.loads((tmp_path / "out/train.json").read_text())
    assert told.pop("optimizer")
    assert told == train | {"checkpoints": ["/weka/step4"]}
    torch.save(train | {"more": torch.zeros(3)}, folder / "train.pt")
    with pytest.raises(ValueError, match="plain values in the trainer's state, found a Tensor"):
        convert(folder, tmp_path / "none", "safetensors")
    assert not (tmp_path / "none").exists()
