"""The chunked loss is the plain one, with its gradients, in every variant of the head."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_run
import torch
import torch.nn.functional as F

from olmo.config import CompilerConfig, CrossEntropy, ModelConfig, TrainConfig
from olmo.data.batches import get_labels
from olmo.model import OLMo
from olmo.model.loss import (
    _choose_chunk,
    _chunked_loss,
    compute_loss,
    find_loss_problem,
    linear_cross_entropy,
)

TINY = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 1,
    "vocab_size": 100,
    "embedding_size": 128,
    "max_sequence_length": 16,
    "rope": True,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "init_std": 0.3,
}
HEADS = {
    "tied": {"weight_tying": True},
    "bias": {"weight_tying": False, "include_bias": True},
    "scaled": {"weight_tying": False, "scale_logits": True, "include_bias": False},
}


def plain(
    logits: torch.Tensor, labels: torch.Tensor, z: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return ce, z * (logits.logsumexp(-1).square() * (labels != -100)).sum()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("z", [0.0, 0.01])
@pytest.mark.parametrize("by", CrossEntropy)
def test_loss_and_gradients(head: str, z: float, by: CrossEntropy) -> None:
    if by is CrossEntropy.torch and (z or not hasattr(F, "linear_cross_entropy")):
        pytest.skip("it has no z-loss, and needs torch 2.13")
    torch.manual_seed(0)
    model = OLMo(ModelConfig(**TINY | HEADS[head]))
    model.cross_entropy = by
    if head == "bias":
        torch.nn.init.normal_(model.transformer["ff_out"].bias)
    ids = torch.randint(0, 100, (3, 9))
    labels = torch.cat((ids[:, 1:], torch.full((3, 1), -100)), 1)
    labels[1, 2:5] = -100
    ce, z_loss = plain(model(ids).logits, labels, z)
    ((ce + z_loss) / 7).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model(ids, labels=labels, z_multiplier=z).loss
    (loss.total / 7).backward()
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(loss.ce, ce.detach(), **close)
    torch.testing.assert_close(loss.z, z_loss.detach(), **close)
    torch.testing.assert_close(loss.total.detach(), (ce + z_loss).detach(), **close)
    for n, p in model.named_parameters():
        largest = expected[n].abs().max()
        assert (p.grad - expected[n]).abs().max() <= 1e-5 * largest, n


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
def test_the_size_of_chunks_does_not_matter(chunk: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (20,))
    labels[3] = -100
    found = linear_cross_entropy(x, weight, labels, z_multiplier=0.1, chunk=chunk)
    expected = sum(plain((x @ weight.T)[None], labels[None], 0.1))
    torch.testing.assert_close(found.total, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.total, (x, weight)),
        torch.autograd.grad(expected, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_gradients_and_without_labels() -> None:
    x, weight = torch.randn(5, 8), torch.randn(50, 8)
    assert linear_cross_entropy(x, weight, torch.full((5,), -100)).total == 0
    labels = torch.arange(5)
    expected = F.cross_entropy(x @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(x, weight, labels, chunk=2).total, expected)


def test_bfloat16_autocast_keeps_sums_in_float32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(96, 32, requires_grad=True)
    labels = torch.randint(0, 96, (64,))
    exact = linear_cross_entropy(x, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(x, weight, labels, chunk=16)
    assert rounded.ce.dtype == torch.float32
    assert rounded.ce != exact.ce
    torch.testing.assert_close(rounded.ce, exact.ce, rtol=0.01, atol=0)
    rounded.total.backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_no_tensor_holds_all_logits() -> None:
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    x, weight, labels = torch.randn(64, 8), torch.randn(100, 8), torch.zeros(64, dtype=torch.long)
    with Sizes():
        _chunked_loss(x, weight, None, labels, 1.0, 0.1, chunk=16, with_grad=True)
    assert max(sizes) == 16 * 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "z"),
    [("chunked", 0.0), ("chunked", 0.01), ("plain", 0.0), ("plain", 0.01), ("torch", 0)],
)
def test_compiled_is_the_same(by: str, z: float) -> None:
    if reason := find_loss_problem(TrainConfig(cross_entropy=CrossEntropy(by))):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = OLMo(ModelConfig(**TINY | {"weight_tying": True}))
    model.use_attention()
    model.cross_entropy = CrossEntropy(by)
    ids = torch.randint(0, 100, (3, 9))
    loss = model(ids, labels=ids, z_multiplier=z).loss
    loss.total.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.compile(fullgraph=True)
    compiled = model(ids, labels=ids, z_multiplier=z).loss
    compiled.total.backward()
    for ours, theirs in zip(compiled, loss, strict=True):
        torch.testing.assert_close(ours, theirs)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], atol=1e-5, rtol=1e-4, msg=n)


# Peak memory of the loss, forward and backward, over what is there before it. The peak of a process
# never falls: the one that takes little comes first.
PEAK = """
import torch
from olmo.model.loss import CrossEntropy, compute_loss
from olmo.train.step import keep_freed_memory
torch.set_num_threads(1)
def head(by, rows):
    x, weight = torch.randn(rows, 64, requires_grad=True), torch.randn(20000, 64)
    weight.requires_grad_()
    labels = torch.randint(0, 20000, (rows,))
    before = most()
    compute_loss(CrossEntropy(by), x, weight, labels, None, 1.0, 0.0).total.backward()
    return most() - before
def most():  # of this process; getrusage tells its parent's, where that was larger
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
for by in ("chunked", "plain"):
    head(by, 4)  # libraries and threads
    print(by, head(by, 2048))
"""


def test_the_head_takes_a_fifth_of_the_memory() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    peak = {by: int(size) for by, size in map(str.split, done.stdout.splitlines())}  # KiB
    logits = 2048 * 20000 * 4 / 1024
    assert peak["plain"] > 2 * logits, "the logits and their gradient"
    assert peak["chunked"] <= peak["plain"] / 5 and peak["chunked"] < logits / 2, peak


def test_why_torchs_is_not_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str | None:
        return find_loss_problem(TrainConfig(cross_entropy=CrossEntropy.torch, **changes))

    assert find_loss_problem(TrainConfig(softmax_auxiliary_loss=True)) is None
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear_cross_entropy", lambda: None, raising=False)
        assert refused() is None and refused(compile=CompilerConfig(fullgraph=True)) is None
        assert "no z-loss" in (refused(softmax_auxiliary_loss=True) or "")
        with pytest.raises(ValueError, match="cross_entropy: torch is not available: it has no z-"):
            changes = {"cross_entropy": "torch", "softmax_auxiliary_loss": True}
            small_run.run(tmp_path, **changes)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert "2.13 has; leave cross_entropy out" in (refused() or "")


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_torchs_bfloat16_loss_is_as_exact_as_ours() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(512, 32), torch.randn(3000, 32) / 4
    labels = torch.randint(0, 3000, (512,))
    exact = compute_loss(CrossEntropy.plain, x, weight, labels, None, 1.0, 0.0).ce
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for by in CrossEntropy:
            found = compute_loss(by, x, weight, labels, None, 1.0, 0.0).ce
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=0, msg=by)


def test_the_trainer_takes_it_from_the_config(tmp_path: Path) -> None:
    curves = {}
    for by in CrossEntropy:
        if by is CrossEntropy.torch and not hasattr(F, "linear_cross_entropy"):
            continue
        where = {"save_folder": str(tmp_path / by), "eval_interval": 10}
        assert small_run.run(tmp_path, cross_entropy=by.value, **where) == 0
        rows = small_run.metrics(tmp_path / by)
        curves[by] = [r["train/CrossEntropyLoss"] for r in rows if "train/CrossEntropyLoss" in r]
    for curve in curves.values():
        assert curve == pytest.approx(curves[CrossEntropy.chunked], rel=1e-4)


def test_which_labels_count() -> None:
    """A position's label is the next token, masked by that token's masks and not by its own."""
    ids = torch.arange(1, 13).view(3, 4)
    labels = get_labels(
        {
            "input_ids": ids,
            "label_mask": torch.tensor([[True, False, True, True], [True] * 4, [True] * 4]),
            "attention_mask": torch.tensor([[1.0] * 4, [1.0, 1.0, 1.0, 0.0], [1.0] * 4]),
            "instance_mask": torch.tensor([True, True, False]),
        }
    )
    assert labels.tolist() == [[-100, 3, 4, -100], [6, 7, -100, -100], [-100] * 4]
    assert get_labels({"input_ids": ids}).tolist()[0] == [2, 3, 4, -100]
    assert ids.tolist()[2] == [9, 10, 11, 12], "what the model reads stays"


@pytest.mark.parametrize(
    ("gigabytes", "rows", "expected"),
    [(141, 32_768, 8192), (141, 65_536, 8192), (141, 20_480, 6912), (141, 100, 128),
     (80, 32_768, 5504), (24, 32_768, 1792), (8, 4096, 512)],
)  # fmt: skip
def test_chunks_on_a_gpu_are_many_rows_in_multiples_of_128(
    gigabytes: int, rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fill it, as far as its memory goes; of one size, so that none is small."""
    whole = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    x = type("Rows", (), {"device": torch.device("cuda", 0), "__len__": lambda self: rows})()
    assert _choose_chunk(x, torch.empty(50_304, 0)) == expected
