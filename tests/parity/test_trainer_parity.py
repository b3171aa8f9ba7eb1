"""OLMo's own trainer, as its repository has it today, and ours: each goes on from the other's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, models

from olmo.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_run import VOCABULARY, settings

PEER, REPOSITORY = (os.environ.get(f"OLMO_PEER_{name}") for name in ("PYTHON", "REPOSITORY"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PEER and REPOSITORY), reason="no OLMO_PEER_REPOSITORY; see tests/parity/README.md"
    ),
]
LOSS = "train/CrossEntropyLoss"


def configs() -> list[Path]:
    return sorted(Path(REPOSITORY, "configs").rglob("*.yaml")) if REPOSITORY else []


@pytest.mark.parametrize("path", configs(), ids=lambda path: path.stem)
def test_their_configs_are_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one's own, and as one that came with a checkpoint."""
    monkeypatch.setenv("CHECKPOINTS_PATH", "/checkpoints")
    own = TrainConfig.load(path, validate_paths=False)
    assert own.model == TrainConfig.load(path, untrusted=True).model


class Place:
    """A folder in which both train the same small run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = folder / "tokenizer.json"
        words = {f"w{i}": i for i in range(VOCABULARY)}
        Tokenizer(models.WordLevel(words, unk_token="w2")).save(str(tokenizer))
        self.settings = settings(
            folder,
            run_name="small",
            evaluators=[],
            distributed_strategy="single",
            tokenizer={"identifier": str(tokenizer)},
            scheduler={"t_warmup": 3, "t_max": 20},
            save_interval=3,
            save_interval_unsharded=3,
            save_overwrite=True,
        )
        del self.settings["intra_op_threads"]

    def train(self, command: list[str], env: dict[str, str], words: tuple[str, ...]) -> str:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.settings))
        done = subprocess.run(
            [*command, "config.yaml", *words],
            cwd=self.folder, env=env | {"OMP_NUM_THREADS": "1"}, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def theirs(self, name: str, *words: str) -> dict[int, float]:
        """Loss by step."""
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        alone |= {"FS_LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
        env = {**os.environ, **alone, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        command = [str(PEER), "-W", "ignore", f"{REPOSITORY}/scripts/train.py"]
        said = self.train(command, env, (f"--save_folder={self.folder / name}", *words))
        found = re.findall(rf"\[step=(\d+)/.*\n(?:    .*\n)*?    {LOSS}=(\S+)", said)
        return {int(step): float(loss) for step, loss in found}

    def ours(self, name: str, *words: str) -> dict[int, float]:
        command = [sys.executable, "-m", "olmo.train"]
        folder = self.folder / name
        self.train(command, dict(os.environ), (f"--save_folder={folder}", *words))
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row[LOSS] for row in rows if LOSS in row}

    def olmo(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "olmo.cli", *words],
            cwd=self.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def straight(place: Place) -> dict[int, float]:
    """Their losses, uninterrupted; `theirs` then holds what they saved."""
    return place.theirs("theirs", "--max_duration=8")


def near(found: dict[int, float], expected: dict[int, float], steps: range) -> None:
    """Their log has four digits."""
    assert [step for step in found if step in steps] == list(steps)
    for step in steps:
        assert found[step] == pytest.approx(expected[step], abs=1e-3), step


def test_ours_goes_on_from_theirs_whatever_it_is_converted_to(
    place: Place, straight: dict[int, float]
) -> None:
    saved = place.folder / "theirs/step6-unsharded"
    assert yaml.safe_load((saved / "config.yaml").read_text())["single"] == {"device": "auto"}
    near(place.ours("ours", f"--load_path={saved}", "--max_duration=8"), straight, range(7, 9))
    for kind, inner in (
        ("safetensors", ""),
        ("sharded", "step6"),
        ("unsharded", "step6-unsharded"),
    ):
        place.olmo("checkpoint", "convert", str(saved), f"to-{kind}", "--kind", kind)
        found = place.folder / f"to-{kind}" / inner
        # And from there to each other kind.
        for other in ("safetensors", "sharded", "unsharded"):
            place.olmo("checkpoint", "convert", str(found), f"{kind}-{other}", "--kind", other)
        load = (f"--load_path={found}", "--max_duration=8")
        near(place.ours(f"ours-{kind}", *load), straight, range(7, 9))


def test_theirs_is_looked_into(place: Place, straight: dict[int, float]) -> None:
    saved = str(place.folder / "theirs/step6-unsharded")
    assert re.fullmatch(r"(w\d+ ?)+\n", place.olmo("generate", saved, "--prompt", "w5 w6"))
    place.olmo("checkpoint", "convert", saved, "hf", "--kind", "hf")
    rows = place.olmo("inspect", "--run", "theirs", "--step", "2", "--json").splitlines()
    assert len(rows) == 8 and json.loads(rows[0])["text"].startswith("w")


def test_theirs_goes_on_from_ours(place: Place, straight: dict[int, float]) -> None:
    near(place.ours("begun", "--max_duration=6"), straight, range(1, 7))
    begun = place.folder / "begun/step6-unsharded"
    place.olmo("checkpoint", "convert", str(begun), "plain", "--kind", "safetensors")
    place.olmo("checkpoint", "convert", "plain", "back", "--kind", "unsharded")
    for name in (begun, place.folder / "back/step6-unsharded"):
        went_on = place.theirs("gone-on", f"--load_path={name}", "--max_duration=8")
        near(went_on, straight, range(7, 9))
