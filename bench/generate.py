"""Greedy generation of ours beside transformers', on the CPU, with the same weights.

    python bench/generate.py [--size 85m|6m] [--prompt 16] [--tokens 256] [--rounds 5] [--threads 1]

The model is random, what a token costs does not depend on its weights. Ours is made ready as `olmo
generate` does it. Sides take turns in one
process: A B A B. CPU seconds of the process are compared, since wall time on a shared machine is
another's business; quoted are the medians, and the median over rounds of the pairwise ratio. That
both give the same ids is checked. Without its cache ours is timed too: every token is then a pass
over all that is there. Of these passes one in --every is made, and counted as so many.

What a token's matrix products take alone is timed beside it, by torch's `F.linear`, as transformers
has them, and as ours has them: gigabytes of weights per CPU second. What is left of a token is
overhead.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from olmo.checkpoint.huggingface import build_config_json, to_hf_weights
from olmo.config import ModelConfig
from olmo.model import OLMo
from olmo.model.linear import linear, use_column_major_weights

SIZES = {
    "85m": {"d_model": 512, "n_heads": 8, "n_layers": 14},
    "6m": {"d_model": 96, "n_heads": 4, "n_layers": 8},
}
VOCABULARY = 50304


def models(size: str) -> tuple[OLMo, Any]:
    """The same random weights as our model and as transformers'."""
    config = ModelConfig(
        **SIZES[size], mlp_ratio=8, rope=True, weight_tying=False, layer_norm_with_affine=False,
        attention_layer_norm_with_affine=False, include_bias=False, max_sequence_length=1024,
        vocab_size=VOCABULARY, embedding_size=VOCABULARY, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    ours = OLMo(config).eval()
    settings = transformers.OlmoConfig(**build_config_json(config))
    theirs = transformers.OlmoForCausalLM(settings).eval()
    theirs.load_state_dict(to_hf_weights(ours.state_dict(), config), strict=True)
    ours.use_attention()
    use_column_major_weights(ours)
    theirs.generation_config.eos_token_id = None  # the same number of tokens, whatever they are
    return ours, theirs


def without_cache(model: OLMo, ids: Tensor, prompt: int, every: int) -> float:
    """CPU seconds of a pass for each token of `ids` after the prompt, from one in `every`."""
    began, passes = time.process_time(), 0
    with torch.no_grad():
        for length in range(prompt + every // 2, ids.shape[1], every):
            logits = model(ids[:, :length], last_logits_only=True).logits
            assert logits[0, -1].argmax() == ids[0, length], "another id than with the cache"
            passes += 1
    return (time.process_time() - began) / passes * (ids.shape[1] - prompt)


def products(model: OLMo, rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds and GB/s of the products of one token, with nothing between them."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rows = [torch.randn(1, 1, weight.shape[1]) for weight in weights]
    theirs = [weight.contiguous() for weight in weights]  # by rows
    size = sum(weight.nbytes for weight in weights) / 1e9
    ways: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]] = {
        "torch": (F.linear, theirs),
        "ours": (linear, weights),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(8 * rounds):
            for name, (product, laid) in ways.items():
                began = time.process_time()
                for x, weight in zip(rows, laid, strict=True):
                    product(x, weight)
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: {"cpu_s": s, "gb_per_cpu_s": size / s} for name, s in medians.items()}


def measured(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.process_time()
    ids = work()
    return time.process_time() - began, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="85m")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ours, theirs = models(given.size)
    prompt = torch.randint(2, VOCABULARY, (1, given.prompt), generator=torch.manual_seed(1))

    def ours_goes_on(tokens: int) -> Tensor:
        found = ours.generate(prompt, max_steps=tokens, min_steps=tokens).token_ids[0]
        return torch.cat((prompt, found), 1)

    def theirs_goes_on(tokens: int) -> Tensor:
        bounds = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        mask = torch.ones_like(prompt)
        return theirs.generate(
            prompt, attention_mask=mask, do_sample=False, pad_token_id=1, **bounds
        )

    sides = {"ours": ours_goes_on, "transformers": theirs_goes_on}
    for work in sides.values():
        work(2)  # allocates
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(given.rounds):
        found = {}
        for name, work in sides.items():
            spent, found[name] = measured(lambda work=work: work(given.tokens))
            seconds[name].append(spent)
        same = (found["ours"] == found["transformers"]).all()
        assert same, "other ids: one of them did other work"
    whole = without_cache(ours, found["ours"], given.prompt, given.every)
    pairs = zip(seconds["transformers"], seconds["ours"], strict=True)
    ratios = [b / a for b, a in pairs]
    cpu_s = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "size": given.size,
        "prompt": given.prompt,
        "tokens": given.tokens,
        "threads": given.threads,
        "cpu_s": cpu_s,
        "cpu_s_a_token": {name: s / given.tokens for name, s in cpu_s.items()},
        "products_of_a_token": products(ours, given.rounds),
        "cpu_s_without_cache": whole,
        "times_as_fast_as_transformers": statistics.median(ratios),
        "of_the_rounds": [min(ratios), max(ratios)],
        "times_as_fast_as_without_cache": whole / cpu_s["ours"],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
