"""How the decoder reads a micro-batch: padded rows, or one packed row whose tokens attend to what stands before them in a trie.

    decode(model, micro) -> base model -> mask of transformers' mask interface: the trie, where there is one
                                      -> attention of transformers' attention interface, in each layer, by that mask

Nothing else of a model mixes tokens, or it cannot read packed rows: whether it can is tried when it is opened. The mask goes to
the layers as their argument, so that one that computes its activations again in the backward pass attends to the same.
"""

from __future__ import annotations

from contextvars import ContextVar
from itertools import pairwise
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from oldlogits.batch.pack import packed_micro_batches
from oldlogits.batch.pad import MicroBatch
from oldlogits.batch.sequences import Sequences
from oldlogits.batch.trie import Trie
from oldlogits.core.scoring import Layout
from oldlogits.models.head.logits import logits_of
from oldlogits.models.layout.attention import Seen, attend

_NAME: Final = "oldlogits"
_MOVED: Final = 1e-4
"""Logits that differ by a larger share of the largest are of other tokens, and not of another order of the same sums."""
_LAYOUTS: Final[WeakKeyDictionary[nn.Module, Layout]] = WeakKeyDictionary()
_READING: Final[ContextVar[Trie | None]] = ContextVar("reading", default=None)


def layout_of(model: nn.Module) -> Layout:
    """Tell how the micro-batches of a model are laid out; padded, where nobody has said otherwise."""
    return _LAYOUTS.get(model, "padded")


def lay_out(model: PreTrainedModel, layout: Layout) -> str:
    """Let a model read micro-batches of a layout from now on, if it can; else they are padded.

    The model is whole, on the CPU, and computes in float32; a copy of one that can is not tried again.

    Returns:
        Why they are padded although another layout is asked for; empty: they are not.
    """
    if layout == "padded":
        return ""
    before = _implementation(model)
    why = "" if before == _NAME else f"its attention is computed as '{before}', not as 'sdpa'"
    if before == "sdpa":
        model.set_attn_implementation(_NAME)  # a family that computes attention by itself keeps its own
        is_replaced = _implementation(model) == _NAME
        if why := _why_padded(model) if is_replaced else "its attention cannot be replaced":
            model.set_attn_implementation(before)
    if not why:
        _LAYOUTS[model] = layout
    return why


def decode(model: PreTrainedModel, micro: MicroBatch) -> Tensor:
    """Give the normed final hidden states, [row, column, width], of a micro-batch on the model's device."""
    positions = {}
    if micro.trie is not None:
        positions["position_ids"] = torch.from_numpy(micro.trie.positions[None]).to(micro.input_ids.device)
    before = _READING.set(micro.trie)
    try:
        hidden: Tensor = model.base_model(input_ids=micro.input_ids, use_cache=False, **positions).last_hidden_state
    finally:
        _READING.reset(before)
    return hidden


def _implementation(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def _mask(**arguments: object) -> object:
    """Make the mask of a forward pass, one of a trie if that is read; `local_size` is how many tokens back its layers see."""
    trie, window = _READING.get(), arguments.get("local_size")
    if trie is None:
        return sdpa_mask(**arguments)
    assert window is None or isinstance(window, int)
    return Seen(trie, window)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **arguments: object
) -> tuple[Tensor, None]:
    """Attend as the mask says, in each sequence or in a trie; the arguments are those of transformers' interface."""
    if not isinstance(attention_mask, Seen):
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
        return found
    scale = arguments.get("scaling")
    assert scale is None or isinstance(scale, float)
    return attend(query, key, value, attention_mask, scale), None


@torch.no_grad()
def _why_padded(model: PreTrainedModel) -> str:
    """Say why a model gives other logits in a packed row than for each sequence alone; empty: it does not.

    The sequences are such that most of them share a beginning that stands before another one, and most follow another one.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tails = (9, 5, 4), (8, 7, 6, 1), (7, 7), (6, 2, 3), (5, 1, 8), (4, 6)
    common, apart = list(range(20)), (range(19, 9, -1), range(9, 3, -1))
    parts = [[*common, *tail] for tail in tails] + [list(one) for one in apart]
    starts = np.cumsum([0, *map(len, parts)])
    ids = np.array([i % vocabulary for part in parts for i in part])
    batch = Sequences(token_ids=ids, temperature=np.ones(len(ids), np.float32), starts=starts)
    (micro,) = packed_micro_batches(batch, starts[1:] - 1, len(ids), shares=True)
    rows = [torch.from_numpy(ids[start:end][None]) for start, end in pairwise(starts.tolist())]
    alone = [model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -2:-1] for row in rows]
    try:
        packed = decode(model, micro)[micro.row, micro.column]
    except (TypeError, AttributeError) as error:
        return f"it takes no packed rows ({error})"
    found, expected = logits_of(model, packed), logits_of(model, torch.cat(alone))
    moved = float(((found - expected).abs().amax(1) / expected.abs().max()).median())  # a tie of experts moves few tokens
    return "" if moved <= _MOVED else f"its layers mix tokens by more than attention, and logits move by {moved:.1%}"


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
