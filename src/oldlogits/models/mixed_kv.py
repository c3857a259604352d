"""The mixed-version forward: OLD where the engine kept keys and values over weight updates.

Every version, the oldest first, computes the entries that it computed in the engine, over those that older versions left,
and gives the log-probs of the tokens that it sampled: each entry is computed once.

    version a   |==== a ====|                     segments of all sequences side by side, in padded micro-batches
    version b               |== b ==|             attends to a's entries and its own
    version c                       |c|
"""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.kv_segments import KVChain, kv_chains, segment_sequences
from oldlogits.batch.pad import MicroBatch, micro_batches
from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.objective.shapes import Bool, Float, Int
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.routing import follow
from oldlogits.models.scorer import ForwardSizes, head_logps, score_tokens
from oldlogits.models.sharding import in_one_forward


class MixedForward:
    """Scores the loss tokens of a batch, version by version.

    Holds the keys and values of all chains of several versions until the last one has been scored:
    ``2 * layers * kv_heads * head_dim * longest chain`` numbers for each.

    Args:
        model: A causal language model; whoever calls `score` gives it the weights of the version.
        batch: The trajectories.
        ranks: The ranks that hold the model: they share what one version sampled, but each computes all chains.
        sizes: The sizes of a forward pass.
    """

    def __init__(
        self, model: PreTrainedModel, batch: TokenBatch, *, ranks: Ranks = ALONE, **sizes: Unpack[ForwardSizes]
    ) -> None:
        self._model, self._batch, self._ranks = model, batch, ranks
        self._sizes = sizes
        chains = kv_chains(batch)
        self._plain = [chain[0] for chain in chains if len(chain) == 1]
        self._chains: list[KVChain] = [chain for chain in chains if len(chain) > 1]
        longest = max((int(chain[-1].tokens[-1]) - chain[0].origin for chain in self._chains), default=0)
        _check_attends_to_all(model, longest)
        self._entries = _Entries(len(self._chains), longest)
        self._cache_keyword = cache_keyword(model.base_model)
        self._logps = torch.full((batch.num_tokens,), math.nan)
        self._computed_at = np.full(batch.num_tokens, -1, np.int64)

    @property
    def num_entries(self) -> int:
        """The number of tokens that all forward passes together read."""
        return sum(segment.num_entries for segment in self._plain + [segment for chain in self._chains for segment in chain])

    @property
    def logps(self) -> NDArray[np.float32]:
        """float32 [loss token], natural log; NaN where the token's version has not been scored."""
        logps: NDArray[np.float32] = self._logps.numpy()[self._batch.loss_mask]
        return logps

    @property
    def computed_at(self) -> NDArray[np.int64]:
        """int64 [loss token]; the version that scored each, -1 where none has."""
        computed_at: NDArray[np.int64] = self._computed_at[self._batch.loss_mask]
        return computed_at

    def score(self, version: int) -> None:
        """Score the tokens of one version; the model has its weights, and older versions have been scored."""
        plain = [segment.tokens for segment in self._plain if segment.version == version]
        if plain:
            tokens = np.concatenate(plain)
            self._logps[tokens] = torch.from_numpy(
                score_tokens(self._model, self._batch, tokens, **self._sizes, ranks=self._ranks)
            )
            self._computed_at[tokens] = version
        with torch.no_grad():
            self._go_on(version)

    def _go_on(self, version: int) -> None:
        """Score the segments of this version that older ones precede or newer ones follow."""
        found = [(row, segment) for row, chain in enumerate(self._chains) for segment in chain if segment.version == version]
        if not found:
            return
        segments = [segment for _, segment in found]
        device = self._model.device
        rows = torch.tensor([row for row, _ in found])
        starts = torch.tensor([segment.begin - segment.origin for segment in segments])
        counts = torch.tensor([segment.num_entries for segment in segments])
        cut, tokens, flat = segment_sequences(self._batch, segments)
        owners, sources = torch.from_numpy(cut.sequence), torch.from_numpy(flat)
        for micro in micro_batches(cut, tokens, self._sizes["micro_batch_tokens"]):
            here = torch.empty(len(micro.input_ids), dtype=torch.int64)
            here[micro.row] = owners[micro.flat]  # every row has a token to score
            offsets = torch.arange(micro.input_ids.shape[1])
            positions = starts[here, None] + offsets
            self._entries.open(rows[here], positions, offsets < counts[here, None], device)
            scored = sources[micro.flat]
            forward = partial(self._forward, micro.to(device), positions.to(device))
            self._logps[scored] = in_one_forward(self._model, forward).cpu()
            self._computed_at[scored.numpy()] = version

    def _forward(self, micro: MicroBatch, positions: Int[Tensor, "row column"]) -> Float[Tensor, " action"]:
        """Compute the log-probs of segments over the entries that their chains may see, and add theirs."""
        follow(self._model, micro)
        hidden = self._model.base_model(
            input_ids=micro.input_ids,
            position_ids=positions,
            attention_mask=self._entries.seen,
            use_cache=True,
            **{self._cache_keyword: self._entries},
        ).last_hidden_state
        return head_logps(self._model, hidden, micro, head_chunk_tokens=self._sizes["head_chunk_tokens"])


def _check_attends_to_all(model: PreTrainedModel, longest: int) -> None:
    """Refuse a model of which some layers do not attend to all of so many entries: windows, states, convolutions."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = (getattr(config, "sliding_window", None) or longest) if "sliding_attention" in kinds else longest
    if longest > window or kinds - {"sliding_attention", "full_attention"}:
        raise MissingLogprobError(
            "old log-probs over keys and values of several versions need a model whose layers attend to all earlier tokens",
            got=f"model_type '{config.model_type}' with layers of {', '.join(sorted(kinds))} over {longest} tokens",
            allowed="full attention, or sliding windows that no sequence passes",
            fix="set engine.kv = 'recompute'",
        )


def cache_keyword(model: torch.nn.Module) -> str:
    """Return the name under which a Hugging Face model takes its cache: transformers 5.24 changed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class _Entries:
    """Keys and values of chains, each entry at its token's position: the cache that a Hugging Face model is given.

    A model asks nothing but `update` of such a cache where it is given positions and a mask.

    Args:
        num_chains: The number of chains.
        longest: The number of entries of the longest chain.
    """

    def __init__(self, num_chains: int, longest: int) -> None:
        self._shape = (num_chains, longest)
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values [chain, position, kv_head, head_dim]

    def open(
        self,
        rows: Int[Tensor, " row"],
        positions: Int[Tensor, "row column"],
        real: Bool[Tensor, "row column"],
        device: torch.device,
    ) -> None:
        """Prepare the next forward on a device, which reads tokens of these chains; the arguments are on the CPU.

        Args:
            rows: The chain of each row.
            positions: The place of each token in its sequence.
            real: False for padding.
            device: The device of the forward.
        """
        self._rows, self._real = rows.to(device), real.to(device)
        self._at = (rows[:, None].expand_as(positions)[real].to(device), positions[real].to(device))
        self._length = int(positions[real].max()) + 1
        self.seen = (torch.arange(self._length) <= positions[..., None])[:, None].to(device)

    def update(
        self, keys: Float[Tensor, "row head column dim"], values: Float[Tensor, "row head column dim"], layer: int, **_: object
    ) -> tuple[Float[Tensor, "row head position dim"], Float[Tensor, "row head position dim"]]:
        """Take over a layer's new entries and return those that the rows may see, up to the newest.

        Transformers 5.24 gives the forward's further arguments, too; nothing here depends on them.
        """
        if layer == len(self._layers):
            shape = (*self._shape, keys.shape[1], keys.shape[3])
            self._layers.append((keys.new_zeros(shape), values.new_zeros(shape)))
        kept_keys, kept_values = self._layers[layer]
        return self._merge(kept_keys, keys), self._merge(kept_values, values)

    def _merge(self, kept: Tensor, new: Tensor) -> Tensor:
        kept[self._at] = new.transpose(1, 2)[self._real]
        return kept[self._rows, : self._length].transpose(1, 2)
