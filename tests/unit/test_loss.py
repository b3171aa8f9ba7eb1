"""The chunked loss is the plain one, with its gradients, in every variant of the head."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from olmo.config import ModelConfig
from olmo.model import OLMo
from olmo.model.loss import _compute, linear_cross_entropy

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
def test_loss_and_gradients(head: str, z: float) -> None:
    torch.manual_seed(0)
    model = OLMo(ModelConfig(**TINY | HEADS[head]))
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
    torch.testing.assert_close(loss.ce, ce.detach())
    torch.testing.assert_close(loss.z, z_loss.detach())
    torch.testing.assert_close(loss.total.detach(), (ce + z_loss).detach())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], atol=1e-5, rtol=1e-4, msg=n)


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
def test_without_gradients_and_nothing_to_count() -> None:
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
        _compute(x, weight, None, labels, 1.0, 0.1, chunk=16, learns=True)
    assert max(sizes) == 16 * 100


@pytest.mark.slow
@pytest.mark.parametrize("z", [0.0, 0.01])
def test_compiled_is_the_same(z: float) -> None:
    torch.manual_seed(0)
    model = OLMo(ModelConfig(**TINY | {"weight_tying": True}))
    model.use_attention()
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
