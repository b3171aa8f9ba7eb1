"""Products with weights: only a single row in generation takes oneDNN's path."""

import copy

import pytest
import torch
import torch.nn.functional as F

from olmo.config import ModelConfig
from olmo.model import OLMo
from olmo.model import linear as module
from olmo.model.linear import linear, use_column_major_weights


@pytest.fixture
def onednn_shapes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights that oneDNN multiplies with."""
    shapes: list[torch.Size] = []
    onednn_linear = module.onednn_linear

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append(weight.shape)
        return onednn_linear(x, weight, bias)

    monkeypatch.setattr(module, "onednn_linear", noted)
    return shapes


@pytest.mark.parametrize("biased", [False, True])
def test_a_single_row_equals_torchs_product(biased: bool, onednn_shapes: list[torch.Size]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 512), torch.randn(768, 512)
    bias = torch.randn(768) if biased else None
    with torch.no_grad():
        found = linear(x, weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    assert onednn_shapes == [weight.shape]


def test_torch_computes_training_more_rows_narrow_weights_and_autocast(
    onednn_shapes: list[torch.Size],
) -> None:
    torch.manual_seed(0)
    row, rows, weight = torch.randn(1, 1, 512), torch.randn(1, 3, 512), torch.randn(768, 512)
    assert torch.equal(linear(row, weight), F.linear(row, weight))
    with torch.no_grad():
        assert torch.equal(linear(rows, weight), F.linear(rows, weight))
        assert torch.equal(linear(row, weight[:9]), F.linear(row, weight[:9]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(row, weight).dtype == torch.bfloat16
    assert onednn_shapes == []


@pytest.mark.parametrize("columns", [False, True])
def test_generation_equals_full_passes(columns: bool, onednn_shapes: list[torch.Size]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=512, n_heads=8, n_layers=2, vocab_size=640, embedding_size=640, eos_token_id=0,
        max_sequence_length=32, rope=True, weight_tying=False, include_bias=True, init_std=0.1,
    )  # fmt: skip
    model = OLMo(config).eval()
    text = torch.tensor([[5, 9, 33, 7]])
    made = copy.deepcopy(model)
    if columns:
        use_column_major_weights(made)
        before = model.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    found = made.generate(text, max_steps=12, min_steps=12).token_ids[0, 0].tolist()
    head, out = torch.Size([640, 512]), torch.Size([512, 512])
    assert onednn_shapes.count(head) == (0 if columns else 12)  # its input is always one row
    assert onednn_shapes.count(out) == 2 * 11, "what does not widen lies by rows"
    for id in found:
        logits = model(text).logits[0, -1].detach()
        logits[0] = -torch.inf
        assert logits.argmax() == id
        text = torch.cat((text, torch.tensor([[id]])), 1)
