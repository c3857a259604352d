"""Padded ``[row, column]`` batches, as most trainers hold them, through the flat functions of this package.

::

    padded [row, column] --flatten_padded(mask)--> flat [token] --masked_is, weighted_loss--> loss
                         <--unflatten_padded(mask)--           --diagnose, to_metrics------> metrics

The mask alone says which columns count, so that a row may be padded on its left, on its right, or in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError, MissingLogprobError
from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.shapes import Bool, Float, Int, Shaped
from oldlogits.core.policies import Policy
from oldlogits.objective.aggregate import Aggregation, token_weights, weighted_loss
from oldlogits.objective.correct import correct
from oldlogits.objective.diagnostics import diagnose, to_metrics
from oldlogits.objective.losses.masked_is import masked_is
from oldlogits.objective.ratios import log_discrepancy

Predicts = Literal["own", "next"]
"""What column i of log-probs is about. own: ``log p(token i | < i)``. next: ``log p(token i + 1 | <= i)``, as logits stand."""


def flatten_padded(
    values: Shaped[Tensor, " row"] | Shaped[Tensor, "row column"], mask: Bool[Tensor, "row time"], predicts: Predicts = "own"
) -> Shaped[Tensor, " token"]:
    """Give the values of the masked tokens, row after row; the gradient flows through.

    Args:
        values: One value for each row, which all of its tokens get; or one for each column. With "next" the last column,
            which predicts a token beyond the row, may be absent.
        mask: True for each token to take; in column i for token i, whatever `values` predict.
        predicts: What column i of `values` is about. Where mask and values were shifted together, it is "own".

    Raises:
        ConfigError: The shapes do not fit, or the mask is not of bools.
        MissingLogprobError: With "next", a token of the mask stands in the first column, which nothing predicts.

    Example:
        values [[.1, .2, .3], [.4, .5, .6]], mask [[0, 1, 1], [0, 1, 0]]: "own" gives [.2, .3, .5], "next" [.1, .2, .4].
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ConfigError(
            "a padded mask marks tokens",
            got=f"{mask.dtype} of shape {tuple(mask.shape)}",
            allowed="bool [row, column]",
            fix="pass mask.bool(): integers would be taken for places",
        )
    num_rows, num_columns = mask.shape
    if values.ndim == 1 and len(values) == num_rows:
        return values[:, None].expand(mask.shape)[mask]
    is_next = predicts == "next"
    if values.ndim != 2 or len(values) != num_rows or values.shape[1] not in (num_columns, num_columns - is_next):
        raise ConfigError(
            "padded values do not fit their mask",
            got=f"shape {tuple(values.shape)}, mask {tuple(mask.shape)}, predicts = '{predicts}'",
            allowed="(rows,), or (rows, columns) of the mask; with 'next' one column less will do",
            fix="give the mask of the same tokens; tensors that are both shifted by one are 'own'",
        )
    if not is_next:
        return values[mask]
    if bool(mask[:, 0].any()):
        raise MissingLogprobError(
            "the first token of a row has no log-prob",
            got="predicts = 'next', and a mask that holds in column 0",
            allowed="a mask over tokens that stand behind another one",
            fix="mask the first column out, or pass predicts = 'own' if mask and log-probs are shifted together",
        )
    return values[:, : num_columns - 1][mask[:, 1:]]


def unflatten_padded(
    values: Shaped[Tensor, " token"], mask: Bool[Tensor, "row time"], fill: float = 0.0
) -> Shaped[Tensor, "row time"]:
    """Put flat values back to the columns of their tokens, and `fill` elsewhere; the gradient flows through.

    Example:
        values [.2, .3, .5], mask [[0, 1, 1], [0, 1, 0]]: [[0, .2, .3], [0, .5, 0]].
    """
    return torch.full(mask.shape, fill, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedLoss:
    """The loss of a padded batch, and what its tokens had to do with it.

    Args:
        loss: The scalar to call `backward` of.
        terms: The surrogate, the ratios and the masks of each token, flat; `unflatten_padded` puts them back.
        tokens: The tokens as the loss received them, flat.
    """

    loss: Float[Tensor, ""]
    terms: LossTerms
    tokens: LossInputs

    def metrics(self) -> dict[str, float]:
        """Give the metrics of docs/metrics.md that ratios and masks tell, and the loss; waits for the device."""
        staleness, terms = self.tokens.staleness, self.terms
        found = diagnose(
            terms.log_r_d,
            terms.log_r_s.detach(),
            band_mask=terms.band_mask,
            clip_mask=terms.clip_mask,
            loss_mask=self.tokens.loss_mask,
            staleness=staleness,
            advantages=self.tokens.advantages,
            num_staleness=int(staleness.max()) + 1 if len(staleness) else 1,
        )
        return {"loss/value": float(self.loss.detach()), **to_metrics(found)}


def padded_loss(
    logp: Mapping[Policy, Float[Tensor, "row column"]],
    advantages: Float[Tensor, " row"] | Float[Tensor, "row time"],
    mask: Bool[Tensor, "row time"],
    objective: Objective,
    *,
    staleness: Int[Tensor, " row"] | Int[Tensor, "row time"] | None = None,
    predicts: Predicts = "own",
    aggregation: Aggregation = "token-mean",
    constant: float | None = None,
) -> PaddedLoss:
    """``loss = -sum_i w_i S_i`` of a padded batch (PAPER, "The objective, spelled out"): `masked_is`, then `weighted_loss`.

    Args:
        logp: Natural log-probs of the sampled tokens, float32 or float64: MU, THETA, and the variant's proximal policy. Only
            those of THETA carry a gradient. What stands outside the mask is never read, NaN included.
        advantages: One for each trajectory, or one for each token; in the dtype of the log-probs.
        mask: True for each token that was sampled and is trained.
        objective: The variant and the bounds.
        staleness: The trainer's version minus the version that sampled a token, int64; the metrics tell it apart. None: 0.
        predicts: What column i of the log-probs is about; mask, advantages and staleness are those of token i in any case.
        aggregation: The denominator, counted over this batch; in "sequence-mean" each row is a sequence.
        constant: The denominator of "constant". Passing the count of a whole optimizer step makes losses of parts add up.

    Raises:
        ConfigError: The mask is not bool, the shapes do not fit, or a bound or the denominator is out of range.
        MissingLogprobError: A policy of the variant, or the log-prob of a first token, is missing.

    Example:
        >>> import torch
        >>> from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
        >>> logp = {policy: torch.tensor([[p, 0.9]]).log() for policy, p in {MU: 0.50, OLD: 0.55, THETA: 0.66}.items()}
        >>> mask = torch.tensor([[False, True]])
        >>> knobs = Objective(variant=VARIANTS["decoupled_exact"])
        >>> padded_loss(logp, torch.tensor([2.0]), mask, knobs, predicts="next").loss
        tensor(-2.6400)
    """
    if sums := [policy for policy, values in logp.items() if values.ndim == 1]:
        raise ConfigError(
            "log-probs are of tokens, one a column",
            got=f"one a row for {sums[0]}, shape {tuple(logp[sums[0]].shape)}",
            allowed="(rows, columns) of the mask",
            fix="pass the log-prob of each token, not their sum over a sequence",
        )
    flat = {policy: flatten_padded(values, mask, predicts) for policy, values in logp.items()}
    loss_mask = flatten_padded(mask, mask)
    rows = torch.arange(len(mask), device=mask.device)
    tokens = LossInputs(
        logp=flat,
        advantages=flatten_padded(advantages, mask),
        loss_mask=loss_mask,
        staleness=flatten_padded(torch.zeros_like(rows) if staleness is None else staleness, mask),
        sequence_index=flatten_padded(rows, mask),
        num_sequences=len(mask),
    )
    terms = masked_is(tokens, objective)
    is_kept = aggregation == "token-mean-kept"
    weights = token_weights(
        loss_mask,
        mode=aggregation,
        sequence_index=tokens.sequence_index,
        num_sequences=tokens.num_sequences,
        kept_mask=correct(log_discrepancy(objective.variant, flat), tokens, objective).kept if is_kept else None,
        constant=constant,
        dtype=terms.values.dtype,
    )
    return PaddedLoss(loss=weighted_loss(terms.values, weights), terms=terms, tokens=tokens)
