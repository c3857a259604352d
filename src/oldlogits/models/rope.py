"""Rotary frequencies that a family chooses by the longest sequence of a forward pass, fixed for a run.

Phi-3 and Phi-4-mini ("longrope") have one set of frequencies for sequences up to a length and one for longer ones, others scale
them with the length ("dynamic"). Then a token's log-prob depends on what stands beside it in a micro-batch, and on what is read
behind it: nothing that is scored twice comes out the same. For a whole run they are those of its longest sequence, by which
vLLM chooses between the two sets as well (``--max-model-len``).
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def fix_frequencies(model: PreTrainedModel, max_context: int) -> None:
    """Let a model that is on the CPU rotate as in a sequence of `max_context` tokens, whatever it reads.

    Other kinds of scaling stay as they are.
    """
    for module in model.modules():
        match getattr(module, "rope_type", None):
            case str(kind) if _varies(kind):
                module(torch.zeros(1), torch.tensor([[max_context - 1]]))
                module.rope_type = "default"  # what it has chosen now is not chosen again
            case dict(kinds) if any(map(_varies, kinds.values())):
                for layer_type in filter(lambda name: _varies(kinds[name]), kinds):
                    module(torch.zeros(1), torch.tensor([[max_context - 1]]), layer_type)
                module.rope_type = {name: "default" if _varies(kind) else kind for name, kind in kinds.items()}


def _varies(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind
