"""Runs in the peer's environment: its own code writes checkpoints, or reads ours.

python peer_checkpoint.py write CONFIG.yaml FOLDER RESULTS.npz
python peer_checkpoint.py read CHECKPOINT RESULTS.npz
"""

import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel as DDP


def ids(step: int) -> torch.Tensor:
    """The batch of a step: (2, 16)."""
    return torch.from_numpy(np.random.default_rng(step).integers(2, 60, (2, 16)))


def train_step(model: Any, optimizer: Any, step: int) -> None:
    optimizer.zero_grad(set_to_none=True)
    rows = ids(step)
    logits = model(rows).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).backward()
    optimizer.clip_grads_and_collect_metrics(step)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()


def results(model: Any, optimizer: Any) -> dict[str, Any]:
    """Logits, and the optimizer's state by name."""
    with torch.no_grad():
        out = {"logits": model(ids(0)).logits}
    if isinstance(model, FSDP):
        kept = FSDP.optim_state_dict(model, optimizer)["state"]
    else:
        pairs = [(g["param_names"], g["params"]) for g in optimizer.param_groups]
        kept = {n: optimizer.state[p] for ns, ps in pairs for n, p in zip(ns, ps, strict=True)}
    for name, parts in kept.items():
        for part, value in parts.items():
            out[f"{part}/{name.removeprefix('module.')}"] = torch.as_tensor(value).clone()
    return out


def keep(path: str, found: dict[str, Any]) -> None:
    np.savez(path, **{k: v.detach().numpy() for k, v in found.items()})


def wrapped(cfg: Any, kind: Any) -> tuple[Any, Any]:
    from olmo.model import OLMo
    from olmo.optim import build_optimizer

    torch.manual_seed(0)
    model = OLMo(cfg.model)
    options: dict[str, Any] = {}
    if kind is FSDP:
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    model = kind(model, **options)
    return model, build_optimizer(cfg, model)


def write(config: str, folder: str, out: str) -> None:
    from olmo.safetensors_util import state_dict_to_safetensors_file

    from olmo import checkpoint as ck
    from olmo.config import TrainConfig

    cfg = TrainConfig.load(config)
    cfg.save_overwrite = True
    place = Path(folder)
    train = {
        "epoch": 0,
        "global_step": 3,
        "global_train_examples_seen_this_epoch": 6,
        "global_train_tokens_seen": 96,
        "world_size": 1,
        "checkpoints": [place / "step3"],
        "unsharded_checkpoints": [],
        "ephemeral_checkpoints": [],
        "rng": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.random.get_rng_state(),
        },
    }
    full, new = ck.FullCheckpointer, ck.TorchNewStyleShardedCheckpointer
    writers = [
        ("ddp/step3-unsharded", DDP, full),
        ("fsdp/step3-unsharded", FSDP, full),
        ("sharded/step3", FSDP, new),
        ("legacy/step3", FSDP, ck.TorchLegacyShardedCheckpointer),
        ("local/step3", FSDP, ck.LocalShardedCheckpointer),
    ]
    found: dict[str, Any] = {}
    for name, kind, checkpointer in writers:
        model, optimizer = wrapped(cfg, kind)
        for step in (1, 2, 3):
            train_step(model, optimizer, step)
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        if checkpointer is ck.LocalShardedCheckpointer:
            # It writes with torch before 2.3 only; what it writes there lies so.
            for part in ("model", "optim", "train"):
                (place / name / part).mkdir(parents=True)
                torch.save({}, place / name / part / "rank0.pt")
            (place / name / "metadata.yaml").write_text("world_size: 1\n")
        else:
            checkpointer(cfg).save_checkpoint(place / name, model, optimizer, train)
        kind_name = kind.__name__
        found |= {f"{kind_name}/{k}": v for k, v in results(model, optimizer).items()}
    keep(out, found)
    source, target = place / "fsdp/step3-unsharded", place / "safetensors/step3-unsharded"
    target.mkdir(parents=True)
    for part in ("model", "optim"):
        state = torch.load(source / f"{part}.pt", weights_only=False)
        state_dict_to_safetensors_file(state, target / f"{part}.safetensors")
    for part in ("train.pt", "config.yaml"):
        (target / part).write_bytes((source / part).read_bytes())


def read(folder: str, out: str) -> None:
    from olmo.checkpoint import FullCheckpointer
    from olmo.config import TrainConfig
    from olmo.model import OLMo

    cfg = TrainConfig.load(Path(folder) / "config.yaml", validate_paths=False)
    found: dict[str, Any] = {}
    for kind in (DDP, FSDP):
        name = kind.__name__
        model, optimizer = wrapped(cfg, kind)
        state = FullCheckpointer(cfg).restore_checkpoint(folder, model, optimizer)
        found[f"{name}/global_step"] = torch.tensor(state["global_step"])
        found |= {f"{name}/{k}": v for k, v in results(model, optimizer).items()}
        if kind is DDP:
            train_step(model, optimizer, 99)
            after = model.module.state_dict()
            found |= {f"after/{k}": v for k, v in after.items()}
    with torch.no_grad():
        found["from_checkpoint"] = OLMo.from_checkpoint(folder)(ids(0)).logits
    keep(out, found)


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ["FS_LOCAL_RANK"] = "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
