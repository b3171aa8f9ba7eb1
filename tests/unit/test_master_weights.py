"""Matrices in bfloat16 with float32 masters: the same curve, files and bits after a pause."""

from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from small_run import same

from olmo.model import OLMo
from olmo.optim import build_optimizer
from olmo.optim.master_weights import MasterWeights
from olmo.train.step import forward_backward


def run(folder: Path, name: str, **changes: Any) -> list[float]:
    changes = {"max_duration": 40, "save_interval_unsharded": 20, "eval_interval": 40} | changes
    shared = {"precision": "amp_bf16", "model": {"d_model": 64, "n_heads": 2}}
    optimizer = {"learning_rate": 3e-3}
    where = {"save_folder": str(folder / name), "master_weights": name.startswith("masters")}
    assert small_run.run(folder, optimizer=optimizer, **shared | where | changes) in (0, 75)
    rows = small_run.metrics(folder / name)
    return [row["train/CrossEntropyLoss"] for row in rows if "train/CrossEntropyLoss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [None, {"backend": "native"}], ids=["", "fp8"])
def test_the_same_curve(tmp_path: Path, fp8: dict | None):
    plain = run(tmp_path, "plain", max_duration=200, fp8=fp8)
    masters = run(tmp_path, "masters", max_duration=200, fp8=fp8)
    assert masters != plain and plain[-1] < 0.8 * plain[0]
    assert sum(masters[-20:]) == pytest.approx(sum(plain[-20:]), rel=0.01)


def test_the_same_bits_after_a_pause_and_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    straight = run(tmp_path, "masters")
    assert "weights in bfloat16, master weights and optimizer in float32" in capsys.readouterr().out
    run(tmp_path, "masters-paused", stop_after=20)
    assert run(tmp_path, "masters-paused", try_load_latest_save=True) == straight
    whole, paused = (small_run.state(tmp_path / n) for n in ("masters", "masters-paused"))
    assert same(whole["files"], paused["files"])

    run(tmp_path, "plain")
    plain = small_run.state(tmp_path / "plain")
    for file in ("model.pt", "optim.pt"):
        ours, theirs = whole["files"][file], plain["files"][file]
        assert described(ours) == described(theirs)
    weights = whole["files"]["model.pt"].values()
    assert all(w.dtype == torch.float32 for w in weights)
    assert any((w != w.bfloat16()).any() for w in weights), "masters, not weights, are saved"

    # Either goes on where the other was.
    for name in ("masters-then-not", "plain-then-masters"):
        before, after = name.startswith("masters"), name.endswith("masters")
        run(tmp_path, name, master_weights=before, stop_after=20)
        found = run(tmp_path, name, master_weights=after, try_load_latest_save=True)
        assert found[-1] == pytest.approx(straight[-1], rel=0.02)


def described(value: Any) -> Any:
    """Names, shapes and types."""
    if torch.is_tensor(value):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return {k: described(v) for k, v in value.items() if k != "param_groups"}
    return type(value)


def test_gradients_of_microbatches_add_up_in_float32(tmp_path: Path):
    cfg = small_run.config(tmp_path, precision="amp_bf16", device_train_microbatch_size=1)
    torch.manual_seed(0)
    model = OLMo(cfg.model)
    model.use_attention()
    optimizer = build_optimizer(cfg, model)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    master_weights = MasterWeights(model, optimizer)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {n for n, p in model.named_parameters() if ".wte." in n or p.ndim == 1}
    batch = {"input_ids": torch.randint(2, 60, (8, 16)), "index": torch.arange(8)}
    parts: list[torch.Tensor] = []
    weight = next(model.blocks()).ff_proj.weight
    forward_backward(model, batch, cfg, torch.device("cpu"), 1)
    assert weight.grad is None
    (master,) = master_weights.get_masters([weight])
    together = master.grad.clone()
    for i in range(8):
        optimizer.zero_grad()
        one = {name: value[i : i + 1] for name, value in batch.items()}
        forward_backward(model, one, cfg, torch.device("cpu"), 1)
        assert torch.equal(master.grad, master.grad.bfloat16().float()), "one is 16 bits wide"
        parts.append(master.grad / 8)
    torch.testing.assert_close(together, torch.stack(parts).sum(0), rtol=1e-2, atol=1e-6)
    assert not torch.equal(together, together.bfloat16().float()), "the sum is not"
    assert same(before, dict(model.state_dict())), "nothing has moved"
    optimizer.clip_grads_and_collect_metrics(1)
    optimizer.step()
    assert not torch.equal(weight, master.bfloat16())
    master_weights.copy_to_model()
    for name, p in model.named_parameters():
        assert torch.equal(p, model.state_dict()[name].to(p.dtype))


def test_a_frequent_tokens_gradient_is_a_sum_in_float32(tmp_path: Path):
    """In bfloat16 256 + 1 is 256: a token that is everywhere would stop learning."""
    gradients = {}
    for name in ("plain", "masters"):
        cfg = small_run.config(tmp_path, precision="amp_bf16", device_train_microbatch_size=64)
        torch.manual_seed(0)
        model = OLMo(cfg.model)
        model.use_attention()
        optimizer = build_optimizer(cfg, model)
        rows = model.transformer["wte"].weight
        if name == "masters":
            (rows,) = MasterWeights(model, optimizer).get_masters([rows])
        seen: list[torch.dtype] = []
        model.transformer["blocks"][0].register_forward_pre_hook(
            lambda module, inputs, seen=seen: seen.append(inputs[0].dtype)
        )
        batch = {"input_ids": torch.full((64, 16), 7), "index": torch.arange(64)}
        batch["input_ids"][:, ::4] = 9
        forward_backward(model, batch, cfg, torch.device("cpu"), 1)
        assert seen == [torch.bfloat16 if name == "masters" else torch.float32]
        gradients[name] = rows.grad[7]
    error = (gradients["masters"] - gradients["plain"]).norm() / gradients["plain"].norm()
    assert error < 0.02


REFUSED = [
    ({"precision": "fp32"}, "precision is fp32; set amp_bf16"),
    ({"precision": "amp_fp16"}, "precision is amp_fp16; set amp_bf16"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_settings_that_exclude_it(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=f"master_weights: it keeps weights .*{message}"):
        small_run.run(tmp_path, master_weights=True, **changes)


@pytest.mark.slow
def test_replicas_train_alike(tmp_path: Path):
    losses = {}
    for processes in (1, 2):
        where = {"save_folder": str(tmp_path / f"on{processes}"), "master_weights": True}
        changes = {"precision": "amp_bf16", "max_duration": 5, "device_train_microbatch_size": 2}
        process = small_run.start(tmp_path, processes, **where, **changes)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        rows = small_run.metrics(tmp_path / f"on{processes}")
        key = "train/CrossEntropyLoss"
        losses[processes] = [row[key] for row in rows if key in row]
    assert losses[2] == pytest.approx(losses[1], rel=1e-2)
