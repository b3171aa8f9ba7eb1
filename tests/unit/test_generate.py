"""Generation continues a text as full passes over it would."""

import pytest
import torch

from olmo.config import ModelConfig
from olmo.model import OLMo


@pytest.fixture
def model() -> OLMo:
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=64,
        embedding_size=128,
        eos_token_id=0,
        max_sequence_length=16,
        rope=True,
        init_std=0.3,
        weight_tying=False,
    )
    return OLMo(config).eval()


IDS = torch.tensor([[5, 9, 33, 7], [11, 2, 60, 3]])


def test_greedy_takes_the_likeliest_each_time(model: OLMo) -> None:
    token_ids, scores = model.generate(IDS, max_steps=6, min_steps=6)
    assert token_ids.shape == (2, 1, 6) and scores.shape == (2, 1)
    text, total = IDS, torch.zeros(2)
    for step in range(6):
        log_probs = model(text).logits[:, -1].log_softmax(-1)
        log_probs[:, 0] = -torch.inf
        best = log_probs.max(-1)
        assert best.indices.tolist() == token_ids[:, 0, step].tolist()
        total += best.values.detach()
        text = torch.cat((text, best.indices[:, None]), 1)
    torch.testing.assert_close(scores[:, 0], total, atol=1e-4, rtol=1e-4)


def test_padding_on_the_left_changes_nothing() -> None:
    # ALiBi sees distances only, so that a shifted row is the same row.
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=128, embedding_size=128, alibi=True,
        eos_token_id=0, init_std=0.3, max_sequence_length=16,
    )  # fmt: skip
    model = OLMo(config).eval()
    alone = model.generate(IDS[:1, 1:], max_steps=5).token_ids
    padded = torch.tensor([[1, 9, 33, 7], [11, 2, 60, 3]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(
        model.generate(padded, attention_mask=mask, max_steps=5).token_ids[:1], alone
    )


def test_a_row_that_ended_repeats_its_end(model: OLMo) -> None:
    free = model.generate(IDS, max_steps=4).token_ids
    model.config.eos_token_id = int(free[0, 0, 1])
    token_ids, scores = model.generate(IDS, max_steps=4)
    assert token_ids[0, 0].tolist() == [int(free[0, 0, 0])] + [model.config.eos_token_id] * 3
    log_probs = model(IDS[:1]).logits[:, -1].log_softmax(-1)
    first = log_probs[0, free[0, 0, 0]]
    second_ids = torch.cat((IDS[:1], free[:1, :, 0]), 1)
    second = model(second_ids).logits[0, -1].log_softmax(-1)[model.config.eos_token_id]
    torch.testing.assert_close(scores[0, 0], (first + second).detach(), atol=1e-4, rtol=1e-4)
    model.config.eos_token_id = int(model.generate(IDS[:1], max_steps=1).token_ids)
    assert model.generate(IDS[:1], max_steps=9).token_ids.shape[-1] == 1
    longer = model.generate(IDS[:1], max_steps=9, min_steps=3).token_ids[0, 0]
    assert len(longer) >= 3 and model.config.eos_token_id not in longer[:3]


def test_sampling(model: OLMo) -> None:
    def sample(seed: int, **options: float) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        rows = IDS[:1].expand(500, -1)
        found = model.generate(rows, max_steps=1, temperature=1.0, generator=generator, **options)
        return found.token_ids.flatten().tolist()

    assert sample(1) == sample(1) != sample(2)
    probabilities = model(IDS[:1]).logits[0, -1].softmax(-1)
    likeliest = probabilities.argsort(descending=True)[:3].tolist()
    assert set(sample(1, top_k=3)) == set(likeliest)
    share = probabilities[likeliest[0]].item()
    assert set(sample(1, top_p=share / 2)) == {likeliest[0]}
    assert sample(1).count(likeliest[0]) / 500 == pytest.approx(share, abs=0.07)


def test_what_does_not_fit() -> None:
    config = ModelConfig(d_model=32, n_heads=4, n_layers=1, max_sequence_length=8, vocab_size=128,
                         embedding_size=128)  # fmt: skip
    with pytest.raises(ValueError, match="do not fit in the 8 positions"):
        OLMo(config).eval().generate(IDS, max_steps=6)
    with pytest.raises(ValueError, match="at least 1"):
        OLMo(config).eval().generate(IDS, max_steps=0)
    with pytest.raises(
        ValueError, match="beam search is not implemented: expected beam_size=1, found 3"
    ):
        OLMo(config).eval().generate(IDS, beam_size=3)
