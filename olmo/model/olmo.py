"""The OLMo language model: embeddings, blocks, head. A plain module on one device.

docs/architecture.md ("Who changes the model from outside") lists the code that shards it, replaces
its layers or hooks them.

Shapes: B batch, T positions, d d_model, V rows of the embedding (embedding_size or vocab_size),
S = past positions + T, H heads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Dropout

from olmo.config import ModelConfig
from olmo.config.checks import check_model
from olmo.model.attention import (
    Backend,
    Bias,
    build_document_mask,
    causal_bias,
    dense_document_mask,
)
from olmo.model.block import OLMoBlock, OLMoBlockGroup, Past
from olmo.model.generate import OLMoGenerateOutput, generate_tokens
from olmo.model.init import Embedding, Linear, WeightRole, init_weights, skip_init
from olmo.model.kernel_choice import KernelChoice, MaskType, choose_kernel
from olmo.model.linear import linear
from olmo.model.loss import CrossEntropy, LossSums, compute_loss
from olmo.model.norm import LayerNormBase
from olmo.model.regroup import regroup_state_dict
from olmo.model.rope import BufferCache, alibi_bias


class OLMoOutput(NamedTuple):
    logits: Tensor
    """(B, T, V), or (B, 1, V) with last_logits_only. Empty with labels: the loss never holds all
    logits."""

    attn_key_values: list[Past] | None
    """With use_cache: the keys and values of each block."""

    hidden_states: tuple[Tensor, ...] | None
    """With output_hidden_states: (B, T, d), each block's input and the last norm's output."""

    loss: LossSums | None = None
    """With labels: sums over all labels that are not ignored."""


class OLMo(nn.Module):
    """OLMo v1 and 2 (Groeneveld et al. 2024, arXiv:2402.00838; arXiv:2501.00656).

    Args:
        config: is read and never changed.
        init_params: draw the weights now. False leaves memory uninitialised, for weights that will
            be loaded. With init_device: meta nothing is drawn: materialise the model (`to_empty`)
            and call `reset_parameters`, which draws the weights that the same seed gives elsewhere.

    Raises:
        ValueError: settings that contradict each other; it names the keys.
    """

    transformer: Any  # an nn.ModuleDict; its names are those in OLMo's checkpoints

    def __init__(self, config: ModelConfig, init_params: bool = True) -> None:
        super().__init__()
        check_model(config)
        _warn_of_slow_embedding(config)
        self.config = config
        self.cache = BufferCache()
        self._biases = BufferCache()  # (1, 1 or H, S, S); most runs need none
        self.attention: KernelChoice | None = None
        self.cross_entropy = CrossEntropy.chunked  # the method that computes the loss
        with nullcontext() if init_params else skip_init():
            self.transformer = self._build()
        if config.alibi:
            self._causal_bias(config.max_sequence_length, torch.device("cpu"))

        if init_params and config.init_device != "meta":
            self.reset_parameters()

    def _build(self) -> nn.ModuleDict:
        """The modules, in OLMo's order: wte is token embeddings, ln_f the last norm, wpe position
        embeddings, ff_out the head (without it, the head is wte's weight)."""
        config, device = self.config, self.config.init_device
        n_embeddings = config.embedding_size or config.vocab_size

        parts = nn.ModuleDict(
            {
                "wte": Embedding(n_embeddings, config.d_model, device=device),
                "emb_drop": Dropout(config.embedding_dropout),
                "ln_f": LayerNormBase.build(config),
            }
        )
        blocks = [OLMoBlock.build(i, config, self.cache) for i in range(config.n_layers)]
        size = config.block_group_size
        if size == 1:
            parts["blocks"] = nn.ModuleList(blocks)
        else:
            groups = [OLMoBlockGroup(blocks[i : i + size]) for i in range(0, len(blocks), size)]
            parts["block_groups"] = nn.ModuleList(groups)
        if not (config.alibi or config.rope):
            length = config.max_sequence_length
            parts["wpe"] = Embedding(length, config.d_model, device=device)
        if not config.weight_tying:
            bias = config.include_bias
            parts["ff_out"] = Linear(config.d_model, n_embeddings, bias, device)
        if config.embedding_layer_norm:
            parts["emb_norm"] = LayerNormBase.build(config)
        return parts

    @property
    def device(self) -> torch.device:
        return self.transformer["wte"].weight.device

    def blocks(self) -> Iterator[OLMoBlock]:
        """All blocks in order, with and without block groups."""
        if self.config.block_group_size == 1:
            yield from self.transformer["blocks"]
        else:
            for group in self.transformer["block_groups"]:
                yield from group

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Called by `to`, `cuda` and `to_empty`: also moves the shared tables to the device."""
        super()._apply(fn, recurse)
        if self.device.type != "meta":
            self.cache.move(self.device)
            self._biases.move(self.device)
        return self

    def reset_parameters(self) -> None:
        """Draw all weights from the CPU's random generator, in OLMo's order."""
        parts = self.transformer
        init_weights(parts["wte"], self.config, WeightRole.embedding)
        if "wpe" in parts:
            init_weights(parts["wpe"], self.config, WeightRole.position)
        parts["ln_f"].reset_parameters()
        if "emb_norm" in parts:
            parts["emb_norm"].reset_parameters()
        if "ff_out" in parts:
            init_weights(parts["ff_out"], self.config, WeightRole.head)
        for block in self.blocks():
            block.reset_parameters()

    def use_attention(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        backend: Backend | str | None = None,
        mask: MaskType = MaskType.causal,
        with_trial: bool = True,
    ) -> KernelChoice:
        """Choose the attention kernel for all blocks, by trying it; returns it with the reason.

        Without this call every block chooses in each forward pass, by known limits alone.

        Args:
            device: where the model will run; by default its current device.
            dtype: the type that attention will run in: autocast's under autocast.
            backend: the requested kernel; None: the fastest.
            mask: the masks that batches will have: doc_lens, or a tensor.
            with_trial: False chooses by known limits: a trial needs gradients, and half a second.

        Raises:
            ValueError: the requested kernel (or model.flash_attention) is not available.
        """
        device = self.device if device is None else torch.device(device)
        self.attention = choose_kernel(self.config, device, dtype, backend, mask, with_trial)
        for block in self.blocks():
            block.backend = self.attention.backend
        if mask is MaskType.any:  # before the first step: see BufferCache
            self._causal_bias(self.config.max_sequence_length, device)
        return self.attention

    def forward(
        self,
        input_ids: Tensor,
        input_embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        past_key_values: Sequence[Past] | None = None,
        use_cache: bool = False,
        last_logits_only: bool = False,
        output_hidden_states: bool | None = None,
        doc_lens: Tensor | None = None,
        max_doc_lens: Sequence[int] | None = None,
        labels: Tensor | None = None,
        z_multiplier: float = 0.0,
    ) -> OLMoOutput:
        """The logits of each next id or, with labels, the loss.

        Args:
            input_ids: (B, T), integers below vocab_size.
            input_embeddings: (B, T, d), used instead of the embeddings of `input_ids`.
            attention_mask: (B, S), 0 at positions that nothing attends to (padding).
            attention_bias: (B or 1, H or 1, S, S) or (S, S), replaces the causal mask: a bool or
                int8 tensor is 0 where attention is forbidden, a float one is added to the scores.
            past_key_values: `attn_key_values` of the positions before `input_ids`.
            use_cache: return `attn_key_values`.
            last_logits_only: compute logits for the last position only.
            output_hidden_states: return `hidden_states`.
            doc_lens: (B, max documents), lengths of the documents in each row, padded with 0:
                positions attend to their own document only.
            max_doc_lens: accepted as OLMo has it; not used.
            labels: (B, T), the next id at each position, -100 to ignore it: compute `loss` instead
                of logits, in chunks (see `olmo.model.loss`).
            z_multiplier: weight of the z-loss in `loss.total`.
        """
        if past_key_values is not None and len(past_key_values) != self.config.n_layers:
            raise ValueError(
                f"past_key_values: expected one pair for each of {self.config.n_layers} blocks, "
                f"found {len(past_key_values)}"
            )
        past = 0 if past_key_values is None else past_key_values[0][0].shape[-2]
        x = self._embed(input_ids, input_embeddings, past)  # (B, T, d)
        bias = self._attention_bias(x, past, attention_mask, attention_bias, doc_lens)

        hidden: list[Tensor] = []
        caches: list[Past] = []
        size = self.config.block_group_size
        for i, part in enumerate(self.transformer["blocks" if size == 1 else "block_groups"]):
            if output_hidden_states:
                hidden.append(x)
            if size == 1:
                x, cache = part(x, bias, past_key_values and past_key_values[i], use_cache)
                caches.append(cache)
            else:
                pasts = past_key_values and past_key_values[i * size : (i + 1) * size]
                x, group_caches = part(x, bias, pasts, use_cache)
                caches.extend(group_caches or [])

        if last_logits_only:
            x = x[:, -1:]
        x = self.transformer["ln_f"](x)
        if output_hidden_states:
            hidden.append(x)
        return OLMoOutput(
            logits=self._logits(x) if labels is None else x.new_empty(0),
            attn_key_values=caches if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            loss=None if labels is None else self._loss(x, labels, z_multiplier),
        )

    def _embed(self, input_ids: Tensor, input_embeddings: Tensor | None, past: int) -> Tensor:
        parts = self.transformer
        x = parts["wte"](input_ids) if input_embeddings is None else input_embeddings
        if "emb_norm" in parts:
            x = parts["emb_norm"](x)
        if "wpe" in parts:
            positions = torch.arange(past, past + x.shape[1], device=x.device)
            x = parts["wpe"](positions) + x
        return parts["emb_drop"](x)

    def _head(self) -> tuple[Tensor, Tensor | None, float]:
        """The head's weight (V, d), bias (V,) or None, and the scale of the logits."""
        head = self.transformer["wte" if self.config.weight_tying else "ff_out"]
        scale = 1 / math.sqrt(self.config.d_model) if self.config.scale_logits else 1.0
        return head.weight, getattr(head, "bias", None), scale

    def _logits(self, x: Tensor) -> Tensor:
        weight, bias, scale = self._head()
        logits = linear(x, weight, bias)
        return logits if scale == 1.0 else logits * scale

    def _loss(self, x: Tensor, labels: Tensor, z_multiplier: float) -> LossSums:
        weight, bias, scale = self._head()
        rows = x.flatten(0, 1)
        method = self.cross_entropy
        return compute_loss(method, rows, weight, labels.flatten(), bias, scale, z_multiplier)

    def _attention_bias(
        self,
        x: Tensor,
        past: int,
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
        doc_lens: Tensor | None,
    ) -> Bias | None:
        """All masks and biases as one float tensor, (B or 1, H or 1, S, S); None for plain causal
        attention; for documents alone, the form that the kernel takes.

        As in OLMo, forbidden pairs get float32's lowest number, not -inf: a row without any allowed
        key then attends to all keys equally, instead of becoming NaN. Two of them add up to -inf,
        which the blocks clamp.
        """
        length = past + x.shape[1]
        lowest = torch.finfo(torch.float32).min
        unmasked = attention_mask is None and attention_bias is None and not self.config.alibi
        backend = None if self.attention is None else self.attention.backend
        if unmasked and past == 0 and doc_lens is None and backend is Backend.flex:
            doc_lens = torch.full((len(x), 1), length, device=x.device)  # one document per row
        if unmasked and doc_lens is not None and past == 0:
            return build_document_mask(doc_lens, length, backend)
        if unmasked and doc_lens is None and (past == 0 or x.shape[1] == 1):
            return None

        if attention_bias is None:
            bias = self._causal_bias(length, x.device)
        else:
            bias = attention_bias.view((1,) * (4 - attention_bias.ndim) + attention_bias.shape)
            if bias.dtype in (torch.bool, torch.int8, torch.uint8):
                bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(bias == 0, lowest)
        bias = bias[:, :, :length, :length].float()
        if attention_mask is not None:
            if attention_mask.shape != (len(x), length):
                raise ValueError(
                    f"attention_mask must be (batch, past + current positions) = "
                    f"{(len(x), length)}, found {tuple(attention_mask.shape)}"
                )
            bias = bias + (1.0 - attention_mask.float())[:, None, None, :] * lowest
        if doc_lens is not None:
            bias = bias + (~dense_document_mask(doc_lens, length)).float() * lowest
        return bias

    def _causal_bias(self, length: int, device: torch.device) -> Tensor:
        """The causal bias, plus ALiBi's if configured, for at least `length` positions."""
        bias = self._biases.get_on(device, "causal")
        if bias is None or bias.shape[-1] < length:
            bias = causal_bias(length, device)
            if self.config.alibi:
                slopes = alibi_bias(length, self.config.n_heads, self.config.alibi_bias_max, device)
                bias = bias + slopes
            self._biases.store("causal", bias)
        return bias

    def num_params(self, include_embedding: bool = True) -> int:
        """Number of parameters, a tied head counted once; with or without both embeddings."""
        return sum(
            p.numel()
            for name, p in self.named_parameters()
            if include_embedding or not (".wte." in name or ".wpe." in name)
        )

    @property
    def num_fwd_flops(self) -> int:
        """OLMo's number of floating-point operations per token, forward.

        Two per weight outside the embeddings, plus attention over the whole window. It omits a tied
        head; `flops_per_token` does not.
        """
        return 2 * self.num_params(include_embedding=False) + 4 * self._attention_size()

    @property
    def num_bck_flops(self) -> int:
        """OLMo's number for the backward pass: four per weight, with embeddings, plus attention."""
        return 4 * self.num_params() + 8 * self._attention_size()

    def flops_per_token(self, causal: bool = False) -> int:
        """Floating-point operations per token, forward and backward, by PaLM's convention for MFU.

        6 per weight of a matrix product, including the head, tied or not, plus 12 L T d for
        attention (L n_layers; Chowdhery et al. 2022, arXiv:2204.02311, appendix B); with `causal`
        only the pairs that are not masked: 6 L (T + 1) d.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        if self.config.weight_tying:
            weights += self.transformer["wte"].weight.numel()
        layers, length = self.config.n_layers, self.config.max_sequence_length
        attention = 6 * layers * (length + 1) if causal else 12 * layers * length
        return 6 * weights + attention * self.config.d_model

    def _attention_size(self) -> int:
        config = self.config
        return config.n_layers * config.d_model * config.max_sequence_length

    def generate(self, input_ids: Tensor, **options: Any) -> OLMoGenerateOutput:
        """Continue `input_ids` (B, T). Options as for `olmo.model.generate.generate_tokens`."""
        return generate_tokens(self, input_ids, **options)

    @classmethod
    def from_checkpoint(
        cls, checkpoint_dir: str | Path, device: str = "cpu", checkpoint_type: Any = None
    ) -> OLMo:
        """Load a model in evaluation mode from a checkpoint, a folder or a URL with a config.yaml.

        Sharded and unsharded checkpoints are recognised; `checkpoint_type` is accepted as OLMo has
        it, and not used.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is damaged.
        """
        import olmo  # not at the top: olmo.model may not import olmo.checkpoint

        return olmo.load_model(checkpoint_dir, device)

    def _make_state_dict_compatible(
        self, state_dict: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
        """OLMo's name for `regroup_state_dict`."""
        return regroup_state_dict(state_dict, self.config.block_group_size)


def _warn_of_slow_embedding(config: ModelConfig) -> None:
    size = config.embedding_size
    if size is not None and size != config.vocab_size and size % 128:
        warnings.warn(
            f"model.embedding_size={size} is no multiple of 128, which costs speed on GPUs",
            stacklevel=3,
        )
