"""All checks, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from oldlogits.doctor.checks import decisions, engine, labels, policies, repeats, values
from oldlogits.doctor.tokens import Tokens
from oldlogits.doctor.verdicts import Verdict, cannot_tell


@dataclass(frozen=True, slots=True)
class Check:
    """A check of one batch.

    Args:
        name: How a table, a page and JSON call it, and where its remedies are found.
        needs: The columns without which it cannot tell; "a|b": one of both.
        run: The check.
    """

    name: str
    needs: tuple[str, ...]
    run: Callable[[Tokens], Verdict]

    def of(self, tokens: Tokens) -> Verdict:
        """The verdict on a batch."""
        missing = [need for need in self.needs if not any(tokens.has(name) for name in need.split("|"))]
        if missing:
            return cannot_tell(f"the file holds no {', '.join(need.replace('|', ' or ') for need in missing)}")
        return self.run(tokens)


def asks(run: Callable[..., Verdict]) -> str:
    """What a check looks for."""
    return (run.__doc__ or "").partition("\n")[0]


TRAINER: Final = "logp_old|logp_theta"

CHECKS: Final = (
    Check("ratio-is-one", ("logp_mu", "logp_old", "logp_theta"), policies.ratio_is_one),
    Check("old-is-mu", ("logp_mu", "logp_old"), policies.old_is_mu),
    Check("old-is-theta", ("logp_mu", "logp_old", "logp_theta", "lag"), policies.old_is_theta),
    Check("old-of-another-version", ("logp_mu", "logp_old", "lag"), policies.old_of_another_version),
    Check("missing-old", ("logp_mu", "logp_theta", "lag", "advantage"), policies.missing_old),
    Check("clip-never-acts", ("logp_mu", "logp_theta", "advantage", "kept"), decisions.clip_never_acts),
    Check("unbounded-negative", ("logp_mu", "logp_theta", "advantage"), decisions.unbounded_negative),
    Check("zero-logprobs", ("logp_mu|logp_old|logp_theta",), values.zero_logprobs),
    Check("impossible-logprobs", ("logp_mu|logp_old|logp_theta",), values.impossible_logprobs),
    Check("missing-logprobs", ("logp_mu|logp_old|logp_theta",), values.missing_logprobs),
    Check("shifted-by-one", ("logp_mu", TRAINER), values.shifted_by_one),
    Check("versions-missing", (), labels.versions_missing),
    Check("versions-impossible", (), labels.versions_impossible),
    Check("version-per-group", ("version", "logp_mu", TRAINER), labels.version_per_group),
    Check("labels-late", ("version", "logp_mu", TRAINER), labels.labels_late),
    Check("mean-r-d", ("logp_mu", TRAINER), engine.mean_r_d),
    Check("stale-cache", ("logp_mu", TRAINER, "version"), engine.stale_cache),
    Check("jump-at-borders", ("logp_mu", TRAINER), engine.jump_at_borders),
    Check("confident-disagreement", ("logp_mu", TRAINER), engine.confident_disagreement),
    Check("few-tokens", ("logp_mu", TRAINER), engine.few_tokens),
    Check("zero-advantages", ("advantage",), decisions.zero_advantages),
    Check("wrong-denominator", ("loss_weight",), decisions.wrong_denominator),
)
"""The checks of a batch, in the order in which they are shown."""

CHECKS_OF_FILES: Final[Mapping[str, Callable[[Sequence[Tokens]], Verdict]]] = MappingProxyType(
    {"trained-twice": repeats.trained_twice, "same-order": repeats.same_order}
)
"""The checks of all batches together, by name."""
