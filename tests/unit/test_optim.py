"""Updates against plain formulas, clipping, metrics, groups, and that NaN moves nothing."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from olmo.config import TrainConfig
from olmo.model import OLMo
from olmo.optim import AdamW, LionW, Muon, Optimizer, build_optimizer
from olmo.optim.muon import orthogonalize

MODEL = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 64,
    "embedding_size": 128,
    "max_sequence_length": 16,
    "rope": True,
    "weight_tying": False,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def build(name: str = "adamw", model: Any = None, **optimizer: Any) -> tuple[OLMo, Optimizer]:
    top = {k: optimizer.pop(k) for k in ("max_grad_norm", "max_grad_norm_ratio") if k in optimizer}
    cfg = TrainConfig.new(model=MODEL | (model or {}), optimizer={"name": name} | optimizer, **top)
    torch.manual_seed(0)
    olmo = OLMo(cfg.model)
    return olmo, build_optimizer(cfg, olmo)


def backward(model: OLMo, scale: float = 1.0) -> None:
    model.zero_grad()
    (model(IDS).logits.square().mean() * scale).backward()


def weights(model: OLMo) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def gradients(model: OLMo) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_adamw_is_the_formula() -> None:
    model, optim = build(learning_rate=0.01, weight_decay=0.1)
    m, v, expected = {}, {}, weights(model)
    for step in range(1, 4):
        backward(model)
        for n, g in gradients(model).items():
            m[n] = 0.9 * m.get(n, 0) + 0.1 * g
            v[n] = 0.95 * v.get(n, 0) + 0.05 * g * g
            decay = 0.1 if g.ndim == 2 and "wte" not in n else 0.0
            size = m[n] / (1 - 0.9**step) / ((v[n] / (1 - 0.95**step)).sqrt() + 1e-5)
            expected[n] = expected[n] * (1 - 0.01 * decay) - 0.01 * size
        optim.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("selective", [False, True])
def test_lionw_is_the_formula(selective: bool) -> None:
    model, optim = build("lionw", learning_rate=0.01, weight_decay=0.1, selective_updates=selective)
    m, expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}, weights(model)
    for _ in range(3):
        backward(model)
        for n, g in gradients(model).items():
            mask = (g != 0).float() if selective else torch.ones_like(g)
            decay = 0.1 if g.ndim == 2 and "wte" not in n else 0.0
            sign = torch.sign(0.9 * m[n] + 0.1 * g) * mask
            expected[n] = expected[n] * (1 - mask * 0.01 * decay) - 0.01 * sign
            m[n] = m[n] * (1 - mask * 0.05) + 0.05 * g
        optim.step()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[n], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lionw"])
def test_selective_updates_leave_unseen_tokens_alone(name: str) -> None:
    unseen = sorted(set(range(64)) - set(IDS.flatten().tolist()))
    for selective in (True, False):
        model, optim = build(
            name, learning_rate=0.01, weight_decay=0.1, decay_embeddings=True,
            selective_updates=selective,
        )  # fmt: skip
        before = weights(model)["transformer.wte.weight"]
        for _ in range(2):
            backward(model)
            optim.clip_grads_and_collect_metrics(1, collect_param_metrics=False)
            optim.step()
        after = weights(model)["transformer.wte.weight"]
        assert torch.equal(before[unseen], after[unseen]) == selective
        assert not torch.isclose(before[IDS], after[IDS]).all(-1).any()


def test_selective_adamw_equals_adamw_where_no_gradient_is_zero() -> None:
    (one, selective), (two, fused) = build(selective_updates=True), build()
    for model, optim in ((one, selective), (two, fused)):
        for step in range(3):
            backward(model)
            for p in model.parameters():
                assert p.grad is not None
                p.grad += 0.01
            optim.clip_grads_and_collect_metrics(step, collect_param_metrics=False)
            optim.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_muon_orthogonalizes_the_blocks_and_adamw_does_the_rest() -> None:
    model, optim = build("muon", learning_rate=0.01, weight_decay=0.0)
    muon = [n for g in optim.param_groups if g["muon"] for n in g["param_names"]]
    assert muon and all(".blocks." in n and n.endswith("weight") for n in muon)
    assert "transformer.ff_out.weight" not in muon and "transformer.wte.weight" not in muon
    (other, adamw), before = build("adamw", learning_rate=0.01, weight_decay=0.0), weights(model)
    for m, o in ((model, optim), (other, adamw)):
        backward(m)
        o.step()
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if n not in muon:
            assert torch.equal(p, q), n
            continue
        update = (before[n] - p.detach()) / (0.01 * 0.2 * max(p.shape) ** 0.5)
        singular = torch.linalg.svdvals(update)
        assert singular.median() > 0.6 and singular.max() < 1.3, n
        # Downhill: the first momentum is the gradient itself.
        assert (update * p.grad).sum() > 0
    backward(model)
    optim.step()
    assert {k for n in optim.state.values() for k in n} == {
        "momentum", "step", "exp_avg", "exp_avg_sq",
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = orthogonalize(x)
    assert found.shape == x.shape
    # The iteration does not converge, it brings singular values near 1.
    singular = (u.mT @ found @ vh.mT).diagonal(dim1=-2, dim2=-1)
    assert (singular > 0.3).all() and (singular < 1.3).all()


def test_clipping_is_by_the_norm_of_all_gradients() -> None:
    for max_norm in (1e-3, 1e3):
        model, optim = build(max_grad_norm=max_norm)
        backward(model)
        before = gradients(model)
        norm = math.sqrt(sum(g.square().sum().item() for g in before.values()))
        metrics = optim.clip_grads_and_collect_metrics(1)
        assert metrics["total_grad_norm"].item() == pytest.approx(norm, rel=1e-5)
        factor = min(1.0, max_norm / (norm + 1e-6))
        for n, g in gradients(model).items():
            torch.testing.assert_close(g, before[n] * factor)
        assert metrics["clipping_rate"].item() == (1.0 if max_norm < norm else 0.0)


@pytest.mark.parametrize("name", ["adamw", "lionw"])
def test_adaptive_clipping_is_by_the_running_mean(name: str) -> None:
    model, optim = build(name, max_grad_norm=1e-9, max_grad_norm_ratio=2.0, learning_rate=1e-9)
    means: dict[str, float] = {}
    for step, scale in enumerate((1.0, 3.0, 30.0, 3.0), start=1):
        backward(model, scale)
        before = gradients(model)
        metrics = optim.clip_grads_and_collect_metrics(step)
        for n, g in gradients(model).items():
            norm = before[n].norm().item()
            mean = means.get(n, norm)
            factor = min(1.0, 2.0 * mean / (norm + 1e-6))
            assert (factor < 0.5) == (step == 3)
            torch.testing.assert_close(g, before[n] * factor, rtol=1e-4, atol=1e-9)
            if step > 1:  # the first step has no state to keep the mean in
                means[n] = mean + 0.05 * (norm * factor - mean)
                found = metrics[f"grad_norm_exp_avg/{n}"].item()
                assert found == pytest.approx(means[n], rel=1e-4)
        optim.step()
    assert "grad_norm_exp_avg" in optim.state_dict()["state"][0]


@pytest.mark.parametrize("name", ["adamw", "lionw", "muon"])
@pytest.mark.parametrize("selective", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 1.0}, {"max_grad_norm_ratio": 2.0}])
def test_a_gradient_that_is_not_finite_moves_nothing(
    name: str, selective: bool, bad: float, clip: dict[str, float]
) -> None:
    if name == "muon" and selective:
        pytest.skip("refused")
    model, optim = build(
        name, selective_updates=selective, learning_rate=0.1, weight_decay=0.1, **clip
    )
    for step in (1, 2):
        backward(model)
        optim.clip_grads_and_collect_metrics(step)
        optim.step()
    before, state = weights(model), _copy(optim.state_dict()["state"])
    backward(model)
    next(model.parameters()).grad[0, 0] = bad  # type: ignore[index]
    metrics = optim.clip_grads_and_collect_metrics(3)
    assert not torch.isfinite(metrics["total_grad_norm"])
    optim.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]), n
    after = optim.state_dict()["state"]
    for index, values in state.items():
        for key, value in values.items():
            assert torch.equal(after[index][key], value), (index, key)
    backward(model)
    optim.clip_grads_and_collect_metrics(4)
    optim.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.ndim == 2)


def _copy(state: dict[int, dict[str, torch.Tensor]]) -> dict[int, dict[str, torch.Tensor]]:
    return {i: {k: v.clone() for k, v in values.items()} for i, values in state.items()}


def test_groups() -> None:
    decay, none = build()[1].param_groups
    assert decay["param_names"] == sorted(decay["param_names"])
    assert all(n.endswith("weight") and "norm" not in n for n in decay["param_names"])
    assert "transformer.ff_out.weight" in decay["param_names"]
    assert none["weight_decay"] == 0.0 and "transformer.wte.weight" in none["param_names"]
    assert "transformer.blocks.0.attn_norm.weight" in none["param_names"]
    (all_decay,) = build(decay_embeddings=True, decay_norm_and_bias=True)[1].param_groups
    assert len(all_decay["params"]) == len(decay["params"]) + len(none["params"])
    # The older spelling of both wins.
    assert len(build(no_decay_norm_and_bias=False)[1].param_groups) == 1
    both = {"decay_embeddings": True, "decay_norm_and_bias": True}
    assert len(build(no_decay_norm_and_bias=True, **both)[1].param_groups) == 2


def test_a_module_without_a_rule() -> None:
    with pytest.raises(ValueError, match="no weight decay rule for weight of a Conv1d"):
        build_optimizer(TrainConfig(), nn.Conv1d(1, 1, 1, bias=False))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "kind"), [("adamw", AdamW), ("lionw", LionW), ("muon", Muon)])
def test_metrics(name: str, kind: type) -> None:
    model, optim = build(name, record_update_metrics=True, max_grad_norm=1.0)
    assert isinstance(optim, kind)
    backward(model)
    norms = {"total_grad_norm"} | {f"grad/{n}.norm" for n, _ in model.named_parameters()}
    assert set(optim.clip_grads_and_collect_metrics(1, False)) == norms
    optim.step()
    assert optim.get_post_step_metrics(model) == {}
    backward(model)
    grads, before = gradients(model), weights(model)
    metrics = optim.clip_grads_and_collect_metrics(2)
    weight = "transformer.blocks.1.ff_out.weight"
    for kind_of, tensor in (("grad", grads[weight]), ("param", before[weight])):
        found = [metrics[f"{kind_of}/{weight}.{w}"].item() for w in ("min", "max", "avg", "norm")]
        expected = [tensor.abs().min(), tensor.abs().max(), tensor.mean(), tensor.norm()]
        assert found == pytest.approx([e.item() for e in expected], rel=1e-4, abs=1e-9)
    if name != "muon":
        assert f"exp_avg/{weight}.norm" in metrics
    optim.step()
    after = optim.get_post_step_metrics(model)
    if name == "lionw":
        assert 0 < after["update_cos_sim"].item() <= 1
    else:
        lr, decay = optim.param_groups[0]["lr"], optim.param_groups[0]["weight_decay"]
        update = dict(model.named_parameters())[weight] - before[weight] * (1 - lr * decay)
        assert after[f"step/{weight}.norm"].item() == pytest.approx(update.norm().item(), rel=1e-4)
        assert after[f"step/{weight}.max"].item() == pytest.approx(update.abs().max().item())


def test_metrics_of_selective_updates_are_of_what_moved() -> None:
    """What was not seen neither decays nor has a direction."""
    settings = {"selective_updates": True, "record_update_metrics": True, "weight_decay": 0.5}
    settings |= {"decay_embeddings": True, "learning_rate": 0.1}
    wte = "transformer.wte.weight"

    model, optim = build("adamw", **settings)
    backward(model)
    moving, before = gradients(model)[wte] != 0, weights(model)[wte]
    assert 0 < moving.sum() < moving.numel()
    optim.clip_grads_and_collect_metrics(1)
    optim.step()
    update = weights(model)[wte] - before * (1 - moving * 0.05)
    after = optim.get_post_step_metrics(model)
    assert after[f"step/{wte}.norm"].item() == pytest.approx(update.norm().item(), rel=1e-5)
    assert after[f"step/{wte}.max"].item() == pytest.approx(update.abs().max().item(), rel=1e-5)

    model, optim = build("lionw", **settings)
    for ids in (IDS, IDS.flip(0)[:1]):
        # Tokens of the first step alone have a momentum in the second, and no gradient.
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        momenta = {n: optim.state[p].get("exp_avg") for n, p in model.named_parameters()}
        updates = [
            (0.9 * (0 if momenta[n] is None else momenta[n]) + (1 - 0.9) * g) * (g != 0)
            for n, g in gradients(model).items()
        ]
        expected = torch.cat([u.flatten() for u in updates])
        optim.clip_grads_and_collect_metrics(1)
        optim.step()
    cosine = torch.cosine_similarity(expected, expected.sign(), dim=0).item()
    found = optim.get_post_step_metrics(model)["update_cos_sim"].item()
    assert found == pytest.approx(cosine, rel=1e-5)


def test_recording_does_not_change_what_is_computed() -> None:
    (one, recording), (two, plain) = build(record_update_metrics=True), build()
    for model, optim, collect in ((one, recording, True), (two, plain, False)):
        for step in range(2):
            backward(model)
            optim.clip_grads_and_collect_metrics(step, collect)
            optim.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "lionw", "muon"])
def test_resume_equals_straight(name: str) -> None:
    model, optim = build(name, max_grad_norm_ratio=1.1)

    def steps(model: OLMo, optim: Optimizer, n: int) -> None:
        for step in range(n):
            backward(model)
            optim.clip_grads_and_collect_metrics(step)
            optim.step()

    steps(model, optim, 3)
    other, resumed = build(name, max_grad_norm_ratio=1.1, weight_decay=0.3)
    other.load_state_dict(model.state_dict())
    saved = copy.deepcopy(optim.state_dict())
    for group in saved["param_groups"]:
        group["fused"] = None  # as a checkpoint of OLMo's own has it
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["weight_decay"] == 0.3, "settings are the config's"
    for group in resumed.param_groups:
        group["weight_decay"] = 0.01 if group["weight_decay"] else 0.0
    steps(model, optim, 2)
    steps(other, resumed, 2)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_state_of_other_parameters_is_refused() -> None:
    saved = build()[1].state_dict()
    with pytest.raises(ValueError, match=r"other parameters.*--reset_optimizer_state"):
        build(model={"block_type": "llama"})[1].load_state_dict(saved)
    with pytest.raises(ValueError, match="2 parameter groups, expected 3"):
        build("muon")[1].load_state_dict(
            {"state": {}, "param_groups": [{"params": []}, {"params": []}]}
        )


def test_selective_muon_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--optimizer\.selective_updates=false"):
        build("muon", selective_updates=True)


def test_no_host_sync_in_clipping_and_stepping() -> None:
    for name in ("lionw", "muon", "adamw"):
        model, optim = build(name, max_grad_norm=1.0, max_grad_norm_ratio=None)
        for _ in range(2):
            backward(model)
            with torch.profiler.profile() as profile, torch.no_grad():
                optim.clip_grads_and_collect_metrics(2, collect_param_metrics=True)
                # Not AdamW's own kernel, which on the CPU reads its count of steps.
                if isinstance(optim, Muon):
                    optim._step_group(optim.param_groups[0])
                elif isinstance(optim, LionW):
                    optim.step()
        counts = {e.key: e.count for e in profile.key_averages()}
        assert counts.get("aten::_local_scalar_dense", 0) == 0, name
