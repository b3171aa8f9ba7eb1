"""Greedy generation of ours beside transformers', on the CPU, with the same random weights.

    python bench/generate.py [--size 85m|6m] [--prompt 16] [--tokens 256] [--rounds 5] [--threads 1]

Ours is prepared as `olmo generate` prepares it. Both run in one process and take turns, and must
give the same ids. The cost is CPU time: medians, and the median of the rounds' ratios. Ours is also
timed without its cache, where a token is a pass over all tokens before it; one of --every such
passes is made and scaled up.

The matrix products of one token are timed alone, by torch's `F.linear`, as transformers computes
them, and as ours does: gigabytes of weights per CPU second. The rest of a token is overhead.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from olmo.bench.script import describe_run, measure_interleaved, medians, parse_options, ratios
from olmo.checkpoint.huggingface import build_config_json, to_hf_weights
from olmo.config import ModelConfig
from olmo.model import OLMo
from olmo.model.linear import linear, use_column_major_weights

SIZES = {
    "85m": {"d_model": 512, "n_heads": 8, "n_layers": 14},
    "6m": {"d_model": 96, "n_heads": 4, "n_layers": 8},
}
VOCAB_SIZE = 50304


def build_models(size: str) -> tuple[OLMo, Any]:
    """Our model and transformers', with the same random weights."""
    config = ModelConfig(
        **SIZES[size], mlp_ratio=8, rope=True, weight_tying=False, layer_norm_with_affine=False,
        attention_layer_norm_with_affine=False, include_bias=False, max_sequence_length=1024,
        vocab_size=VOCAB_SIZE, embedding_size=VOCAB_SIZE, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = OLMo(config).eval()
    settings = transformers.OlmoConfig(**build_config_json(config))
    theirs = transformers.OlmoForCausalLM(settings).eval()
    theirs.load_state_dict(to_hf_weights(ours.state_dict(), config), strict=True)
    ours.use_attention()
    use_column_major_weights(ours)
    theirs.generation_config.eos_token_id = None  # always generate all tokens
    return ours, theirs


def time_without_cache(model: OLMo, ids: Tensor, prompt: int, every: int) -> float:
    """CPU seconds of a pass for each token of `ids` after the prompt, from one in `every`."""
    began, passes = time.process_time(), 0
    with torch.no_grad():
        for length in range(prompt + every // 2, ids.shape[1], every):
            logits = model(ids[:, :length], last_logits_only=True).logits
            assert logits[0, -1].argmax() == ids[0, length], (
                "expected the same ids with and without the cache"
            )
            passes += 1
    return (time.process_time() - began) / passes * (ids.shape[1] - prompt)


def time_products(model: OLMo, rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds and GB/s of the matrix products of one token, without anything else."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    inputs = [torch.randn(1, 1, weight.shape[1]) for weight in weights]
    by_rows = [weight.contiguous() for weight in weights]

    def time_product(product: Callable[[Tensor, Tensor], Tensor], laid_out: list[Tensor]) -> float:
        began = time.process_time()
        for x, weight in zip(inputs, laid_out, strict=True):
            product(x, weight)
        return time.process_time() - began

    programs = {
        "torch": lambda: time_product(F.linear, by_rows),
        "ours": lambda: time_product(linear, weights),
    }
    with torch.no_grad():
        cpu_s = medians(measure_interleaved(8 * rounds, programs))
    size = sum(weight.nbytes for weight in weights) / 1e9
    return {name: {"cpu_s": s, "gb_per_cpu_s": size / s} for name, s in cpu_s.items()}


def main() -> None:
    options = parse_options(
        __doc__,
        size={"choices": list(SIZES), "default": "85m"},
        prompt=16,
        tokens=256,
        rounds=5,
        threads=1,
        every=16,
    )
    torch.set_num_threads(options.threads)
    ours, theirs = build_models(options.size)
    generator = torch.manual_seed(1)
    prompt = torch.randint(2, VOCAB_SIZE, (1, options.prompt), generator=generator)
    mask, outputs = torch.ones_like(prompt), {}

    def generate(side: str, tokens: int) -> float:
        """CPU seconds."""
        began = time.process_time()
        if side == "ours":
            new = ours.generate(prompt, max_steps=tokens, min_steps=tokens).token_ids[0]
            outputs[side] = torch.cat((prompt, new), 1)
        else:
            limits = {"min_new_tokens": tokens, "max_new_tokens": tokens}
            outputs[side] = theirs.generate(
                prompt, attention_mask=mask, do_sample=False, pad_token_id=1, **limits
            )
        cpu_s = time.process_time() - began
        same = len(outputs) < 2 or outputs["ours"].equal(outputs["transformers"])
        assert same or side == "ours", "expected the same ids from both sides"
        return cpu_s

    sides = ("ours", "transformers")
    for side in sides:
        generate(side, 2)  # allocates
    programs = {side: lambda side=side: generate(side, options.tokens) for side in sides}
    costs = measure_interleaved(options.rounds, programs)
    uncached_s = time_without_cache(ours, outputs["ours"], options.prompt, options.every)
    cpu_s, of_rounds = medians(costs), ratios(costs["transformers"], costs["ours"])
    result = {
        "run": describe_run(f"torch {torch.__version__}"),
        "transformers": transformers.__version__,
        **{name: getattr(options, name) for name in ("size", "prompt", "tokens", "threads")},
        "cpu_s": cpu_s,
        "cpu_s_a_token": {name: s / options.tokens for name, s in cpu_s.items()},
        "products_of_a_token": time_products(ours, options.rounds),
        "cpu_s_without_cache": uncached_s,
        "times_as_fast_as_transformers": statistics.median(of_rounds),
        "of_the_rounds": [of_rounds[0], of_rounds[-1]],
        "times_as_fast_as_without_cache": uncached_s / cpu_s["ours"],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
