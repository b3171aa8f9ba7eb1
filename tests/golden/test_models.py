"""Logits, gradients, counts and initial weights of the model are OLMo's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filling import fill

from olmo.config import ModelConfig
from olmo.model import OLMo

HERE = Path(__file__).parent / "models"
GOLDEN = json.loads((HERE / "models.json").read_text())
LOGITS = np.load(HERE / "logits_fp32.npz")
VARIANTS = {name: v for name, v in GOLDEN["variants"].items() if "loss_mean" in v}
INITS = {name: v for name, v in GOLDEN["init_manual_seed_6198_cpu"].items() if isinstance(v, dict)}
IDS = torch.tensor(GOLDEN["input_ids"])
MASK = torch.tensor(GOLDEN["attention_mask"])


def build(variant: dict[str, Any], **changes: Any) -> OLMo:
    model = OLMo(ModelConfig(**GOLDEN["base"] | variant["overrides"] | changes))
    fill(model)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_names_shapes_and_counts(name: str) -> None:
    variant = VARIANTS[name]
    model = build(variant)
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    assert list(shapes.items()) == list(variant["params"].items())
    assert model.num_params() == variant["num_params"]
    assert model.num_params(include_embedding=False) == variant["num_params_no_emb"]
    assert model.num_fwd_flops == variant["fwd_flops"]
    assert model.num_bck_flops == variant["bck_flops"]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients(name: str) -> None:
    variant = VARIANTS[name]
    model = build(variant)
    logits = model(IDS).logits
    np.testing.assert_allclose(logits.detach(), LOGITS[f"{name}/logits"], atol=2e-5, rtol=0)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert loss.item() == pytest.approx(variant["loss_mean"], abs=2e-5)
    loss.backward()
    for n, p in model.named_parameters():
        assert p.grad is not None
        assert p.grad.norm().item() == pytest.approx(variant["grad_norm"][n], abs=2e-5), n


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_padding_mask(name: str) -> None:
    variant = VARIANTS[name]
    logits = build(variant)(IDS, attention_mask=MASK).logits
    expected = variant["logits_with_mask_row1_pos10_first5"]
    np.testing.assert_allclose(logits[1, 10, :5], expected, atol=2e-5, rtol=0)
    total = logits[:, 5:].double().sum().item()
    assert total == pytest.approx(variant["logits_with_mask_sum"], abs=2e-4)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_bfloat16_stays_near(name: str) -> None:
    model = build(VARIANTS[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(IDS).logits
    assert str(logits.dtype) == VARIANTS[name]["bf16_autocast_logits_dtype"]
    distance = np.abs(logits.float().numpy() - LOGITS[f"{name}/logits"]).max()
    assert distance < 1.5 * VARIANTS[name]["bf16_max_abs_diff"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", INITS)
def test_initial_weights(name: str, device: str) -> None:
    init_fn, _, cut = name.partition("+cutoff")
    truncated = cut or init_fn in ("mitchell", "full_megatron")
    if truncated and torch.__version__ < "2.13":
        pytest.skip("before 2.13 torch's trunc_normal_ drew other numbers, in OLMo's trainer too")
    config = ModelConfig(
        **GOLDEN["base"]
        | {
            "init_fn": init_fn,
            "init_cutoff_factor": float(cut) if cut else None,
            "weight_tying": False,
            "init_device": device,
        }
    )
    torch.manual_seed(6198)
    model = OLMo(config)
    if device == "meta":
        model.to_empty(device="cpu")
        model.reset_parameters()
    for n, p in model.named_parameters():
        w = p.detach().double()
        found = [w.sum(), w.std(), w.abs().max(), *w.flatten()[:3]]
        np.testing.assert_allclose(found, INITS[name][n], rtol=1e-6, atol=1e-6)
