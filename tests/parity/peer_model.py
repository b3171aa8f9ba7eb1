"""Runs in the peer's environment: its model and optimizer on the cases of a JSON file.

    python peer_model.py CASES.json RESULTS.npz

For each case: logits, gradients, and the weights and gradient norms of a few training steps.
"""

import json
import sys
import zlib
from typing import Any

import numpy as np
import torch


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    for name, p in model.named_parameters():
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        values = generator.standard_normal(p.shape).astype(np.float32) * np.float32(0.05)
        if name.endswith("norm.weight") or name.endswith("ln_f.weight"):
            values += np.float32(1)
        p.copy_(torch.from_numpy(values))


def alone(model: Any, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Logits of rows cut into documents of `lengths`, each computed as if there were no other."""
    return torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)


def run(
    case: dict[str, Any], build_config: Any, build_model: Any, optim_module: Any, documents: Any
) -> Any:
    """The same code for both sides, given their config class, model class, `olmo.optim` and a way
    to compute logits of documents in one row that do not see each other."""
    config = build_config(**case["config"])
    torch.manual_seed(case["seed"])
    model = build_model(config.model)
    out = {f"init/{n}": p.detach().clone() for n, p in model.named_parameters()}
    fill(model)
    ids = torch.tensor(case["input_ids"])
    mask = torch.tensor(case["attention_mask"])
    model.eval()
    with torch.no_grad():
        out["logits"] = model(ids).logits
        out["masked"] = model(ids, attention_mask=mask).logits
        cached = model(ids[:, :5], use_cache=True).attn_key_values
        out["cached"] = model(ids[:, 5:], past_key_values=cached).logits
        masked_cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        out["masked_cached"] = model(
            ids[:, -1:], attention_mask=mask, past_key_values=masked_cache.attn_key_values
        ).logits
        generator = torch.Generator().manual_seed(case["seed"])
        bias = torch.randn(len(ids), 1, *2 * ids.shape[1:], generator=generator)
        out["bias"] = model(ids, attention_bias=bias).logits
        allowed = (bias > 0) | torch.eye(ids.shape[1], dtype=torch.bool)
        out["bool_bias"] = model(ids, attention_bias=allowed).logits
        out["bias_and_mask"] = model(ids, attention_bias=bias, attention_mask=mask).logits
        embedded = torch.randn(*ids.shape, config.model.d_model, generator=generator)
        out["embedded"] = model(ids, input_embeddings=embedded).logits
        rest = model(ids, last_logits_only=True, output_hidden_states=True)
        out["last"] = rest.logits
        out |= {f"hidden/{i}": x for i, x in enumerate(rest.hidden_states)}
        answer = model.generate(ids, attention_mask=mask, max_steps=4, beam_size=1)
        out |= {"generated": answer.token_ids, "scores": answer.scores}
        if config.model.rope:
            out["documents"] = documents(model, ids, case["documents"])
    model.train()
    optimizer = optim_module.build_optimizer(config, model)
    scheduler = optim_module.build_scheduler(config)
    for step in range(1, case["steps"] + 1):
        optimizer.zero_grad(set_to_none=True)
        rows = ids.roll(step, dims=1)
        logits = model(rows).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten())
        loss.backward()
        if step == 1:
            out |= {f"grad/{n}": p.grad.clone() for n, p in model.named_parameters()}
        metrics = optimizer.clip_grads_and_collect_metrics(step, collect_param_metrics=step == 3)
        for group in optimizer.param_groups:
            group["lr"] = scheduler.get_lr(config.optimizer.learning_rate, step, 20)
            group["max_grad_norm"] = scheduler.get_max_grad_norm(config.max_grad_norm, step, 20)
        optimizer.step()
        out[f"loss/{step}"] = loss.detach()
        if step == 3:
            out |= {f"metric/{k}": v for k, v in metrics.items()}
        else:
            out[f"norm/{step}"] = metrics["total_grad_norm"]
    out |= {f"weight/{n}": p.detach() for n, p in model.named_parameters()}
    return {k: np.asarray(v) for k, v in out.items()}


def main() -> None:
    import olmo.optim
    from olmo.config import TrainConfig
    from olmo.model import OLMo

    torch.set_num_threads(1)
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    results = {}
    for i, case in enumerate(cases):
        found = run(case, TrainConfig.new, OLMo, olmo.optim, alone)
        results.update({f"{i}/{k}": v for k, v in found.items()})
    np.savez(sys.argv[2], **results)


if __name__ == "__main__":
    main()
