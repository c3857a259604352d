"""Forward pass -> log-probs of given tokens, with the output head on those tokens only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.pad import MicroBatch
from oldlogits.batch.sequences import Sequences
from oldlogits.batch.shard import RankMicroBatch, shard_micro_batches
from oldlogits.core.objective.shapes import Float
from oldlogits.models.head.logits import LogitForm
from oldlogits.models.head.logps import HeadWork, token_logps, token_logps_and_entropies
from oldlogits.models.layout.decoder import decode, layout_of
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.routing import follow
from oldlogits.models.sharding import in_one_forward


class ForwardSizes(TypedDict):
    """How much a forward pass takes at once.

    Args:
        micro_batch_tokens: The largest padded size of one forward, in tokens.
        head_chunk_tokens: The number of tokens that go through the output head at once, for a few words at a time.
    """

    micro_batch_tokens: int
    head_chunk_tokens: int


def action_logps(
    model: PreTrainedModel, micro: MicroBatch, *, head_chunk_tokens: int, entropy: Tensor | None = None
) -> Float[Tensor, " action"]:
    """Give natural-log probs of the micro-batch's tokens, ``log_softmax(logits / T)[token]``, in the order of ``micro.flat``.

    Hidden states are gathered before the head. `entropy`, float32 [action] where the model is, takes that of each token's
    distribution, in nats.
    """
    micro = micro.to(model.device)
    follow(model, micro)

    def forward() -> Tensor:
        hidden = decode(model, micro)
        return head_logps(model, hidden, micro, head_chunk_tokens=head_chunk_tokens, entropy=entropy)

    return in_one_forward(model, forward)


def action_logps_and_entropies(
    model: PreTrainedModel, micro: MicroBatch, *, head_chunk_tokens: int
) -> tuple[Float[Tensor, " action"], Float[Tensor, " action"]]:
    """Give what `action_logps` gives, and the entropy of each token's distribution in nats, both with gradients."""
    micro = micro.to(model.device)
    follow(model, micro)

    def forward() -> tuple[Tensor, Tensor]:
        hidden, head = decode(model, micro), model.get_output_embeddings()
        work = HeadWork(form=LogitForm.of(model), tokens_at_once=head_chunk_tokens)
        rows = hidden[micro.row, micro.column]
        return token_logps_and_entropies(rows, head.weight, head.bias, micro.targets, micro.temperature, work)

    return in_one_forward(model, forward)


def head_logps(
    model: PreTrainedModel,
    hidden: Float[Tensor, "row column width"],
    micro: MicroBatch,
    *,
    head_chunk_tokens: int,
    entropy: Tensor | None = None,
) -> Float[Tensor, " action"]:
    """Give the log-probs of a micro-batch's tokens from its final hidden states on its device; see `action_logps`."""
    head, rows = model.get_output_embeddings(), hidden[micro.row, micro.column]
    work = HeadWork(form=LogitForm.of(model), tokens_at_once=head_chunk_tokens, entropy=entropy)
    compute = getattr(head, "token_logps", token_logps)  # another one: `oldlogits.models.head.kernel`
    logps: Tensor = compute(rows, head.weight, head.bias, micro.targets, micro.temperature, work)
    return logps


def rank_micro_batches(
    model: PreTrainedModel, batch: Sequences, tokens: NDArray[np.int64], budget: int, ranks: Ranks
) -> Iterator[RankMicroBatch]:
    """Yield the micro-batches in which a rank reads tokens of sequences, laid out as the model's are."""
    layout = layout_of(model)
    return shard_micro_batches(batch, tokens, budget, rank=ranks.rank, num_ranks=ranks.num_ranks, layout=layout)


def score_tokens(
    model: PreTrainedModel,
    sequences: Sequences,
    tokens: NDArray[np.int64],
    *,
    ranks: Ranks = ALONE,
    **sizes: Unpack[ForwardSizes],
) -> NDArray[np.float32]:
    """Give natural-log probs of tokens as `score_and_count` does."""
    return score_and_count(model, sequences, tokens, ranks=ranks, **sizes)[0]


def score_and_count(
    model: PreTrainedModel,
    sequences: Sequences,
    tokens: NDArray[np.int64],
    *,
    ranks: Ranks = ALONE,
    **sizes: Unpack[ForwardSizes],
) -> tuple[NDArray[np.float32], int]:
    """Give natural-log probs of tokens of sequences, without gradients, on all ranks.

    Args:
        model: A causal language model.
        sequences: The sequences that it reads.
        tokens: int64 [scored token], ascending flat indices; none begins a sequence.
        ranks: The ranks that hold the model; each computes some of the sequences, and all make this call.
        sizes: The sizes of a forward pass.

    Returns:
        float32 [scored token], and the tokens that the forward passes have read on all ranks.
    """
    return _score(model, rank_micro_batches(model, sequences, tokens, sizes["micro_batch_tokens"], ranks), tokens, ranks, sizes)


def score_in_place(
    model: PreTrainedModel,
    batch: TokenBatch,
    tokens: NDArray[np.int64],
    *,
    ranks: Ranks = ALONE,
    **sizes: Unpack[ForwardSizes],
) -> tuple[NDArray[np.float32], int]:
    """Give log-probs of loss tokens of a batch as `score_and_count` does, in the very micro-batches that train them.

    Each tensor then has the shape that it has in the training forward, and every number is the same where the weights are.
    """
    loss_tokens = np.flatnonzero(batch.loss_mask)
    step_of, budget = batch.step[batch.sequence[loss_tokens]], sizes["micro_batch_tokens"]
    found = (
        one
        for step in np.unique(step_of)
        for one in rank_micro_batches(model, batch, loss_tokens[step_of == step], budget, ranks)
    )
    return _score(model, found, tokens, ranks, sizes)


@torch.no_grad()
def _score(
    model: PreTrainedModel, found: Iterable[RankMicroBatch], tokens: NDArray[np.int64], ranks: Ranks, sizes: ForwardSizes
) -> tuple[NDArray[np.float32], int]:
    """Score the `tokens`, ascending, that are among those of micro-batches."""
    out, num_read = torch.zeros(len(tokens), device=model.device), torch.zeros((), dtype=torch.int64)
    for one in found:
        wanted = np.flatnonzero(np.isin(one.micro.flat.numpy(), tokens))
        if ranks.num_ranks == 1 and not len(wanted):
            continue  # several ranks gather weights together
        logps = action_logps(model, one.micro, head_chunk_tokens=sizes["head_chunk_tokens"])
        if not one.is_padding:
            at = np.searchsorted(tokens, one.micro.flat.numpy()[wanted])
            out[torch.from_numpy(at).to(out.device)] = logps[torch.from_numpy(wanted).to(out.device)]
            num_read += one.micro.num_read
    scores: NDArray[np.float32] = ranks.sum(out.cpu()).numpy()
    return scores, int(ranks.sum(num_read))
