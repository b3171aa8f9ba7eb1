"""Attention kernels: why one is not available, which is used instead, and how each is called."""

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_run
import torch
import torch.nn.functional as F
from torch import Tensor

from olmo.config import ModelConfig
from olmo.model import OLMo, kernel_choice
from olmo.model import attention as module
from olmo.model.attention import (
    KERNELS,
    Backend,
    build_document_mask,
    compute_attention,
    dense_document_mask,
)
from olmo.model.kernel_choice import (
    AttentionSetting,
    MaskType,
    choose_kernel,
    find_kernel_problem,
    run_trial,
)
from olmo.train.validate import choose_mask_type

CUDA, CPU, BF16 = torch.device("cuda", 0), torch.device("cpu"), torch.bfloat16
GOOD = AttentionSetting(CUDA, BF16, n_heads=8, n_kv_heads=8, head_size=128)
SETTINGS: dict[str, Any] = {
    "d_model": 1024,
    "n_heads": 8,
    "n_layers": 1,
    "rope": True,
    "attention_dropout": 0.0,
}
ALL, FUSED = set(Backend), set(kernel_choice.FLASH_KERNELS)
PACKAGES = {name: k.package for name, k in KERNELS.items() if k.package}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Hopper GPU with every package, on which nothing is tried."""
    monkeypatch.setattr(kernel_choice, "get_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_choice, "get_gpu_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(kernel_choice, "_find_package_problem", lambda backend: None)
    monkeypatch.setattr(kernel_choice, "run_trial", lambda backend, setting: None)
    return monkeypatch


# A setting, the kernels that do not support it, and words of each one's sentence.
REFUSALS = [
    ({}, set(), ()),
    ({"device": CPU}, ALL - {Backend.math, Backend.sdpa, Backend.flex}, ("NVIDIA", "cpu")),
    ({"dtype": torch.float32}, FUSED, ("bfloat16", "torch.float32", "precision: amp_bf16")),
    ({"head_size": 20}, FUSED, ("multiple of 8", "20")),
    ({"head_size": 192}, set(), ()),
    ({"head_size": 264}, FUSED, ("264",)),
    ({"mask": MaskType.documents}, {Backend.flash, Backend.cudnn}, ("documents", "fa2, fa3, fa4")),
    ({"mask": MaskType.any}, FUSED | {Backend.flex}, ("efficient and math do",)),
    ({"dropout": True}, {Backend.fa3, Backend.fa4, Backend.flex}, ("attention_dropout: 0",)),
]


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize(
    ("changes", "refusing", "words"), REFUSALS, ids=[str(row[0]) for row in REFUSALS]
)
def test_find_kernel_problem(
    hopper: pytest.MonkeyPatch, backend: Backend, changes: dict, refusing: set, words: tuple
):
    problem = find_kernel_problem(backend, GOOD._replace(**changes))
    assert (problem is not None) == (backend in refusing), problem
    for word in words if problem else ():
        assert word in problem


OLD = [((7, 5), FUSED), ((8, 6), {Backend.fa3, Backend.fa4}), ((10, 0), {Backend.fa3})]


@pytest.mark.parametrize("backend", Backend)
@pytest.mark.parametrize(("capability", "refusing"), OLD, ids=["7.5", "8.6", "10.0"])
def test_find_kernel_problem_on_another_gpu(
    hopper: pytest.MonkeyPatch, backend: Backend, capability: tuple, refusing: set
):
    hopper.setattr(kernel_choice, "get_capability", lambda device: capability)
    problem = find_kernel_problem(backend, GOOD)
    assert (problem is not None) == (backend in refusing), problem
    if problem:
        assert "NVIDIA H200" in problem and f"{capability[0]}.{capability[1]}" in problem


@pytest.mark.parametrize("capability", [(8, 0), (10, 0)])
def test_cudnns_large_heads_are_for_hopper(hopper: pytest.MonkeyPatch, capability: tuple):
    """torch 2.11 and 2.13 refuse them elsewhere (check_cudnn_tensor_shapes in sdp_utils.cpp)."""
    hopper.setattr(kernel_choice, "get_capability", lambda device: capability)
    assert find_kernel_problem(Backend.cudnn, GOOD) is None
    assert "Hopper GPUs (9.0) only" in (
        find_kernel_problem(Backend.cudnn, GOOD._replace(head_size=192)) or ""
    )


@pytest.mark.parametrize("backend", PACKAGES)
def test_find_kernel_problem_without_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: Backend
):
    monkeypatch.setattr(kernel_choice, "get_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_choice, "get_gpu_name", lambda device: "NVIDIA H200")
    name = PACKAGES[backend]
    with monkeypatch.context() as patch:
        patch.setattr(kernel_choice.importlib.util, "find_spec", lambda name: None)
        assert find_kernel_problem(backend, GOOD) == f"the package {KERNELS[backend].install}"
        assert "missing: " in KERNELS[backend].install
    # One that was built for another torch.
    place = tmp_path.joinpath(*name.split("."))
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    problem = find_kernel_problem(backend, GOOD) or ""
    sys.modules.pop("flash_attn", None)  # the folder around flash_attn.cute
    assert "undefined symbol" in problem and f"install it again, for torch {torch.__version__}" in (
        problem
    )
    for other in (Backend.fa2, Backend.fa4):
        if other is not backend and backend is not Backend.fa3:  # they share a folder
            assert find_kernel_problem(other, GOOD) == f"the package {KERNELS[other].install}"


def test_skipped_kernels_are_named_with_the_reason(hopper: pytest.MonkeyPatch):
    config = ModelConfig(**SETTINGS)
    assert str(choose_kernel(config, CUDA, BF16)).startswith(
        "cudnn: the fastest for NVIDIA H200, torch.bfloat16, head size 128; batches with padding"
    )
    hopper.setattr(
        kernel_choice,
        "_find_package_problem",
        lambda b: f"{b} is missing" if b is not Backend.fa2 else 0,
    )
    wide = config.update_with(d_model=8 * 192)
    assert choose_kernel(wide, CUDA, BF16).backend is Backend.cudnn
    hopper.setattr(
        kernel_choice, "run_trial", lambda b, s: "it failed" if b is Backend.cudnn else None
    )
    found = choose_kernel(wide, CUDA, BF16)
    assert found.backend is Backend.flash
    assert "skipped: cudnn (it failed)" in found.reason
    assert "fa3 (fa3 is missing); fa4 (fa4 is missing)" in found.reason
    assert choose_kernel(wide, CUDA, BF16, mask=MaskType.documents).backend is Backend.fa2
    assert choose_kernel(wide, CUDA).backend is Backend.efficient, "float32"
    hopper.setattr(kernel_choice, "_find_package_problem", lambda b: "it is missing")
    assert choose_kernel(wide, CUDA, BF16, mask=MaskType.documents).backend is Backend.flex
    assert choose_kernel(wide, CUDA, BF16, mask=MaskType.any).backend is Backend.efficient
    alibi = wide.update_with(alibi=True, rope=False)
    assert choose_kernel(alibi, CUDA, BF16).backend is Backend.efficient
    hopper.setattr(
        kernel_choice, "run_trial", lambda b, s: "no" if b is Backend.efficient else None
    )
    assert "efficient (no)" in choose_kernel(alibi, CUDA, BF16).reason


def test_flash_attention_is_used_or_an_error(hopper: pytest.MonkeyPatch):
    config = ModelConfig(**SETTINGS, flash_attention=True)
    found = choose_kernel(config, CUDA, BF16)
    assert found.backend is Backend.cudnn and "model.flash_attention=true" in found.reason
    hopper.setattr(
        kernel_choice, "_find_package_problem", lambda b: f"the package {KERNELS[b].install}"
    )
    with pytest.raises(ValueError) as error:
        choose_kernel(config, CUDA, BF16, mask=MaskType.documents)
    for part in (
        "uv pip install flash-attn --no-build-isolation",
        "missing packages: flash-attn 2, FlashAttention 3, flash-attn-4",
        "GPU: NVIDIA H200",
        "head size: 128",
        "--model.flash_attention=false",
    ):
        assert part in str(error.value)


def test_what_the_data_asks_for(tmp_path: Path):
    def asked(**data: Any) -> MaskType:
        return choose_mask_type(small_run.config(tmp_path, data=data))

    assert asked() is MaskType.causal
    assert asked(generate_doc_lengths=True) is MaskType.documents
    assert asked(generate_doc_lengths=True, generate_attention_mask=True) is MaskType.any
    custom = {"name": "a.B", "collate_config": {"doc_lens_field": "lengths"}}
    assert asked(paths=None, custom_dataset=custom) is MaskType.documents
    custom = {"name": "a.B", "collate_config": {"attention_bias_field": "bias"}}
    assert asked(paths=None, custom_dataset=custom) is MaskType.any


def fake_package(backend: Backend, seen: list[str], causal_as_asked: bool = True) -> Any:
    """A package's two functions as they are declared, computed by PyTorch."""
    more = {"qv": None} if backend in (Backend.fa3, Backend.fa4) else {}

    def answered(y: Tensor) -> Any:
        return (y, None) if backend is Backend.fa4 else y

    def flash_attn_func(q, k, v, *positional, causal=False, deterministic=False, **rest):
        assert not positional, "what comes fourth differs from package to package"
        assert rest.keys() <= ({"dropout_p"} if backend is Backend.fa2 else more.keys())
        seen.append("dense")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # from (B, T, H, D)
        causal = causal and causal_as_asked
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return answered(y.transpose(1, 2))

    def flash_attn_varlen_func(
        q, k, v, *positional, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal=False, deterministic=False, **rest
    ):  # fmt: skip
        assert not positional and causal and q.dim() == 3, "(B * T, H, D)"
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        seen.append("documents")
        starts = cu_seqlens_q.tolist()
        assert starts[0] == 0 and starts[-1] == len(q)
        parts = []
        for a, b in pairwise(starts):
            assert b - a <= max_seqlen_q == max_seqlen_k
            one = (x[None, a:b].transpose(1, 2) for x in (q, k, v))
            y = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
            parts.append(y.transpose(1, 2)[0])
        return answered(torch.cat(parts))

    return SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
    )


@pytest.mark.parametrize("backend", PACKAGES)
def test_how_a_package_is_called(monkeypatch: pytest.MonkeyPatch, backend: Backend):
    """Its own kernels need a GPU; here its place is taken by a stand-in with its signature."""
    seen: list[str] = []
    monkeypatch.setitem(module._loaded_packages, backend, fake_package(backend, seen))
    torch.manual_seed(0)
    config = ModelConfig(**SETTINGS | {"d_model": 32, "n_heads": 4, "n_kv_heads": 2})
    config = config.update_with(vocab_size=64, embedding_size=128, residual_dropout=0.0)
    model = OLMo(config.update_with(embedding_dropout=0.0))
    ids = torch.randint(0, 64, (2, 12))
    doc_lens = torch.tensor([[5, 7, 0], [3, 4, 0]])
    model.use_attention()
    found: dict[str, list[Tensor]] = {"sdpa": [], backend: []}
    for name, results in found.items():
        for block in model.blocks():
            block.backend = Backend(name)
        model.attention = model.attention._replace(backend=Backend(name))
        for lengths in (None, doc_lens):
            model.zero_grad()
            logits = model(ids, doc_lens=lengths).logits
            logits.square().sum().backward()
            results += [logits.detach(), *(p.grad.clone() for p in model.parameters())]
    assert seen == ["dense", "documents"]
    for ours, theirs in zip(found[backend], found["sdpa"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_trial_finds_a_kernel_that_computes_something_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_choice, "_find_unmet_requirement", lambda backend, setting: None)
    setting = AttentionSetting(CPU, torch.float32, 4, 2, 16)
    for honest in (True, False):
        run_trial.cache_clear()
        package = fake_package(Backend.fa2, [], causal_as_asked=honest)
        monkeypatch.setitem(module._loaded_packages, Backend.fa2, package)
        problem = find_kernel_problem(Backend.fa2, setting)
        assert problem is None if honest else "off the formula" in problem
    run_trial.cache_clear()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setitem(
        module._loaded_packages, Backend.fa2, SimpleNamespace(flash_attn_func=broken)
    )
    why = "its trial failed (no kernel image is available); use another kernel"
    assert find_kernel_problem(Backend.fa2, setting) == why
    config = ModelConfig(**SETTINGS | {"d_model": 64, "n_heads": 4, "n_kv_heads": 2})
    with pytest.raises(ValueError, match="backend fa2 is not available: its trial failed"):
        choose_kernel(config, CPU, backend="fa2")
    run_trial.cache_clear()


@pytest.mark.parametrize("mask", MaskType)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_trial_of_cpu_kernels_succeeds(mask: MaskType, dtype: torch.dtype):
    state = torch.get_rng_state()
    for backend in (Backend.sdpa, Backend.math):
        assert run_trial(backend, AttentionSetting(CPU, dtype, 4, 2, 16, mask)) is None
    assert torch.equal(torch.get_rng_state(), state), "a run's random numbers are its own"


@torch.no_grad()
def test_flex_equals_the_dense_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 140, 16), torch.randn(2, 2, 140, 16), torch.randn(2, 2, 140, 16)
    doc_lens = torch.tensor([[77, 50, 0], [10, 3, 100]])
    found = compute_attention(
        q, k, v, Backend.flex, build_document_mask(doc_lens, 140, Backend.flex)
    )
    mask = dense_document_mask(doc_lens, 140)
    torch.testing.assert_close(found, compute_attention(q, k, v, Backend.math, mask))
    model = OLMo(ModelConfig(**SETTINGS | {"d_model": 32, "n_heads": 4})).eval()
    model.use_attention()
    ids = torch.randint(0, 64, (2, 12))
    expected = model(ids).logits
    model.attention = model.attention._replace(backend=Backend.flex)
    for block in model.blocks():
        block.backend = Backend.flex
    torch.testing.assert_close(model(ids).logits, expected)


def test_flex_on_the_cpu_says_that_it_does_not_train_there():
    with pytest.raises(ValueError, match=r"flex is not available: its trial failed .*backward"):
        choose_kernel(ModelConfig(**SETTINGS), CPU, backend="flex")


def test_the_trainer_takes_it_from_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    losses = {}
    for name in ("sdpa", "math"):
        changes = {"save_folder": str(tmp_path / name), "eval_interval": 10}
        assert small_run.run(tmp_path, attention=name, **changes) == 0
        assert f"attention: {name}: requested" in capsys.readouterr().out
        rows = small_run.metrics(tmp_path / name)
        losses[name] = [r["train/CrossEntropyLoss"] for r in rows if "train/CrossEntropyLoss" in r]
    assert losses["math"] == pytest.approx(losses["sdpa"], rel=1e-4)
    with pytest.raises(ValueError, match="attention backend fa3 is not available: it is a kernel"):
        small_run.run(tmp_path, attention="fa3", save_folder=str(tmp_path / "none"))
