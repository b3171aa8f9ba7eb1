"""Checkpoints in a bucket: what goes there comes back, whole or not at all."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from ranks import on_ranks
from servers import s3_server
from small_run import metrics, run, same, settings, state

from olmo.checkpoint import layout, mirror
from olmo.config import TrainConfig
from olmo.distributed import world
from olmo.io.bucket import Bucket, BucketError
from olmo.runtime.process import PAUSED_FILE
from olmo.train import loop
from olmo.train.signals import StopRequest

NAMES = ["config.yaml", "manifest.json", "model.pt", "optim.pt", "train.pt"]


@pytest.fixture
def place() -> Iterator[str]:
    """A folder of a bucket."""
    with s3_server("bucket"):
        yield "s3://bucket/runs/a"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("straight")
    assert run(folder) == 0
    return state(folder / "run")


@pytest.mark.slow
def test_a_lost_disk_loses_nothing(
    tmp_path: Path, place: str, straight: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, stop_after=5, remote_save_folder=place) == 75
    there = Bucket(place).sizes()
    folders = ["step0-unsharded", "step4-unsharded", "step5-unsharded"]
    assert sorted(there) == [f"{folder}/{name}" for folder in folders for name in NAMES]
    assert "uploaded step5-unsharded to s3://" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    assert run(tmp_path, try_load_latest_save=True, remote_save_folder=place) == 0
    assert "downloaded step5-unsharded from s3://" in capsys.readouterr().out
    resumed = state(tmp_path / "run")
    assert same(straight["files"], resumed["files"]) and same(straight["train"], resumed["train"])
    assert mirror.list_mirrored(Bucket(place))[-1] == "step10-unsharded"
    # Once more from a URL, as OLMo's users load.
    url = {"load_path": f"{place}/step8-unsharded", "save_folder": str(tmp_path / "url")}
    assert run(tmp_path, **url) == 0
    assert same(straight["files"], state(tmp_path / "url")["files"])
    with pytest.raises(ValueError, match=r"cannot load s3://.*step9-unsharded"):
        run(tmp_path, load_path=f"{place}/step9-unsharded", save_folder=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"s3://other/runs: .*bucket"):
        run(tmp_path, remote_save_folder="s3://other/runs", save_folder=str(tmp_path / "other"))
    # Sharded ones.
    changes: dict[str, Any] = {"save_interval": 3, "save_interval_unsharded": None}
    changes |= {"save_folder": str(tmp_path / "sharded"), "remote_save_folder": place + "2"}
    assert run(tmp_path, **changes) == 0
    assert "step9/model_and_optim/.metadata" in Bucket(place + "2").sizes()
    changes = {"save_folder": str(tmp_path / "again"), "load_path": f"{place}2/step9"}
    assert run(tmp_path, **changes) == 0
    assert same(straight["files"], state(tmp_path / "again")["files"])


def test_what_a_kill_left_unsent_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path / "there")
    run(tmp_path)
    sent: list[str] = []
    put = Bucket.put

    def killed(self: Bucket, path: Path, name: str) -> None:
        if len(sent) == 4:
            raise KeyboardInterrupt
        sent.append(name)
        put(self, path, name)

    monkeypatch.setattr(Bucket, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        mirror.mirror_checkpoints(tmp_path / "run", place)
    assert mirror.list_mirrored(Bucket(place)) == []

    again: list[str] = []

    def noting(self: Bucket, path: Path, name: str) -> None:
        again.append(name)
        put(self, path, name)

    monkeypatch.setattr(Bucket, "put", noting)
    mirror.mirror_checkpoints(tmp_path / "run", place)
    step0 = [name for name in again if name.startswith("step0")]
    assert step0 == ["step0-unsharded/train.pt", "step0-unsharded/manifest.json"]
    assert len(mirror.list_mirrored(Bucket(place))) == 4
    again.clear()
    mirror.mirror_checkpoints(tmp_path / "run", place)
    assert again == []
    # A checkpoint that was written anew is sent anew, though its files have the same sizes.
    shutil.rmtree(tmp_path / "run")
    run(tmp_path, seed=1)
    mirror.mirror_checkpoints(tmp_path / "run", place)
    assert sum(name.endswith("model.pt") for name in again) == 4


def test_a_broken_one_there_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    run(tmp_path, remote_save_folder=str(there), evaluators=[])
    shutil.rmtree(tmp_path / "run")
    path = there / "step10-unsharded/model.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert run(tmp_path, try_load_latest_save=True, remote_save_folder=str(there)) == 0
    assert "skipping a broken checkpoint of" in (said := capsys.readouterr()).err
    assert "downloaded step8-unsharded" in said.out
    assert metrics(tmp_path / "run")[-1]["step"] == 10


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), BucketError),
        (OSError(28, "No space left on device"), OSError),
    ],
)
def test_a_place_that_fails_is_no_broken_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, raised: type[Exception]
) -> None:
    """An older checkpoint would lose the steps between, and a network fails for a while only."""
    with layout.atomic_checkpoint(tmp_path / "run/step10-unsharded") as folder:
        (folder / "model.pt").write_bytes(b"weights")
    mirror.mirror_checkpoints(tmp_path / "run", str(tmp_path / "there"))

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(LocalFileSystem, "get_file", fails)
    with pytest.raises(raised, match=str(error.strerror)):
        mirror.find_newest_or_download(None, tmp_path / "here", str(tmp_path / "there"))


def test_another_run_there_is_not_written_over(tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    run(tmp_path, remote_save_folder=there, evaluators=[])
    other: dict[str, Any] = {"remote_save_folder": there, "save_folder": str(tmp_path / "other")}
    with pytest.raises(ValueError, match=r"already contains a run, up to step10-unsharded; give"):
        run(tmp_path, **other)
    assert run(tmp_path, stop_after=5, save_overwrite=True, **other) == 75
    # What the older run left there is not taken for the newest of this one.
    assert mirror.list_mirrored(Bucket(there))[-1] == "step5-unsharded"
    # Nor what this one left there, when it goes back to an earlier step of its own.
    back = other | {"load_path": str(tmp_path / "other/step4-unsharded")}
    assert run(tmp_path, stop_after=2, save_overwrite=True, **back) == 75
    assert mirror.list_mirrored(Bucket(there))[-2:] == ["step4-unsharded", "step6-unsharded"]


def test_what_cannot_be_sent_is_said_and_sent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = str(tmp_path / "there")
    put = Bucket.put

    def refuses(self: Bucket, path: Path, name: str) -> None:
        if name.startswith("step4-unsharded/optim"):
            raise ValueError("the network is down")
        put(self, path, name)

    monkeypatch.setattr(Bucket, "put", refuses)
    assert run(tmp_path, stop_after=5, remote_save_folder=there) == 75, "paused all the same"
    with pytest.raises(ValueError, match="the network is down"):
        run(tmp_path, remote_save_folder=there, try_load_latest_save=True)
    assert "not uploaded yet: the network is down" in capsys.readouterr().err
    # All is here, nothing is lost; the same command sends the rest.
    assert layout.list_checkpoints(tmp_path / "run")[-1].name == "step10-unsharded"
    monkeypatch.undo()
    assert run(tmp_path, remote_save_folder=there, try_load_latest_save=True) == 0
    whole = mirror.list_mirrored(Bucket(there))
    assert [layout.parse_step(Path(name)) for name in whole] == [0, 4, 5, 8, 10]


@pytest.mark.parametrize(
    "url, said",
    [
        ("r2://name/runs", "R2_ENDPOINT_URL is not set"),
        ("gs://name/runs", "gcsfs"),
        ("ftps://name/runs", "Protocol not known: ftps"),
    ],
)
def test_a_place_that_is_not_there_is_said_before_training(
    tmp_path: Path, url: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        run(tmp_path, remote_save_folder=url)
    assert not layout.list_checkpoints(tmp_path / "run")


def test_the_manifest_comes_last(tmp_path: Path) -> None:
    run(tmp_path, evaluators=[], max_duration=1)
    order: list[str] = []

    class Noting(Bucket):
        def put(self, path: Path, name: str) -> None:
            order.append(Path(name).name)
            super().put(path, name)

    patched = pytest.MonkeyPatch()
    patched.setattr(mirror, "Bucket", Noting)
    mirror.mirror_checkpoints(tmp_path / "run", str(tmp_path / "there"))
    patched.undo()
    assert order[0] == "sending.json" and order[5] == "manifest.json"
    there = tmp_path / "there/step1-unsharded"
    assert sorted(p.name for p in there.iterdir()) == NAMES
    assert json.loads((there / "manifest.json").read_text())["files"].keys() == {*NAMES} - {
        "manifest.json"
    }


def steps(folders: list[Path] | list[str]) -> list[int | None]:
    return [layout.parse_step(Path(folder)) for folder in folders]


def pauses_while_it_sends(config: dict[str, Any]) -> int:
    """Train to a pause at step 9; step 4 is being sent from before step 8 is saved, for ever."""
    begun, put, asked = threading.Event(), Bucket.put, iter(range(1, 10))

    def slow(self: Bucket, path: Path, name: str) -> None:
        if name.startswith("step4"):
            begun.set()
            time.sleep(600)
        put(self, path, name)

    def reason(self: StopRequest, look: bool) -> str | None:
        step = next(asked)
        assert step != 4 or begun.wait(60)
        return "a test" if step == 9 else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket, "put", slow)
        patch.setattr(StopRequest, "reason", reason)
        patch.setattr(loop, "PATIENCE_S", 0.1)
        return loop.train(TrainConfig.new(**config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, stay",
    [
        ({"save_num_unsharded_checkpoints_to_keep": 1}, {"step12-unsharded"}),
        (
            {"save_interval": 8, "save_interval_ephemeral": 4, "save_interval_unsharded": None},
            {"step0-unsharded", "step8", "step9-unsharded", "step12", "step12-unsharded"},
        ),
    ],
    ids=["unsharded", "ephemeral"],
)
def test_neither_a_save_nor_a_pause_waits_for_sending(
    tmp_path: Path, kind: dict[str, Any], stay: set[str]
) -> None:
    there, folder = str(tmp_path / "there"), tmp_path / "run"
    changes: dict[str, Any] = {"remote_save_folder": there, "evaluators": []} | kind
    changes |= {"max_duration": 12}
    config = settings(tmp_path, **changes)
    said = tmp_path / "said.txt"
    assert on_ranks(1, [(pauses_while_it_sends, (config,))], said) == {0: [75]}
    left = json.loads((folder / PAUSED_FILE).read_text())
    assert left["step"] == 9 and f"not uploaded to {there} yet" in said.read_text()
    layout.verify_checkpoint(Path(left["checkpoint"]))
    assert steps(mirror.list_mirrored(Bucket(there))) == [0]
    here = steps(layout.list_checkpoints(folder))
    assert set(here) >= {4, 8, 9}, "what is not uploaded yet has to stay"
    assert run(tmp_path, try_load_latest_save=True, **changes) == 0
    assert set(steps(mirror.list_mirrored(Bucket(there)))) == {*here, 0, 12}
    assert {path.name for path in layout.list_checkpoints(folder)} == stay


def ends_slowly(config: dict[str, Any]) -> int:
    """Train where the last checkpoint takes longer to send than processes wait for each other."""
    put = Bucket.put

    def slow(self: Bucket, path: Path, name: str) -> None:
        if name == "step10-unsharded/manifest.json":
            time.sleep(9)
        put(self, path, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "TIMEOUT", timedelta(seconds=6))
        patch.setattr(world, "AFTER_WATCHDOG", timedelta(0))
        patch.setattr(Bucket, "put", slow)
        return loop.train(TrainConfig.new(**config))


@pytest.mark.slow
def test_the_others_wait_while_the_first_sends(tmp_path: Path) -> None:
    there = str(tmp_path / "there")
    config = settings(tmp_path, remote_save_folder=there, evaluators=[], hang_timeout=None)
    assert on_ranks(2, [(ends_slowly, (config,))], tmp_path / "said.txt") == {0: [0], 1: [0]}
    assert steps(mirror.list_mirrored(Bucket(there)))[-1] == 10
