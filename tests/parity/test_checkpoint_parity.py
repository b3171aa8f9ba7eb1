"""Checkpoints both ways: OLMo's own code reads ours, and ours reads what its code wrote."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peer_checkpoint import results, train_step

from olmo import checkpoint
from olmo.checkpoint.read import load_optimizer_state
from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.optim import build_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_run import LENGTH, metrics, run, settings

PEER = os.environ.get("OLMO_PEER_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEER, reason="OLMO_PEER_PYTHON is not set; see tests/parity/README.md"),
]
HERE = Path(__file__).parent
LAYOUTS = [
    "ddp/step3-unsharded",
    "fsdp/step3-unsharded",
    "safetensors/step3-unsharded",
    "sharded/step3",
]


def peer(*arguments: str | Path) -> None:
    assert PEER is not None
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}
    command = [PEER, "-W", "ignore", str(HERE / "peer_checkpoint.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Three steps of OLMo's trainer, saved in each of its layouts; and what it computes."""
    folder = tmp_path_factory.mktemp("theirs")
    config = settings(folder, evaluators=[], fsdp={}, save_folder=str(folder))
    (folder / "config.yaml").write_text(yaml.safe_dump({
        k: v for k, v in config.items() if k != "intra_op_threads"
    }))  # fmt: skip
    peer("write", folder / "config.yaml", folder, folder / "results.npz")
    return folder, dict(np.load(folder / "results.npz"))


def of(kind: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What was computed under one wrapper."""
    return {k.removeprefix(f"{kind}/"): v for k, v in found.items() if k.startswith(f"{kind}/")}


def equal(found: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    """Logits to rounding, the optimizer's state to the bit, of as many parameters."""
    assert found.keys() == expected.keys() and len(expected) > 20
    for name, value in expected.items():
        if name == "logits":
            np.testing.assert_allclose(found[name].detach(), value, atol=2e-5)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ours_reads_theirs(layout: str, theirs: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, expected = theirs
    loaded = checkpoint.load_checkpoint(folder / layout)
    cfg = TrainConfig.load(folder / "config.yaml")
    model = OLMo.from_checkpoint(folder / layout)
    optimizer = build_optimizer(cfg, model)
    load_optimizer_state(model, optimizer, loaded)
    kind = "DistributedDataParallel" if layout.startswith("ddp") else "FullyShardedDataParallel"
    equal(results(model, optimizer), of(kind, expected))
    assert loaded.train is not None and loaded.train["global_step"] == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_of_ours_goes_on_from_theirs(
    layout: str, theirs: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"evaluators": [], "load_path": str(theirs[0] / layout)}
    assert run(tmp_path, max_duration=5, global_train_batch_size=2, **changes) == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [4, 5]
    assert lines[0]["throughput/total_tokens"] == 96 + 2 * LENGTH


@pytest.mark.parametrize("layout", ["legacy/step3", "local/step3"])
def test_other_sharded_layouts_are_refused(
    layout: str, theirs: tuple[Path, dict[str, np.ndarray]]
) -> None:
    with pytest.raises(ValueError, match=r"scripts/unshard\.py"):
        checkpoint.load_checkpoint(theirs[0] / layout)


def test_theirs_reads_ours(tmp_path: Path) -> None:
    assert run(tmp_path, evaluators=[], intra_op_threads=None) == 0
    folder = tmp_path / "run/step10-unsharded"
    model = OLMo.from_checkpoint(folder)
    cfg = TrainConfig.load(folder / "config.yaml")
    optimizer = build_optimizer(cfg, model)
    load_optimizer_state(model, optimizer, checkpoint.load_checkpoint(folder))
    ours = results(model, optimizer)

    peer("read", folder, tmp_path / "results.npz")
    found = dict(np.load(tmp_path / "results.npz"))
    for kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        assert found.pop(f"{kind}/global_step") == 10
        equal(ours, of(kind, found))
    np.testing.assert_allclose(found["from_checkpoint"], ours["logits"], atol=2e-5)
    # And the next step is the same there as here.
    train_step(model, optimizer, 99)
    for name, weight in model.state_dict().items():
        np.testing.assert_allclose(found[f"after/{name}"], weight, atol=2e-5, err_msg=name)
