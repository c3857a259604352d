"""Rotary positions: the angle by which each pair of a head's dimensions is turned at each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oldlogits.engines.embedded.model_folder import DecoderConfig


def rotations(config: DecoderConfig, max_context: int) -> Tensor:
    """Return complex64 [max_context, head_dim / 2] of absolute value 1.

    Llama 3 turns by a smaller angle what turns slowly: a pair that takes more than ``original / low`` positions for a turn,
    ``1 / factor`` as far; one that takes less than ``original / high``, as far as ever; in between a mean of the two that is
    linear in the number of turns over the original context.
    """
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    rope = config.rope
    if rope.rope_type == "llama3":
        turns = rope.original * frequencies / (2 * math.pi)
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / rope.factor)
    angles = torch.arange(max_context).float()[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)
