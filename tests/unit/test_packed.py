"""AdamW's moments in 8 and 16 bits: what they take, what they change, what a pause loses."""

from pathlib import Path

import pytest
import small_run
import torch

from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.optim import build_optimizer
from olmo.optim.packed import MOMENT_DTYPES, PackedTensor, pack, unpack
from olmo.train.validate import check_device


@pytest.mark.parametrize("dtype", MOMENT_DTYPES.values(), ids=str)
def test_packing_an_unpacked_tensor_changes_nothing(dtype: torch.dtype):
    top = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-30, 1e-3, top / 2, top * 0.50001, top, top * 1.00001, 3e30):
        x = torch.randn(999, generator=generator)
        x = x / x.abs().max() * size
        once = unpack(pack(x, dtype))
        assert torch.equal(unpack(pack(once, dtype)), once)
        error = (once - x).abs().max()
        assert error <= size * torch.finfo(dtype).eps, "the largest lose no more than rounding"
        assert once.isfinite().all()


def run(folder: Path, name: str, **changes: object) -> list[float]:
    changes = {"max_duration": 100, "save_interval_unsharded": 50, "eval_interval": 100} | changes
    optimizer = {"learning_rate": 3e-3, "packed_state": name.startswith("packed")}
    model = {"d_model": 64, "n_heads": 2}
    folder_of = str(folder / name)
    small_run.run(folder, save_folder=folder_of, optimizer=optimizer, model=model, **changes)
    rows = small_run.metrics(folder / name)
    return [row["train/CrossEntropyLoss"] for row in rows if "train/CrossEntropyLoss" in row]


def test_the_same_curve_and_the_same_bits_after_a_pause(tmp_path: Path):
    plain, packed = run(tmp_path, "plain"), run(tmp_path, "packed")
    assert packed != plain and plain[-1] < 0.8 * plain[0]
    assert sum(packed[-20:]) == pytest.approx(sum(plain[-20:]), rel=0.01)
    run(tmp_path, "packed-paused", stop_after=50)
    assert run(tmp_path, "packed-paused", try_load_latest_save=True) == packed
    whole, paused = (small_run.state(tmp_path / name) for name in ("packed", "packed-paused"))
    assert small_run.same(whole["files"], paused["files"])
    saved = whole["files"]["optim.pt"]["state"][0]
    assert saved["exp_avg"].dtype == saved["exp_avg_sq"].dtype == torch.float32


def test_state_takes_less_than_half_the_memory(tmp_path: Path):
    cfg = small_run.config(tmp_path, optimizer={"packed_state": True})
    model = OLMo(cfg.model)
    optimizer = build_optimizer(cfg, model)
    model(torch.arange(16)[None]).logits.sum().backward()
    optimizer.clip_grads_and_collect_metrics(1)
    optimizer.step()

    def held(state: dict) -> int:
        tensors = [t for v in state.values() for t in (v if isinstance(v, PackedTensor) else [v])]
        return sum(t.nbytes for t in tensors)

    kept = sum(map(held, optimizer.state.values()))
    weights = model.num_params()
    # Three bytes a weight, and for each parameter two scales and a step.
    assert kept == 3 * weights + 12 * len(list(model.parameters()))
    assert kept < 0.5 * 8 * weights


def test_settings_that_exclude_it(tmp_path: Path):
    def build(**optimizer: object) -> None:
        cfg = TrainConfig.new(**small_run.settings(tmp_path, optimizer=optimizer))
        build_optimizer(cfg, OLMo(cfg.model))

    with pytest.raises(ValueError, match="packed_state is for adamw, not for lionw"):
        build(name="lionw", packed_state=True)
    with pytest.raises(ValueError, match="selective_updates"):
        build(packed_state=True, selective_updates=True)


def test_sharded_parameters_are_refused_before_training():
    cfg = TrainConfig.new(optimizer={"packed_state": True})
    check_device(cfg, torch.device("cpu"), sharded=False)
    with pytest.raises(ValueError, match="distributed_strategy: ddp"):
        check_device(cfg, torch.device("cpu"), sharded=True)
