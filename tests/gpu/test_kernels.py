"""Each attention kernel compared with the formula, on this machine's GPU."""

import pytest
import torch

from olmo.config import ModelConfig
from olmo.model import OLMo
from olmo.model.attention import Backend
from olmo.model.kernel_choice import AttentionSetting, MaskType, find_kernel_problem, run_trial

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.mark.parametrize("mask", MaskType)
@pytest.mark.parametrize("head_size", [64, 128, 192])
@pytest.mark.parametrize("n_kv_heads", [8, 2])
@pytest.mark.parametrize("backend", Backend)
def test_kernel_agrees_with_the_formula(
    backend: Backend, n_kv_heads: int, head_size: int, mask: MaskType
):
    setting = AttentionSetting(torch.device("cuda", 0), BF16, 8, n_kv_heads, head_size, mask)
    if problem := find_kernel_problem(backend, setting, with_trial=False):
        pytest.skip(problem)
    assert run_trial(backend, setting) is None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [None, [[700, 300, 0], [10, 1000, 14]]])
@pytest.mark.parametrize("backend", Backend)
def test_model_agrees_with_the_math_kernel(backend: Backend, lengths: list | None, compiled: bool):
    torch.manual_seed(0)
    sizes = {"d_model": 512, "n_heads": 4, "n_layers": 2, "max_sequence_length": 1024}
    dropout = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    model = OLMo(ModelConfig(**sizes, **dropout, rope=True)).to("cuda")
    ids = torch.randint(0, 50000, (2, 1024), device="cuda")
    doc_lens = None if lengths is None else torch.tensor(lengths, device="cuda")
    mask = MaskType.causal if lengths is None else MaskType.documents

    def run(by: Backend, compiled: bool) -> list[torch.Tensor]:
        torch.compiler.reset()
        model.use_attention(dtype=BF16, backend=by, mask=mask)
        model.zero_grad()
        forward = torch.compile(model) if compiled else model
        with torch.autocast("cuda", dtype=BF16):
            loss = forward(ids, doc_lens=doc_lens, labels=ids).loss.total / ids.numel()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    setting = AttentionSetting(torch.device("cuda", 0), BF16, 4, 4, 128, mask)
    if problem := find_kernel_problem(backend, setting):
        pytest.skip(problem)
    for found, exact in zip(run(backend, compiled), run(Backend.math, False), strict=True):
        assert (found - exact).norm() <= 0.03 * exact.norm()
