"""prime-rl: a loss with r_d and r_s apart, and a scorer that follows the trainer's weight broadcasts.

    [trainer.loss]  type = "custom"  import_path = "oldlogits.integrations.prime_rl.exact_loss"  kwargs = {band = 1.5}

prime-rl hands a custom loss three log-probs a token. OLD travels as the third, `ref_logprobs`, which its reinforcement losses
do not read: whoever fills `reference_logprobs` of a trace's nodes with `OldScorer.score` has it there. Nothing here imports
prime-rl, which is not on the package index: what is used of its types is named in `LossInputs` below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.objective.shapes import Bool, Float
from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
from oldlogits.core.weights import PolicyVersion
from oldlogits.objective import Discrepancy, split_ratio, surrogate
from oldlogits.sources.tagged import StoredModel, TaggedTokens, lengths_differ
from oldlogits.sources.weight_folders import StepFolders
from oldlogits.versions import PatchStore

_SURE: Final = 0.01
"""A token that the engine gave a log-prob below minus this has no old log-prob of exactly 0."""


class LossInputs(Protocol):
    """What is read of prime-rl's `LossInputs`: natural-log probs, advantages and mask of one sample's tokens."""

    trainer_logprobs: Float[Tensor, " token"]
    inference_logprobs: Float[Tensor, " token"]
    ref_logprobs: Float[Tensor, " token"] | None
    advantages: Float[Tensor, " token"]
    loss_mask: Bool[Tensor, " token"]
    loss_weights: Float[Tensor, " token"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutputs:
    """What prime-rl reads of a loss: the sum over the sample's tokens, which it divides by their number in the batch."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


def exact_loss(
    inputs: LossInputs,
    *,
    band: float = 1.5,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    dual_clip: float | None = 3.0,
    discrepancy: Discrepancy = "weight_and_mask",
) -> LossOutputs:
    """Compute the variant `decoupled_exact` on one sample, with OLD in `ref_logprobs`; the knobs are those of `surrogate`.

    Raises:
        MissingLogprobError: There are no `ref_logprobs`, or they are the zeros that samples and messages without any are filled
            up with.
        TrajectoryError: The tensors have different lengths.
    """
    old, mu, mask = inputs.ref_logprobs, inputs.inference_logprobs, inputs.loss_mask
    if old is None:
        raise _missing("no ref_logprobs")
    lengths = {len(one) for one in (inputs.trainer_logprobs, mu, old, inputs.advantages, mask)}
    if len(lengths) > 1:
        raise lengths_differ("the tensors of a sample", sorted(lengths))
    if unscored := int((mask & (old == 0) & (mu < -_SURE)).sum()):
        raise _missing(f"ref_logprobs that are exactly 0 on {unscored} tokens of which the engine was not sure")
    logp = {MU: mu, OLD: old, THETA: inputs.trainer_logprobs}
    split = split_ratio(VARIANTS["decoupled_exact"], logp)
    terms = surrogate(
        split,
        inputs.advantages,
        mask,
        band=band,
        eps_low=eps_low,
        eps_high=eps_high,
        dual_clip=dual_clip,
        discrepancy=discrepancy,
    )
    values = terms.values if inputs.loss_weights is None else terms.values * inputs.loss_weights
    num = mask.sum().clamp(min=1)
    metrics = {
        "exact/log_r_d": torch.where(mask, terms.log_r_d, 0).sum() / num,
        "exact/log_r_s": torch.where(mask, terms.log_r_s, 0).sum() / num,
        "exact/in_band": (mask & terms.band_mask).sum() / num,
        "exact/active": (mask & terms.band_mask & terms.clip_mask).sum() / num,
    }
    return LossOutputs(loss=-values.sum(), metrics=metrics)


def _missing(got: str) -> MissingLogprobError:
    return MissingLogprobError(
        "a sample has no old logits",
        got=got,
        allowed="OLD of every token of the mask",
        fix="fill reference_logprobs of all sampled nodes of the trace with OldScorer.score",
    )


class OldScorer:
    """Follows a trainer's filesystem broadcasts, keeps their versions as patches, and scores tokens at their own versions.

    A version has to be taken while its folder is there: prime-rl removes older ones (`trainer.weight_broadcast`).

    Args:
        broadcasts: The folder with `step_0`, `step_1`, ...; each is whole once it has a file `STABLE`.
        model: The model that is trained, in a copy of its own.
        store: Takes the versions.
        temperature: Logits are divided by this, as when tokens were sampled.
    """

    def __init__(
        self, broadcasts: Path, model: PreTrainedModel, *, store: PatchStore | None = None, temperature: float = 1.0
    ) -> None:
        self.store = store or PatchStore()
        self._steps = StepFolders(broadcasts, prefix="step_", marker="STABLE")
        self._scorer = StoredModel(model, self.store, temperature=temperature)

    def follow(self) -> list[PolicyVersion]:
        """Take the versions that have become whole since the last call, and return them.

        Raises:
            StoreDamagedError: A folder holds something else than tensors in safetensors files.
            ModelFolderError: A weight is NaN or infinite.
            LayoutError: A version has other tensors than the first one.
        """
        newest = max(self.store.versions, default=-1)
        taken = [version for version in self._steps.versions if version > newest]
        for version in taken:
            self.store.publish(version, self._steps.read(version))
        return taken

    def score(self, token_ids: Sequence[int], mask: Sequence[bool], versions: Sequence[PolicyVersion]) -> list[float]:
        """Give OLD of a branch's tokens as prime-rl's `assign_reference_logprobs` takes them: one a token, 0 outside the mask.

        Where an orchestrator knows only the version at which a rollout was dispatched, `versions` can say no more, and tokens
        sampled after an update of the weights are not exact.

        Raises:
            TrajectoryError: Lengths differ, or a token of the mask has no version.
            VersionEvictedError: A version was never taken, or dropped.
        """
        tagged = TaggedTokens(
            token_ids=np.asarray(token_ids, np.int64), versions=np.asarray(versions, np.int64), mask=np.asarray(mask, bool)
        )
        values: list[float] = self._scorer.score([tagged])[0].tolist()
        return values
