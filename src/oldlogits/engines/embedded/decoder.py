"""A small fp32 decoder of the Llama and Qwen family over a static cache of keys and values.

It reads the same model folders and parameter names as Hugging Face's classes and shares no code with them: two
engines, so that their discrepancy is real. Weights are fused at load (query-key-value, gate-up) and the rows of
each query and key head are reordered so that a rotary pair is one complex number; the score scale is folded in.
In a mixture of experts each layer has several MLPs, and a router picks those that serve a token.
Everything computes on the device of the decoder: weights and indices are brought there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from oldlogits.core.errors import ModelFolderError
from oldlogits.core.trajectory import NARROW
from oldlogits.engines.embedded.attention import Attention
from oldlogits.engines.embedded.grouped import grouped_mm
from oldlogits.engines.embedded.model_folder import DecoderConfig
from oldlogits.engines.embedded.numerics import Numerics, round_linear, round_other, round_rows_to_e4m3
from oldlogits.engines.embedded.rope import rotations
from oldlogits.models.device import CPU


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """What `Decoder.load` takes over."""

    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    layers: Sequence[_Layer]

    def tensors(self) -> list[Tensor]:
        """All of them, in one order."""
        values = [getattr(layer, field.name) for layer in self.layers for field in fields(layer)]
        return [self.embedding, self.head, self.final_norm, *(value for value in values if value is not None)]


class Decoder:
    """The forward pass, and the weights under their Hugging Face names that it reads."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        numerics: Numerics,
        max_context: int,
        device: torch.device = CPU,
    ) -> None:
        self.config, self._numerics, self.device = config, numerics, device
        self._rotations = rotations(config, max_context).to(device)
        self._weights = self._fuse(weights)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over copies of new weights, rounded and fused; on an error the old ones stay.

        On a GPU they take the memory of the old ones: captured graphs read there.
        """
        new = self._fuse(weights)
        if self.device.type == "cpu":
            self._weights = new
            return
        for old, fresh in zip(self._weights.tensors(), new.tensors(), strict=True):
            old.copy_(fresh)

    def _fuse(self, weights: Mapping[str, Tensor]) -> _Weights:
        config = self.config
        fuser = _Fuser(config, weights, self._numerics, self.device)
        head_name = "model.embed_tokens.weight" if config.tied_head else "lm_head.weight"
        return _Weights(
            embedding=fuser.other("model.embed_tokens.weight", config.vocab_size, config.hidden_size),
            head=fuser.linear(head_name, config.vocab_size, config.hidden_size),
            final_norm=fuser.other("model.norm.weight", config.hidden_size),
            layers=[fuser.layer(f"model.layers.{i}.") for i in range(config.num_layers)],
        )

    def new_cache(self, max_num_seqs: int) -> Tensor:
        """Zeros [layers, 2 (keys, values), slots, kv_heads, max_context, head_dim]."""
        config = self.config
        shape = (config.num_layers, 2, max_num_seqs, config.num_kv_heads, len(self._rotations), config.head_dim)
        return torch.zeros(shape, device=self.device)

    def new_routing(self, max_num_seqs: int) -> Tensor:
        """Zeros [slots * max_context, layers, experts of a token]: the cache of the experts that served each token."""
        config, dtype = self.config, torch.uint8 if self.config.num_experts <= NARROW else torch.int16
        shape = (max_num_seqs * len(self._rotations), config.num_layers, config.num_experts_per_tok)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: Tensor,
        attention: Attention,
        routing: Tensor | None = None,
        *,
        only_cache: bool = False,
    ) -> Tensor:
        """The final hidden states [tokens, hidden], normed, of tokens at positions; their keys and values go to the cache.

        The experts that served them go to `routing`, if it is there. With `only_cache` the last layer ends when it has
        written, and what is returned means nothing.
        """
        config, weights, chosen = self.config, self._weights, list[Tensor]()
        num_heads, num_rotated = config.num_heads, config.num_heads + config.num_kv_heads
        x = F.embedding(token_ids, weights.embedding)
        rotation = self._rotations[positions].unsqueeze(1)
        for layer, (keys, values) in zip(weights.layers, cache, strict=True):
            qkv = F.linear(self._round(self._norm(x, layer.input_norm)), layer.qkv, layer.qkv_bias)
            qkv = qkv.view(len(qkv), -1, config.head_dim)
            query_key, value = qkv[:, :num_rotated], qkv[:, num_rotated:]
            if layer.qk_norm is not None:
                query_key = F.rms_norm(query_key, (config.head_dim,), None, config.norm_eps) * layer.qk_norm
            pairs = torch.view_as_complex(query_key.view(*query_key.shape[:2], -1, 2))
            query_key = torch.view_as_real(pairs * rotation).flatten(-2)
            attention.write(query_key[:, num_heads:], value, keys, values)
            if only_cache and layer is weights.layers[-1]:
                return x
            attended = attention.attend(query_key[:, :num_heads], keys, values)
            x = torch.addmm(x, self._round(attended), layer.output)
            if layer.output_bias is not None:
                x = x + layer.output_bias
            normed = self._round(self._norm(x, layer.mlp_norm))
            if layer.router is None:
                gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
                x = torch.addmm(x, self._round(F.silu(gate).mul_(up)), layer.down)
            else:
                x = self._add_experts(x, normed, layer, layer.router, chosen)
        if routing is not None:
            routing[attention.entries] = torch.stack(chosen, dim=1).to(routing.dtype)
        return self._norm(x, weights.final_norm)

    def _add_experts(self, x: Tensor, normed: Tensor, layer: _Layer, router: Tensor, choices: list[Tensor]) -> Tensor:
        """``x + sum_e p_e MLP_e(normed)`` over the experts e likeliest for a token, which `choices` gets; p in float32."""
        num_chosen = self.config.num_experts_per_tok
        weight, chosen = F.linear(normed, router).softmax(-1).topk(num_chosen)
        choices.append(chosen)
        if self.config.norm_topk_prob:
            weight /= weight.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()  # of (token, choice): by expert
        token = order // num_chosen
        ends = torch.bincount(chosen.flatten(), minlength=self.config.num_experts).cumsum(0, dtype=torch.int32)
        gate, up = grouped_mm(normed[token], layer.gate_up.mT, ends).chunk(2, dim=-1)
        served = grouped_mm(self._round(F.silu(gate).mul_(up)), layer.down, ends)
        return x.index_add(0, token, served.mul_(weight.flatten()[order, None]))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[tokens, vocab] float32 of final hidden states, in the memory of `out` if it is given."""
        return torch.mm(self._round(hidden), self._weights.head.t(), out=out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.config.hidden_size,), weight, self.config.norm_eps)

    def _round(self, x: Tensor) -> Tensor:
        return round_rows_to_e4m3(x) if self._numerics == "fp8_dynamic" else x


class _Fuser:
    """Checks, rounds, reorders and joins the weights of a model."""

    def __init__(self, config: DecoderConfig, weights: Mapping[str, Tensor], numerics: Numerics, device: torch.device) -> None:
        self._config, self._weights, self._numerics, self._device = config, weights, numerics, device
        pairs = torch.arange(config.head_dim, device=device).view(2, -1)
        self._pair_order = pairs.t().flatten()  # 0, D/2, 1, D/2 + 1, ...

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
        return found.to(self._device)
