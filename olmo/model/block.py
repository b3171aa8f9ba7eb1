"""Transformer blocks: attention and feed-forward, each added to the residual stream.

Shapes: B batch, T positions, d d_model, H heads, H_kv heads of keys and values, D = d/H head size,
S = past positions + T.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Dropout

from olmo.config import ActivationType, BlockType, ModelConfig
from olmo.config.checks import check_model
from olmo.model.attention import Backend, Bias, compute_attention
from olmo.model.init import Linear, WeightRole, init_weights
from olmo.model.kernel_choice import choose_kernel
from olmo.model.norm import LayerNormBase
from olmo.model.rope import BufferCache, RotaryEmbedding

KeyValues = tuple[Tensor, Tensor]
"""Keys, already rotated, and values of one block, each (B, H_kv, S, D)."""


class KVCache:
    """Keys and values of one block in preallocated memory: a new position costs one copy of itself.

    Concatenation, as with KeyValues, copies all positions for each new one. A block takes either.
    The cache is updated in place, so it serves one continuation; `olmo.model.generate` creates it.
    """

    def __init__(self, past: KeyValues, capacity: int) -> None:
        self.length = 0
        self.buffers = [x.new_empty((*x.shape[:-2], capacity, x.shape[-1])) for x in past]
        self.add(*past)

    def __getitem__(self, i: int) -> Tensor:
        """Keys (0) or values (1) so far, (B, H_kv, S, D)."""
        return self.buffers[i][..., : self.length, :]

    def add(self, k: Tensor, v: Tensor) -> KeyValues:
        """Append k and v, (B, H_kv, T, D) each; returns all keys and values."""
        end = self.length + k.shape[-2]
        for buffer, new in zip(self.buffers, (k, v), strict=True):
            buffer[..., self.length : end, :] = new
        self.length = end
        return self[0], self[1]


Past = KeyValues | KVCache


class Activation(nn.Module):
    """The feed-forward's nonlinearity. Its output is output_multiplier as wide as its input."""

    output_multiplier = 1.0

    @classmethod
    def build(cls, config: ModelConfig) -> Activation:
        classes = {
            ActivationType.gelu: GELU,
            ActivationType.relu: ReLU,
            ActivationType.swiglu: SwiGLU,
        }
        return classes[ActivationType(config.activation_type)]()


class GELU(Activation):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class ReLU(Activation):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SwiGLU(Activation):
    """silu(second half) * first half (Shazeer 2020, arXiv:2002.05202)."""

    output_multiplier = 0.5

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class BlockOutput(NamedTuple):
    x: Tensor
    cache: Past | None


class OLMoBlock(nn.Module):
    """The base of the two block types, which differ in how queries, keys and values are projected.

    Modules are registered and weights drawn in OLMo's order (olmo/model.py), so that the names in
    checkpoints are the same and one seed gives the same weights.
    """

    attn_norm: LayerNormBase
    ff_norm: LayerNormBase
    ff_proj: Linear

    def __init__(self, layer_id: int, config: ModelConfig, cache: BufferCache) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.config = config
        self.head_size = config.d_model // config.n_heads
        self.n_kv_heads = config.effective_n_kv_heads
        self.kv_size = self.n_kv_heads * self.head_size
        # Outputs of ff_proj. SwiGLU uses half of them as gates, so ff_out has half as many inputs.
        self.hidden_size = (
            config.mlp_ratio * config.d_model
            if config.mlp_hidden_size is None
            else config.mlp_hidden_size
        )
        check_model(config)

        self.dropout = Dropout(config.residual_dropout)
        self.k_norm: LayerNormBase | None = None
        self.q_norm: LayerNormBase | None = None
        if config.attention_layer_norm:
            affine = config.attention_layer_norm_with_affine
            self.k_norm = LayerNormBase.build(config, self.kv_size, elementwise_affine=affine)
            self.q_norm = LayerNormBase.build(config, elementwise_affine=affine)
        self.act = Activation.build(config)
        self.attn_out = self._linear(config.d_model, config.d_model)
        inner = int(self.act.output_multiplier * self.hidden_size)
        self.ff_out = self._linear(inner, config.d_model)
        self.rotary_emb = RotaryEmbedding(config, cache) if config.rope else None
        self.backend: Backend | None = None  # set by OLMo.use_attention

    def _linear(self, d_in: int, d_out: int) -> Linear:
        return Linear(d_in, d_out, bias=self.config.include_bias, device=self.config.init_device)

    @classmethod
    def build(cls, layer_id: int, config: ModelConfig, cache: BufferCache) -> OLMoBlock:
        """The block type of config.block_type."""
        classes = {BlockType.sequential: OLMoSequentialBlock, BlockType.llama: OLMoLlamaBlock}
        return classes[BlockType(config.block_type)](layer_id, config, cache)

    def reset_parameters(self) -> None:
        for norm in (self.k_norm, self.q_norm):
            if norm is not None:
                norm.reset_parameters()
        init_weights(self.attn_out, self.config, WeightRole.attention_out, self.layer_id)
        init_weights(self.ff_out, self.config, WeightRole.feed_forward_out, self.layer_id)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, d), keys and values (B, T, H_kv * D)."""
        raise NotImplementedError

    def clip_qkv(self, x: Tensor) -> Tensor:
        limit = self.config.clip_qkv
        return x if limit is None else x.clamp(-limit, limit)

    def attend(
        self,
        x: Tensor,
        attention_bias: Bias | None,
        layer_past: Past | None,
        use_cache: bool,
    ) -> tuple[Tensor, Past | None]:
        """Attention of x (B, T, d) to itself and the past, (B, T, d), and the keys and values."""
        B, T, _ = x.shape
        q, k, v = self.project_qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            # QK-norm (Dehghani et al. 2023, arXiv:2302.05442) bounds the attention scores. OLMo
            # normalises all heads together, not each head. It returns float32 under autocast: cast
            # back to the type that products run in.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q = q.view(B, T, self.config.n_heads, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)  # (B, H_kv, T, D)
        v = v.view(B, T, self.n_kv_heads, self.head_size).transpose(1, 2)
        # H_kv < H is grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): groups of
        # H / H_kv query heads share keys and values, and the cache is that much smaller.
        past = 0 if layer_past is None else layer_past[0].shape[-2]
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q, k, start=past)
        if isinstance(layer_past, KVCache):
            k, v = layer_past.add(k, v)  # (B, H_kv, S, D)
        elif layer_past is not None:
            k = torch.cat((layer_past[0], k), dim=-2)
            v = torch.cat((layer_past[1], v), dim=-2)
        if isinstance(attention_bias, Tensor):
            attention_bias = _clamp_bias(attention_bias[:, :, past : past + T, : past + T], q.dtype)
        out = compute_attention(
            q,
            k,
            v,
            backend=self.backend
            or choose_kernel(self.config, q.device, q.dtype, with_trial=False).backend,
            bias=attention_bias,
            causal=T > 1 or past == 0,  # one new position attends to all of the past
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        out = out.transpose(1, 2).reshape(B, T, -1)  # (B, T, d)
        cache = layer_past if isinstance(layer_past, KVCache) else (k, v)
        return self.attn_out(out), cache if use_cache else None

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ff_out(self.act(self.ff_proj(x)))

    def forward(
        self,
        x: Tensor,
        attention_bias: Bias | None = None,
        layer_past: Past | None = None,
        use_cache: bool = False,
    ) -> BlockOutput:
        """x plus attention plus feed-forward, (B, T, d).

        Args:
            x: (B, T, d).
            attention_bias: broadcasts to (B, H, S, S), or a DocumentMask; None: causal.
            layer_past: the `cache` that was returned for the positions before these.
            use_cache: also return the keys and values so far.
        """
        if self.config.norm_after:  # OLMo 2: x + norm(f(x)), where OLMo 1 has x + f(norm(x))
            h, cache = self.attend(x, attention_bias, layer_past, use_cache)
            x = x + self.dropout(self.attn_norm(h))
            return BlockOutput(x + self.dropout(self.ff_norm(self.feed_forward(x))), cache)
        h, cache = self.attend(self.attn_norm(x), attention_bias, layer_past, use_cache)
        x = x + self.dropout(h)
        return BlockOutput(x + self.dropout(self.feed_forward(self.ff_norm(x))), cache)


class OLMoSequentialBlock(OLMoBlock):
    """Queries, keys and values from one fused projection, `att_proj`, in that order."""

    def __init__(self, layer_id: int, config: ModelConfig, cache: BufferCache) -> None:
        super().__init__(layer_id, config, cache)
        self.fused_dims = (config.d_model, self.kv_size, self.kv_size)
        self.att_proj = self._linear(config.d_model, sum(self.fused_dims))
        self.ff_proj = self._linear(config.d_model, self.hidden_size)
        self.attn_norm = LayerNormBase.build(config)
        self.ff_norm = LayerNormBase.build(config)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.attn_norm.reset_parameters()
        self.ff_norm.reset_parameters()
        init_weights(self.att_proj, self.config, WeightRole.input)
        init_weights(self.ff_proj, self.config, WeightRole.input)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.clip_qkv(self.att_proj(x)).split(self.fused_dims, dim=-1)
        return q, k, v


class OLMoLlamaBlock(OLMoBlock):
    """Queries, keys and values from separate projections, as in Llama."""

    def __init__(self, layer_id: int, config: ModelConfig, cache: BufferCache) -> None:
        super().__init__(layer_id, config, cache)
        self.attn_norm = LayerNormBase.build(config)
        self.ff_norm = LayerNormBase.build(config)
        self.q_proj = self._linear(config.d_model, config.d_model)
        self.k_proj = self._linear(config.d_model, self.kv_size)
        self.v_proj = self._linear(config.d_model, self.kv_size)
        self.ff_proj = self._linear(config.d_model, self.hidden_size)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.attn_norm.reset_parameters()
        self.ff_norm.reset_parameters()
        for module in (self.q_proj, self.k_proj, self.v_proj, self.ff_proj):
            init_weights(module, self.config, WeightRole.input)

    def project_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.clip_qkv(self.q_proj(x)),
            self.clip_qkv(self.k_proj(x)),
            self.clip_qkv(self.v_proj(x)),
        )


class OLMoBlockGroup(nn.ModuleList):
    """Consecutive blocks that are sharded as one unit, named `block_groups.{group}.{block}`."""

    def __init__(self, blocks: Iterable[OLMoBlock]) -> None:
        super().__init__(blocks)

    def forward(
        self,
        x: Tensor,
        attention_bias: Bias | None = None,
        layers_past: list[Past] | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, list[Past] | None]:
        """As OLMoBlock.forward, with one past and one cache for each block of the group."""
        caches: list[Past] = []
        for i, block in enumerate(self):
            past = None if layers_past is None else layers_past[i]
            x, cache = block(x, attention_bias, past, use_cache)
            if cache is not None:
                caches.append(cache)
        return x, caches if use_cache else None


def _clamp_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A float bias in the scores' dtype, with -inf raised to its lowest number: a row that is -inf
    everywhere would have a softmax of NaN."""
    if bias.dtype == torch.bool:
        return bias
    return bias.to(dtype).clamp(min=torch.finfo(dtype).min)
