"""Forward pass -> log-probs of given tokens, with the output head on those tokens only."""

from __future__ import annotations

from typing import TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from oldlogits.batch.pad import MicroBatch
from oldlogits.batch.sequences import Sequences
from oldlogits.batch.shard import shard_micro_batches
from oldlogits.models.head import logits_of
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.sharding import in_one_forward


class ForwardSizes(TypedDict):
    """How much a forward pass takes at once.

    Args:
        micro_batch_tokens: The largest padded size of one forward, in tokens.
        head_chunk_tokens: The number of tokens that go through the output head at once.
    """

    micro_batch_tokens: int
    head_chunk_tokens: int


def action_logps(model: PreTrainedModel, micro: MicroBatch, *, head_chunk_tokens: int) -> Float[Tensor, " action"]:
    """Give natural-log probs of the micro-batch's tokens, ``log_softmax(logits / T)[token]``, in the order of ``micro.flat``.

    Hidden states are gathered before the head; the head sees `head_chunk_tokens` at once, and where gradients are
    needed and there are several chunks, a chunk's logits are formed again in the backward pass, so that memory does
    not grow with the number of tokens times the vocabulary.
    """
    micro = micro.to(model.device)

    def forward() -> Tensor:
        hidden = model.base_model(input_ids=micro.input_ids, use_cache=False).last_hidden_state
        return head_logps(model, hidden, micro, head_chunk_tokens=head_chunk_tokens)

    return in_one_forward(model, forward)


def head_logps(
    model: PreTrainedModel, hidden: Float[Tensor, "row column width"], micro: MicroBatch, *, head_chunk_tokens: int
) -> Float[Tensor, " action"]:
    """Give the log-probs of a micro-batch's tokens from its final hidden states on its device; see `action_logps`."""
    hidden = hidden[micro.row, micro.column]
    chunks = range(0, len(hidden), head_chunk_tokens)
    recompute = torch.is_grad_enabled() and len(chunks) > 1
    pieces = []
    for start in chunks:
        part = slice(start, start + head_chunk_tokens)
        arguments = (model, hidden[part], micro.targets[part], micro.temperature[part])
        pieces.append(checkpoint(_head_logps, *arguments, use_reentrant=False) if recompute else _head_logps(*arguments))
    return torch.cat(pieces)


def score_tokens(
    model: PreTrainedModel,
    sequences: Sequences,
    tokens: NDArray[np.int64],
    *,
    ranks: Ranks = ALONE,
    **sizes: Unpack[ForwardSizes],
) -> NDArray[np.float32]:
    """Give natural-log probs of tokens of sequences, without gradients, on all ranks.

    Args:
        model: A causal language model.
        sequences: The sequences that it reads.
        tokens: int64 [scored token], ascending flat indices; none begins a sequence.
        ranks: The ranks that hold the model; each computes some of the sequences, and all make this call.
        sizes: The sizes of a forward pass.
    """
    out = torch.zeros(sequences.num_tokens, device=model.device)
    budget, chunk = sizes["micro_batch_tokens"], sizes["head_chunk_tokens"]
    with torch.no_grad():
        for one in shard_micro_batches(sequences, tokens, budget, rank=ranks.rank, num_ranks=ranks.num_ranks):
            logps = action_logps(model, one.micro, head_chunk_tokens=chunk)
            if not one.is_padding:
                out[one.micro.flat.to(out.device)] = logps
    scores: NDArray[np.float32] = ranks.sum(out.cpu()[torch.from_numpy(tokens)]).numpy()
    return scores


def _head_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    logits = logits_of(model, hidden) / temperature.unsqueeze(1)
    return -nn.functional.cross_entropy(logits, targets, reduction="none")
