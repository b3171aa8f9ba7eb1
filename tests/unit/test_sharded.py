"""Sharded checkpoints, torch layout: a resumed run has the same bits, and loading runs no code."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import run, same, state

from olmo import checkpoint
from olmo.checkpoint import layout
from olmo.checkpoint.sharded import list_shard_files
from olmo.pipeline.convert import convert


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(folder, evaluators=[]) == 0
    return folder / "run"


SHARDED: dict[str, Any] = {"save_interval": 3, "save_interval_unsharded": None}


def test_sharded_ones(tmp_path: Path) -> None:
    assert run(tmp_path, save_folder=str(tmp_path / "straight"), **SHARDED) == 0
    resumed: dict[str, Any] = {"save_folder": str(tmp_path / "resumed"), **SHARDED}
    assert run(tmp_path, stop_after=7, **resumed) == 75
    newest_sharded = layout.list_checkpoints(tmp_path / "resumed", unsharded=False)[-1]
    assert newest_sharded.name == "step6"
    shutil.rmtree(tmp_path / "resumed/step7-unsharded")
    assert run(tmp_path, try_load_latest_save=True, **resumed) == 0
    assert same(state(tmp_path / "straight"), state(tmp_path / "resumed"))
    files = {p.relative_to(newest_sharded).as_posix() for p in newest_sharded.rglob("*")}
    assert {"config.yaml", "model_and_optim/.metadata", "train/rank0.pt", "manifest.json"} <= files


def test_only_the_newest_ephemeral_one_stays(tmp_path: Path) -> None:
    changes: dict[str, Any] = SHARDED | {"save_interval": 8, "save_interval_ephemeral": 3}
    run(tmp_path, no_pre_train_checkpoint=True, stop_after=7, **changes)
    names = [path.name for path in layout.list_checkpoints(tmp_path / "run")]
    assert names == ["step6", "step7-unsharded"]
    run(tmp_path, try_load_latest_save=True, **changes)
    assert not (tmp_path / "run/step6").exists() and (tmp_path / "run/step8").exists()


def names(folder: Path) -> list[str]:
    return [path.name for path in layout.list_checkpoints(folder)]


def test_the_end_is_saved_in_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"save_interval": 4, "no_pre_train_checkpoint": True, "stop_at": 8}
    assert run(tmp_path, save_interval_unsharded=5, **changes) == 0
    assert names(tmp_path / "run") == ["step4", "step5-unsharded", "step8-unsharded", "step8"]
    assert "step8-unsharded" in (tmp_path / "run/finished.json").read_text()
    # Where no unsharded ones are asked for, the sharded one of the last step will do.
    changes |= {"save_folder": str(tmp_path / "sharded"), "save_interval_unsharded": None}
    assert run(tmp_path, **changes) == 0
    assert names(tmp_path / "sharded") == ["step4", "step8"]
    # Also of a run that was at its end when it was asked again.
    assert run(tmp_path, **changes, try_load_latest_save=True, force_save_unsharded=True) == 0
    assert names(tmp_path / "sharded") == ["step4", "step8-unsharded", "step8"]


def test_where_there_is_nothing_to_shard_unsharded_ones_are_saved(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"distributed_strategy": "single", "save_interval": 2, "stop_at": 4}
    changes |= {"save_interval_unsharded": None, "no_pre_train_checkpoint": True}
    assert run(tmp_path, **changes) == 0
    assert names(tmp_path / "run") == ["step2-unsharded", "step4-unsharded"]
    # Unless none of them are to be kept.
    changes |= {"save_folder": str(tmp_path / "kept"), "save_num_unsharded_checkpoints_to_keep": 0}
    assert run(tmp_path, **changes) == 0
    assert names(tmp_path / "kept") == ["step2", "step4"]


def test_the_end_does_not_go_with_a_later_save(tmp_path: Path) -> None:
    changes: dict[str, Any] = SHARDED | {"save_interval": 20, "save_interval_ephemeral": 3}
    changes |= {"no_pre_train_checkpoint": True}
    assert run(tmp_path, stop_at=9, **changes) == 0
    assert names(tmp_path / "run") == ["step9-unsharded", "step9"]
    shutil.rmtree(tmp_path / "run/step9-unsharded")
    assert run(tmp_path, stop_at=9, try_load_latest_save=True, **changes) == 0
    assert run(tmp_path, max_duration=12, try_load_latest_save=True, **changes) == 0
    assert names(tmp_path / "run") == ["step9-unsharded", "step12-unsharded", "step12"]


def cut_data(folder: Path) -> None:
    path = next((folder / "model_and_optim").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:1000])


def spoil_data(folder: Path) -> None:
    path = next((folder / "model_and_optim").glob("*.distcp"))
    path.write_bytes(bytes(path.stat().st_size))


def cut_index(folder: Path) -> None:
    path = folder / "model_and_optim/.metadata"
    path.write_bytes(path.read_bytes()[:500])


def lose_index(folder: Path) -> None:
    (folder / "model_and_optim/.metadata").unlink()


def lose_data(folder: Path) -> None:
    next((folder / "model_and_optim").glob("*.distcp")).unlink()


@pytest.mark.parametrize("damage", [cut_data, spoil_data, cut_index, lose_index, lose_data])
def test_a_broken_sharded_one_is_refused(finished: Path, tmp_path: Path, damage: Any) -> None:
    """Without a manifest too, as OLMo writes them."""
    folder = convert(finished / "latest", tmp_path, "sharded")
    (folder / "manifest.json").unlink()
    damage(folder)
    with pytest.raises(ValueError, match=r"cannot read .*model_and_optim|has no \.metadata"):
        checkpoint.load_checkpoint(folder)


def test_another_models_sharded_one_is_refused(finished: Path, tmp_path: Path) -> None:
    load = {"load_path": str(convert(finished / "latest", tmp_path, "sharded"))}
    with pytest.raises(ValueError, match=r"wte\.weight is \(128, 16\), the config's model has"):
        run(tmp_path, model={"d_model": 32}, reset_trainer_state=True, **load)


def test_an_index_with_code_does_not_run(tmp_path: Path) -> None:
    run(tmp_path, evaluators=[], **SHARDED)
    folder = tmp_path / "run/step9"
    (folder / "manifest.json").unlink()

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "model_and_optim/.metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        ValueError, match=r"would import .*touch|would import pathlib|builtins\.getattr"
    ):
        checkpoint.load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_an_index_names_files_of_its_folder_only(finished: Path, tmp_path: Path) -> None:
    index = convert(finished / "latest", tmp_path, "sharded") / "model_and_optim/.metadata"
    assert list_shard_files(index) == ["__0_0.distcp"]
    index.write_bytes(index.read_bytes().replace(b"__0_0.distcp", b"../../a/path"))
    with pytest.raises(ValueError, match=r"expected the name .* folder, found '\.\./\.\./a/path'"):
        list_shard_files(index)
