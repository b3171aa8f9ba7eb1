"""Runs in the peer's environment: fifty steps of its trainer's own loss, clipping and update.

    python peer_curves.py CASES.json RESULTS.npz

Its `Trainer` wants a GPU; what it does with a batch is called here piece by piece.
"""

import json
import sys
from typing import Any

import numpy as np
import torch
from peer_model import fill


def batches(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Ids that repeat, so that there is something to learn, and masks as the case has them."""
    r = np.random.default_rng(case["seed"])
    B, T = case["config"]["global_train_batch_size"], case["config"]["model"]["max_sequence_length"]
    found = []
    for step in range(case["steps"]):
        ids = np.cumsum(r.integers(0, 3, (B, T)), axis=1) % 90 + 2
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(ids)}
        if "label" in case["masks"]:
            batch["label_mask"] = torch.from_numpy(r.random((B, T)) < 0.8)
        if "attention" in case["masks"]:
            short = torch.from_numpy(r.integers(T // 2, T + 1, (B, 1)))
            batch["attention_mask"] = (torch.arange(T) < short).float()
        if "instance" in case["masks"]:
            batch["instance_mask"] = torch.from_numpy(r.random(B) < 0.8) | (torch.arange(B) == 0)
        batch["index"] = torch.arange(B) + step * B
        found.append(batch)
    return found


def set_rates(case: dict[str, Any], config: Any, scheduler: Any, optimizer: Any, now: int) -> None:
    """What the trainer does between clipping and the update."""
    for group in optimizer.param_groups:
        group["lr"] = scheduler.get_lr(config.optimizer.learning_rate, now, case["steps"])
        group["max_grad_norm"] = scheduler.get_max_grad_norm(
            config.max_grad_norm, now, case["steps"]
        )
        group["max_grad_norm_ratio"] = scheduler.get_max_grad_norm_ratio(
            config.max_grad_norm_ratio, now, case["steps"]
        )


def run(
    case: dict[str, Any], build_config: Any, build_model: Any, optim_module: Any, backward: Any
) -> dict[str, np.ndarray]:
    """The same code for both sides, given also backward(model, batch, config, step), which leaves
    gradients and returns cross-entropy and z-loss."""
    config = build_config(**case["config"])
    model = build_model(config.model)
    fill(model)
    optimizer = optim_module.build_optimizer(config, model)
    scheduler = optim_module.build_scheduler(config)
    curve: dict[str, list[Any]] = {k: [] for k in ("ce", "z", "norm", "clipped", "lr")}
    for step, batch in enumerate(batches(case), start=1):
        optimizer.zero_grad(set_to_none=True)
        ce, z = backward(model, batch, config, step)
        metrics = optimizer.clip_grads_and_collect_metrics(step, collect_param_metrics=True)
        set_rates(case, config, scheduler, optimizer, step)
        optimizer.step()
        known = (ce, z, metrics["total_grad_norm"], metrics["clipping_rate"])
        for name, value in zip(curve, known, strict=False):
            curve[name].append(float(value))
        curve["lr"].append([group["lr"] for group in optimizer.param_groups])
    sums = {f"sum/{n}": p.detach().double().abs().sum() for n, p in model.named_parameters()}
    return {k: np.asarray(v) for k, v in (sums | curve).items()}


def main() -> None:
    import olmo.optim
    from olmo.config import TrainConfig
    from olmo.model import OLMo
    from olmo.train import Trainer, cross_entropy_loss

    def backward(model: Any, batch: dict[str, Any], config: Any, step: int) -> Any:
        trainer = object.__new__(Trainer)
        trainer.cfg, trainer.dist_model, trainer.loss_fn = config, model, cross_entropy_loss
        sums = torch.zeros(2)
        size, tokens = config.device_train_microbatch_size, batch["input_ids"].numel()
        for start in range(0, len(batch["input_ids"]), size):
            micro = {k: v[start : start + size] for k, v in batch.items()}
            loss, ce, z = trainer.train_micro_batch(micro, tokens)
            loss.backward()
            sums += torch.stack([ce.detach(), torch.zeros(()) if z is None else z.detach()])
        return sums

    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    found = [run(case, TrainConfig.new, OLMo, olmo.optim, backward) for case in cases]
    np.savez(sys.argv[2], **{f"{i}/{k}": v for i, out in enumerate(found) for k, v in out.items()})


if __name__ == "__main__":
    main()
