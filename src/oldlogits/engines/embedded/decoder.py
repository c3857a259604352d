"""A small fp32 decoder of the Llama and Qwen family over a static cache of keys and values.

It reads the same model folders and parameter names as Hugging Face's classes and shares no code with them: two
engines, so that their discrepancy is real. Weights are fused at load (query-key-value, gate-up) and the rows of
each query and key head are reordered so that a rotary pair is one complex number; the score scale is folded in.
In a mixture of experts each layer has several MLPs, and a router picks those that serve a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from oldlogits.core.errors import ModelFolderError
from oldlogits.engines.embedded.model_folder import DecoderConfig
from oldlogits.engines.embedded.numerics import Numerics, round_linear, round_other, round_rows_to_e4m3

TILE = 32
"""Rows of one decode attention call: each tile is cropped to its own longest sequence, idle tiles are skipped."""


class Attention(Protocol):
    """How the tokens of one forward pass see the cache."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write `key` and `value` [tokens, kv_heads, head_dim] to a layer's cache, then attend from `query`.

        `query` is [tokens, heads, head_dim] and scaled; the layer's `keys` and `values` are [slots, kv_heads, max_context,
        head_dim], and the result is [tokens, heads * head_dim].
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One fused layer; H heads, K kv heads, D head_dim, E experts."""

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [(H + 2K) D, hidden]
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [H + K, D]
    output: Tensor  # [H D, hidden]: transposed, for addmm
    output_bias: Tensor | None
    mlp_norm: Tensor  # [hidden]
    router: Tensor | None  # [E, hidden]
    gate_up: Tensor  # [2 intermediate, hidden] or [E, 2 intermediate, hidden]
    down: Tensor  # [intermediate, hidden] or [E, intermediate, hidden]: transposed


class Decoder:
    """The forward pass, and the weights under their Hugging Face names that it reads."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, Tensor], numerics: Numerics, max_context: int) -> None:
        self.config, self._numerics = config, numerics
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.arange(max_context).float()[:, None] * frequencies
        self._rotations = torch.polar(torch.ones_like(angles), angles)  # [max_context, head_dim / 2] complex64
        self.load(weights)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over copies of new weights, rounded and fused; on an error the old ones stay."""
        config = self.config
        fuser = _Fuser(config, weights, self._numerics)
        embedding = fuser.other("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        head_name = "model.embed_tokens.weight" if config.tied_head else "lm_head.weight"
        head = fuser.linear(head_name, config.vocab_size, config.hidden_size)
        final_norm = fuser.other("model.norm.weight", config.hidden_size)
        self._layers = [fuser.layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        self._embedding, self._head, self._final_norm = embedding, head, final_norm

    def new_cache(self, max_num_seqs: int) -> Tensor:
        """Zeros [layers, 2 (keys, values), slots, kv_heads, max_context, head_dim]."""
        config = self.config
        return torch.zeros(config.num_layers, 2, max_num_seqs, config.num_kv_heads, len(self._rotations), config.head_dim)

    def forward(self, token_ids: Tensor, positions: Tensor, cache: Tensor, attention: Attention) -> Tensor:
        """The final hidden states [tokens, hidden], normed, of tokens at positions; their keys and values go to the cache."""
        config = self.config
        num_heads, num_rotated = config.num_heads, config.num_heads + config.num_kv_heads
        x = F.embedding(token_ids, self._embedding)
        rotation = self._rotations[positions].unsqueeze(1)
        for layer, (keys, values) in zip(self._layers, cache, strict=True):
            qkv = F.linear(self._round(self._norm(x, layer.input_norm)), layer.qkv, layer.qkv_bias)
            qkv = qkv.view(len(qkv), -1, config.head_dim)
            query_key, value = qkv[:, :num_rotated], qkv[:, num_rotated:]
            if layer.qk_norm is not None:
                query_key = F.rms_norm(query_key, (config.head_dim,), None, config.norm_eps) * layer.qk_norm
            pairs = torch.view_as_complex(query_key.view(*query_key.shape[:2], -1, 2))
            query_key = torch.view_as_real(pairs * rotation).flatten(-2)
            attended = attention.attend(query_key[:, :num_heads], query_key[:, num_heads:], value, keys, values)
            x = torch.addmm(x, self._round(attended), layer.output)
            if layer.output_bias is not None:
                x = x + layer.output_bias
            normed = self._round(self._norm(x, layer.mlp_norm))
            if layer.router is None:
                gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
                x = torch.addmm(x, self._round(F.silu(gate).mul_(up)), layer.down)
            else:
                x = self._add_experts(x, normed, layer, layer.router)
        return self._norm(x, self._final_norm)

    def _add_experts(self, x: Tensor, normed: Tensor, layer: _Layer, router: Tensor) -> Tensor:
        """``x + sum_e p_e MLP_e(normed)`` over the experts e that are likeliest for a token; p in float32."""
        num_chosen = self.config.num_experts_per_tok
        weight, chosen = F.linear(normed, router).softmax(-1).topk(num_chosen)
        if self.config.norm_topk_prob:
            weight /= weight.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()  # of (token, choice): by expert
        token = order // num_chosen
        ends = torch.bincount(chosen.flatten(), minlength=self.config.num_experts).cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(normed[token], layer.gate_up.mT, offs=ends).chunk(2, dim=-1)
        served = F.grouped_mm(self._round(F.silu(gate).mul_(up)), layer.down, offs=ends)
        return x.index_add(0, token, served.mul_(weight.flatten()[order, None]))

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, vocab] float32 of final hidden states."""
        return F.linear(self._round(hidden), self._head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.config.hidden_size,), weight, self.config.norm_eps)

    def _round(self, x: Tensor) -> Tensor:
        return round_rows_to_e4m3(x) if self._numerics == "fp8_dynamic" else x


class _Fuser:
    """Checks, rounds, reorders and joins the weights of a model."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        self._config, self._weights, self._numerics = config, weights, numerics
        self._pair_order = torch.arange(config.head_dim).view(2, -1).t().flatten()  # 0, D/2, 1, D/2 + 1, ...

    def linear(self, name: str, *shape: int) -> Tensor:
        return round_linear(self._get(name, shape), self._numerics)

    def other(self, name: str, *shape: int) -> Tensor:
        return round_other(self._get(name, shape), self._numerics)

    def layer(self, prefix: str) -> _Layer:
        config, attention, mlp = self._config, prefix + "self_attn.", prefix + "mlp."
        hidden = config.hidden_size
        width = config.num_heads * config.head_dim
        gate_up, down = self._experts(mlp + "experts.") if config.is_routed else self._mlp(mlp)
        return _Layer(
            input_norm=self.other(prefix + "input_layernorm.weight", hidden),
            qkv=self._join_qkv(attention, "weight", hidden),
            qkv_bias=self._join_qkv(attention, "bias") if config.qkv_bias else None,
            qk_norm=self._join_qk_norm(attention) if config.qk_norm else None,
            output=self.linear(attention + "o_proj.weight", hidden, width).t(),
            output_bias=self.other(attention + "o_proj.bias", hidden) if config.output_bias else None,
            mlp_norm=self.other(prefix + "post_attention_layernorm.weight", hidden),
            router=self.other(mlp + "gate.weight", config.num_experts, hidden) if config.is_routed else None,
            gate_up=gate_up,
            down=down.mT,
        )

    def _mlp(self, prefix: str) -> tuple[Tensor, Tensor]:
        """[2I, hidden] and [hidden, I]."""
        hidden, inner = self._config.hidden_size, self._config.intermediate_size
        gate, up = (self.linear(f"{prefix}{name}_proj.weight", inner, hidden) for name in ("gate", "up"))
        return torch.cat((gate, up)), self.linear(prefix + "down_proj.weight", hidden, inner)

    def _experts(self, prefix: str) -> tuple[Tensor, Tensor]:
        """[E, 2I, hidden] and [E, hidden, I]: stacked already, as modules hold them, or expert by expert, as folders do."""
        num, hidden, inner = self._config.num_experts, self._config.hidden_size, self._config.intermediate_size
        if prefix + "gate_up_proj" in self._weights:
            gate_up = self.linear(prefix + "gate_up_proj", num, 2 * inner, hidden)
            return gate_up, self.linear(prefix + "down_proj", num, hidden, inner)
        gate_ups, downs = zip(*(self._mlp(f"{prefix}{i}.") for i in range(num)), strict=True)
        return torch.stack(gate_ups), torch.stack(downs)

    def _join_qkv(self, attention: str, kind: str, *columns: int) -> Tensor:
        """[(H + 2K) D, *columns]: query and key heads in pair order; without a qk norm the query carries the scale."""
        config = self._config
        read = self.linear if kind == "weight" else self.other
        query = read(f"{attention}q_proj.{kind}", config.num_heads * config.head_dim, *columns)
        key, value = (
            read(f"{attention}{name}_proj.{kind}", config.num_kv_heads * config.head_dim, *columns) for name in ("k", "v")
        )
        if not config.qk_norm:
            query.mul_(config.head_dim**-0.5)
        return torch.cat((self._in_pair_order(query), self._in_pair_order(key), value))

    def _join_qk_norm(self, attention: str) -> Tensor:
        """[H + K, D]: the norm of each query head, with the scale, and of each key head."""
        config = self._config
        query = self.other(attention + "q_norm.weight", config.head_dim).mul_(config.head_dim**-0.5)[self._pair_order]
        key = self.other(attention + "k_norm.weight", config.head_dim)[self._pair_order]
        return torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))

    def _in_pair_order(self, rows: Tensor) -> Tensor:
        return rows.view(-1, self._config.head_dim, *rows.shape[1:])[:, self._pair_order].flatten(0, 1)

    def _get(self, name: str, shape: Sequence[int]) -> Tensor:
        found = self._weights.get(name)
        if found is None or tuple(found.shape) != tuple(shape):
            raise ModelFolderError(
                "the weights do not fit the model",
                got=f"{name}: " + ("missing" if found is None else str(tuple(found.shape))),
                allowed=f"{name} of shape {tuple(shape)}",
                fix="send all parameters under their Hugging Face names, of the model that the engine was built from",
            )
        return found


def _write(cache: Tensor, index: Tensor, new: Tensor) -> None:
    cache.view(-1, cache.shape[-1]).index_copy_(0, index, new.reshape(-1, cache.shape[-1]))


def _cache_index(slots: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
    """Where each (token, kv head) lives in a layer's cache seen as [slots * kv_heads * max_context, head_dim]."""
    num_kv_heads, max_context = cache.shape[-3], cache.shape[-2]
    heads = slots[:, None] * num_kv_heads + torch.arange(num_kv_heads)
    return (heads * max_context + positions[:, None]).flatten()


class DecodeAttention:
    """One token for each of the slots ``0 .. rows - 1``; the rows of a tile see at most its crop of positions, 0 skips it."""

    def __init__(self, positions: Tensor, crops: Sequence[int], cache: Tensor) -> None:
        rows = len(positions)
        self._index = _cache_index(torch.arange(rows), positions, cache)
        unseen = torch.arange(max(crops)) > positions[:, None]
        self._bias = torch.zeros(rows, 1, max(crops)).masked_fill_(unseen[:, None], -torch.inf)
        self._tiles = [(i * TILE, min((i + 1) * TILE, rows), crop) for i, crop in enumerate(crops) if crop]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention.attend`. Rows of skipped tiles are 0."""
        _write(keys, self._index, key)
        _write(values, self._index, value)
        rows, num_heads, head_dim = query.shape
        num_kv_heads, max_context = keys.shape[1], keys.shape[2]
        query = query.reshape(rows, num_kv_heads, -1, head_dim)
        out = torch.zeros_like(query)
        for start, end, crop in self._tiles:
            seen_keys = keys[start:end].view(-1, max_context, head_dim)[:, :crop]
            seen_values = values[start:end].view(-1, max_context, head_dim)[:, :crop]
            scores = torch.bmm(query[start:end].flatten(0, 1), seen_keys.transpose(1, 2))
            scores.view(end - start, num_heads, crop).add_(self._bias[start:end, :, :crop])
            torch.bmm(
                torch.softmax(scores, dim=-1), seen_values, out=out[start:end].view(-1, num_heads // num_kv_heads, head_dim)
            )
        return out.view(rows, -1)


class PrefillAttention:
    """The tokens ``[start, start + count)`` of several sequences, packed one after the other."""

    def __init__(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], cache: Tensor) -> None:
        self._slots, self._longest = torch.tensor(slots), max(counts)
        self._context = max(start + count for start, count in zip(starts, counts, strict=True))
        offsets, start_of = torch.arange(self._longest), torch.tensor(starts)[:, None]
        valid = offsets < torch.tensor(counts)[:, None]
        padded_positions = start_of + offsets
        self.positions = padded_positions[valid]
        self._padded_at = valid.flatten().nonzero().squeeze(1)
        self._index = _cache_index(self._slots.repeat_interleave(torch.tensor(counts)), self.positions, cache)
        self._seen = (torch.arange(self._context) <= padded_positions[..., None])[:, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `Attention.attend`."""
        _write(keys, self._index, key)
        _write(values, self._index, value)
        padded = query.new_zeros(len(self._slots) * self._longest, *query.shape[1:]).index_copy_(0, self._padded_at, query)
        seen_keys = keys[:, :, : self._context].index_select(0, self._slots)
        seen_values = values[:, :, : self._context].index_select(0, self._slots)
        attended = F.scaled_dot_product_attention(
            padded.view(-1, self._longest, *query.shape[1:]).transpose(1, 2),
            seen_keys,
            seen_values,
            attn_mask=self._seen,
            scale=1.0,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)[self._padded_at]
