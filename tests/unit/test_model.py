"""The model's variants against plain formulas, and what it promises about caches and names."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from olmo.config import ModelConfig
from olmo.model import (
    BufferCache,
    LayerNorm,
    LayerNormBase,
    OLMo,
    OLMoBlock,
    OLMoLlamaBlock,
    OLMoSequentialBlock,
)
from olmo.model.attention import Backend, compute_attention, dense_document_mask
from olmo.model.block import _clamp_bias
from olmo.model.kernel_choice import choose_kernel

TINY = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_ratio": 2,
    "vocab_size": 64,
    "embedding_size": 128,
    "max_sequence_length": 16,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "rope": True,
    "init_std": 0.2,
}
VARIANTS = {
    "plain": {},
    "learned": {"rope": False},
    "alibi": {"rope": False, "alibi": True},
    "llama": {"block_type": "llama"},
    "llama-gqa": {"block_type": "llama", "n_kv_heads": 2},
    "llama-mqa": {"block_type": "llama", "multi_query_attention": True},
    "gqa-qknorm": {"n_kv_heads": 2, "attention_layer_norm": True, "layer_norm_type": "rms"},
    "norm-after": {"norm_after": True, "layer_norm_type": "rms", "weight_tying": False},
    "llama-norm-after": {"norm_after": True, "block_type": "llama"},
    "groups": {"block_group_size": 2},
    "gelu": {"activation_type": "gelu", "clip_qkv": 0.5, "scale_logits": True},
    "embedding-norm": {"embedding_layer_norm": True, "layer_norm_type": "low_precision"},
    "no-bias": {"include_bias": False, "layer_norm_with_affine": False},
}


def build(seed: int = 0, **changes: Any) -> OLMo:
    torch.manual_seed(seed)
    return OLMo(ModelConfig(**TINY | changes)).eval()


def some_ids(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_token_sees_no_later_one(name: str) -> None:
    model, ids = build(**VARIANTS[name]), some_ids()
    changed = ids.clone()
    changed[:, 7:] = some_ids(seed=2)[:, 7:]
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_cache_continues_as_if_all_were_given(name: str) -> None:
    model, ids = build(**VARIANTS[name]), some_ids()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for attention_mask in (None, mask):
        whole = model(ids, attention_mask=attention_mask).logits
        past, parts = None, []
        for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
            seen = None if attention_mask is None else attention_mask[:, :end]
            output = model(ids[:, start:end], None, seen, past_key_values=past, use_cache=True)
            past = output.attn_key_values
            parts.append(output.logits)
        together = torch.cat(parts, dim=1)
        # What stands at a padded place has no meaning: it may look nowhere.
        torch.testing.assert_close(together[mask == 1], whole[mask == 1], atol=2e-5, rtol=1e-4)
        assert past[0][0].shape[-2] == 12


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_documents_do_not_see_each_other(name: str) -> None:
    if name == "learned" or name == "alibi":
        pytest.skip("positions count from the start of the row, not of the document")
    model, ids = build(**VARIANTS[name]), some_ids(rows=2)
    doc_lens = torch.tensor([[5, 7, 0], [3, 4, 5]])
    together = model(ids, doc_lens=doc_lens, max_doc_lens=[7, 5]).logits
    for row, lengths in enumerate(doc_lens.tolist()):
        start = 0
        for length in filter(None, lengths):
            alone = model(ids[row : row + 1, start : start + length]).logits
            torch.testing.assert_close(
                together[row : row + 1, start : start + length], alone, atol=2e-5, rtol=1e-4
            )
            start += length


@torch.no_grad()
def test_documents_with_alibi_and_padding() -> None:
    model, ids = build(rope=False, alibi=True), some_ids(rows=1)
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    both = model(ids, attention_mask=mask, doc_lens=torch.tensor([[5, 7]])).logits
    for start, end in ((0, 5), (5, 10)):
        alone = model(ids[:, start:end]).logits
        torch.testing.assert_close(both[:, start:end], alone, atol=2e-5, rtol=1e-4)


def test_document_mask() -> None:
    mask = dense_document_mask(torch.tensor([[2, 1, 0]]), 5)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],  # what lies beyond the last document is one more
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_formula(backend: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, 6, 8) for _ in range(2))
    scores = q @ k.repeat_interleave(4 // kv_heads, 1).mT / 8**0.5
    masked = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = masked.softmax(-1) @ v.repeat_interleave(4 // kv_heads, 1)
    found = compute_attention(q, k, v, Backend(backend))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), q)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), q)
    torch.testing.assert_close(gradient, expected_gradient)


@torch.no_grad()
def test_attention_bias_forms() -> None:
    model, ids = build(), some_ids()
    causal = torch.ones(12, 12).tril()
    plain = model(ids).logits
    lowest = torch.finfo(torch.float32).min
    for bias in (causal.bool(), causal.to(torch.int8), (1 - causal) * lowest, causal.bool()[None]):
        torch.testing.assert_close(model(ids, attention_bias=bias).logits, plain)
    everyone = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    assert not torch.allclose(model(ids, attention_bias=everyone).logits, plain, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_fully_masked_row_attends_to_all_keys_equally(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    nothing = torch.full((1, 1, 12, 12), -torch.inf)
    lowest = torch.full((1, 1, 12, 12), torch.finfo(torch.float32).min)
    logits = [model(some_ids(), attention_bias=bias).logits for bias in (nothing, lowest)]
    assert torch.isfinite(logits[0]).all()
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    q, k, v = (torch.randn(1, 1, 12, 8, dtype=dtype) for _ in range(3))
    alike = compute_attention(q, k, v, Backend.sdpa, bias=_clamp_bias(nothing, dtype))
    torch.testing.assert_close(alike, v.mean(dim=-2, keepdim=True).expand_as(v))


def test_mask_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"attention_mask must be .* \(2, 12\), found \(2, 11\)"):
        build()(some_ids(), attention_mask=torch.ones(2, 11))


@torch.no_grad()
def test_longer_than_the_tables() -> None:
    for positions in ({}, {"rope": False, "alibi": True}):
        model = build(max_sequence_length=4, **positions)
        model.config.max_sequence_length = 16
        longer = build(max_sequence_length=16, **positions)
        torch.testing.assert_close(model(some_ids()).logits, longer(some_ids()).logits)


@torch.no_grad()
def test_last_logits_hidden_states_and_embeddings() -> None:
    model, ids = build(block_group_size=1), some_ids()
    whole = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in whole.hidden_states] == [(2, 12, 32)] * 3
    last = model(ids, last_logits_only=True).logits
    torch.testing.assert_close(last, whole.logits[:, -1:])
    embedded = model.transformer.wte(ids)
    torch.testing.assert_close(model(ids, input_embeddings=embedded).logits, whole.logits)
    tied = F.linear(whole.hidden_states[-1], model.transformer.wte.weight)
    torch.testing.assert_close(tied, whole.logits)


@torch.no_grad()
def test_scaled_logits() -> None:
    plain, scaled = build(), build(scale_logits=True)
    torch.testing.assert_close(scaled(some_ids()).logits * 32**0.5, plain(some_ids()).logits)


@pytest.mark.parametrize("block_type", ["sequential", "llama"])
def test_clip_qkv_clips_all_three_on_both_sides(block_type: str) -> None:
    model = build(block_type=block_type, clip_qkv=0.25)
    x = torch.randn(2, 5, 32) * 9
    for part in next(model.blocks()).project_qkv(x):
        assert part.max() == 0.25 and part.min() == -0.25


@torch.no_grad()
def test_block_groups_change_names_only() -> None:
    grouped, flat = build(block_group_size=2, n_layers=4), build(seed=5, n_layers=4)
    assert "transformer.block_groups.1.0.attn_out.weight" in grouped.state_dict()
    state, new_names = flat._make_state_dict_compatible(grouped.state_dict())
    assert new_names["transformer.block_groups.1.0.attn_out.weight"] == {
        "transformer.blocks.2.attn_out.weight"
    }
    flat.load_state_dict(state)
    torch.testing.assert_close(flat(some_ids()).logits, grouped(some_ids()).logits, rtol=0, atol=0)
    back, _ = grouped._make_state_dict_compatible(flat.state_dict())
    assert list(back) == list(grouped.state_dict())


def test_old_and_wrapped_names() -> None:
    state = {"_orig_mod.module.transformer.blocks.0._fsdp_wrapped_module.norm.weight": 1}
    renamed, names = build()._make_state_dict_compatible(state)  # type: ignore[arg-type]
    assert renamed == {
        "transformer.blocks.0.attn_norm.weight": 1,
        "transformer.blocks.0.ff_norm.weight": 1,
    }
    assert names == {next(iter(state)): set(renamed)}


def test_dropout_only_in_training() -> None:
    model, ids = (
        build(residual_dropout=0.5, attention_dropout=0.5, embedding_dropout=0.5),
        some_ids(),
    )
    torch.testing.assert_close(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_no_dropout_draws_nothing() -> None:
    model = build().train()
    state = torch.get_rng_state()
    model(some_ids()).logits.sum().backward()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("init_fn", ["kaiming_normal", "fan_in"])
def test_inits_that_olmo_lacks(init_fn: str) -> None:
    torch.manual_seed(0)
    model = OLMo(ModelConfig(**TINY | {"init_fn": init_fn, "d_model": 256, "weight_tying": False}))
    gain = 2.0 if init_fn == "kaiming_normal" else 1.0
    for name, p in model.named_parameters():
        if name.endswith("weight") and p.ndim == 2 and "norm" not in name:
            assert p.std().item() == pytest.approx((gain / p.shape[1]) ** 0.5, rel=0.05), name
        if name.endswith("bias"):
            assert not p.any()


@pytest.mark.parametrize("block_class", [OLMoSequentialBlock, OLMoLlamaBlock, OLMoBlock])
def test_blocks_stand_alone(block_class: type[OLMoBlock]) -> None:
    config = ModelConfig(d_model=512, n_heads=4, init_fn="full_megatron", init_std=0.02)
    block = block_class(layer_id=0, config=config, cache=BufferCache())
    block.reset_parameters()
    assert block.attn_out.weight.std().item() == pytest.approx(0.02 / (2 * 12) ** 0.5, rel=0.05)
    assert block.attn_out.bias is not None and not block.attn_out.bias.any()


def test_meta_model_draws_the_same_weights() -> None:
    for changes in (
        {},
        {"block_type": "llama", "include_bias": True, "embedding_layer_norm": True},
    ):
        here, there = build(**changes), build(**changes, init_device="meta")
        there.to_empty(device="cpu")
        there.reset_parameters()
        for (name, p), q in zip(here.named_parameters(), there.parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(affine: bool, bias: bool) -> None:
    norm = LayerNorm.build(
        ModelConfig(**TINY | {"layer_norm_with_affine": affine, "include_bias": bias})
    )
    assert (norm.weight is not None) == affine and (norm.bias is not None) == (affine and bias)
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (32,)))


def test_rms_norm_goes_back_to_the_input_type_before_the_weight() -> None:
    norm = LayerNormBase.build(ModelConfig(**TINY | {"layer_norm_type": "rms"}))
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    expected = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()).bfloat16()
    torch.testing.assert_close(norm(x), expected.float(), rtol=0, atol=0)


def test_low_precision_norm_follows_autocast() -> None:
    x = torch.randn(4, 32)
    for kind, dtype in (("low_precision", torch.bfloat16), ("default", torch.float32)):
        norm = LayerNormBase.build(ModelConfig(**TINY | {"layer_norm_type": kind}))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert norm(x).dtype == dtype


def test_flops_agree_with_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for changes in ({"weight_tying": True}, {"weight_tying": False, "n_kv_heads": 2}):
        model = build(include_bias=False, max_sequence_length=12, **changes)
        with FlopCounterMode(display=False) as counter:
            model(some_ids(rows=1)).logits.sum().backward()
        attention_part = 12 * 2 * 12 * 32
        found = counter.get_total_flops() / 12
        # The counter knows no operations of the CPU's attention kernel.
        assert model.flops_per_token() - attention_part == pytest.approx(found, rel=0.01)


def test_olmo_250m_has_the_known_size() -> None:
    config = ModelConfig(
        d_model=1024,
        n_heads=8,
        n_layers=12,
        mlp_ratio=8,
        rope=True,
        include_bias=False,
        layer_norm_with_affine=False,
        vocab_size=50280,
        embedding_size=50304,
        max_sequence_length=2048,
        init_device="meta",
    )
    model = OLMo(config, init_params=False)
    assert model.num_params() == 252_837_888
    assert model.flops_per_token() == pytest.approx(1.819e9, rel=1e-3)
    assert model.flops_per_token(causal=True) == pytest.approx(1.668e9, rel=1e-3)


WRONG = [
    ({"alibi": True}, "exclude each other"),
    ({"rope": False, "alibi": True, "flash_attention": True}, "model.flash_attention=false"),
    ({"embedding_size": 32}, "at least model.vocab_size"),
    ({"block_group_size": 3}, "multiple of model.block_group_size"),
    ({"n_heads": 5}, "multiple of model.n_heads"),
    ({"n_kv_heads": 3}, "multiple of model.n_kv_heads"),
    ({"clip_qkv": -1.0}, "above 0"),
    ({"mlp_hidden_size": 33}, "must be even"),
    ({"n_heads": 32}, "even head size"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_flash_attention_that_is_not_available_is_an_error() -> None:
    model = build(flash_attention=True)
    for act in (model.use_attention, lambda: model(some_ids())):
        with pytest.raises(ValueError) as error:
            act()
        for part in ("GPU: none (cpu)", "torch", "head size: 8", "--model.flash_attention=false"):
            assert part in str(error.value)


def test_the_choice_says_why() -> None:
    config = ModelConfig(**TINY)
    assert str(choose_kernel(config, "cpu")) == (
        "sdpa: PyTorch's own choice on cpu, the others are for GPUs"
    )
    assert choose_kernel(config, "cpu", backend="math").backend == "math"
    with pytest.raises(ValueError, match="cudnn is not available: it is a kernel for NVIDIA GPUs"):
        choose_kernel(config, "cpu", backend="cudnn")


def test_the_chosen_kernel_is_used() -> None:
    model = build()
    expected = model(some_ids()).logits
    assert model.use_attention(backend="math").reason == "requested"
    assert {block.backend for block in model.blocks()} == {"math"}
    torch.testing.assert_close(model(some_ids()).logits, expected)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, olmo.model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    import olmo.model

    for name in olmo.model.__all__:
        assert getattr(olmo.model, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = olmo.model.nothing  # type: ignore[attr-defined]


def test_the_model_mentions_no_parallelism() -> None:
    import inspect

    from olmo.model import block, olmo

    for module, word in itertools.product((block, olmo), ("distributed", "fsdp", "compile")):
        assert word not in inspect.getsource(module).lower()
