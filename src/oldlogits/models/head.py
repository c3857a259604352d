"""From final hidden states to logits, as the model's own forward pass does it, for any chosen tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.core.errors import ModelFolderError


def logits_of(model: PreTrainedModel, hidden: Float[Tensor, "row width"]) -> Float[Tensor, "row vocab"]:
    """Form the float32 logits of normed final hidden states, with what some families do to them behind the head.

    Granite divides by ``logits_scaling``, Cohere multiplies by ``logit_scale``, Gemma bounds them by
    ``final_logit_softcapping``: ``c tanh(logits / c)``.
    """
    config = model.config.get_text_config()
    logits: Tensor = model.get_output_embeddings()(hidden).float()
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def check_head(model: PreTrainedModel, folder: Path) -> None:
    """Compare `logits_of` with the model's own forward pass, on a few tokens.

    Raises:
        ModelFolderError: They differ: the family does something else behind its decoder.
    """
    ids = torch.arange(min(4, model.config.get_text_config().vocab_size))[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        found = logits_of(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise ModelFolderError(
            "the trainer cannot train this model: between its decoder and its logits is more than a linear head",
            got=f"model_type '{model.config.model_type}' in {folder}: logits off by {(found - expected).abs().max():.2g}",
            allowed="logits that are a linear layer of the final hidden states, scaled or soft-capped",
            fix="choose another model",
        )
