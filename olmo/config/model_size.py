"""How large a model is, by its config: no model is built."""

from __future__ import annotations

from olmo.config.enums import ActivationType
from olmo.config.train_config import ModelConfig


def count_parameters(model: ModelConfig) -> int:
    """The parameters of a model, but biases and norms."""
    return count_non_embedding(model) + count_head(model) * (1 if model.weight_tying else 2)


def count_non_embedding(model: ModelConfig) -> int:
    """The parameters of a model's blocks, but biases and norms."""
    width, hidden = model.d_model, model.mlp_hidden_size or model.mlp_ratio * model.d_model
    keys = width * model.effective_n_kv_heads // model.n_heads
    gate = 2 if model.activation_type == ActivationType.swiglu else 1
    block = 2 * width * (width + keys) + width * hidden + width * hidden // gate
    return model.n_layers * block


def count_head(model: ModelConfig) -> int:
    """The weights that turn the last hidden state into logits."""
    return (model.embedding_size or model.vocab_size) * model.d_model
