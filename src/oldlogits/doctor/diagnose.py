"""All checks on all files, and what the weights of versions add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from oldlogits.doctor.checks.listed import CHECKS, CHECKS_OF_FILES, asks
from oldlogits.doctor.remedies import remedy
from oldlogits.doctor.tokens import Batch, Settings, Tokens
from oldlogits.doctor.verdicts import AtLag, Verdict, cannot_tell
from oldlogits.record.jsonl import Json

RECOMPUTED = "decisions-with-old"
"""The check that weights add."""
_ASKS = "Decisions of clip and band that OLD at each token's own version would make otherwise."


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """A check's verdict on a file, or on all files together.

    Args:
        check: The check's name.
        asks: What it looks for.
        source: The file; "" for all.
        framework: Who has written it.
        verdict: What it says.
    """

    check: str
    asks: str
    source: str
    framework: str
    verdict: Verdict

    @property
    def remedy(self) -> str:
        """What to do about a finding."""
        return remedy(self.check, self.framework)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """All that the doctor says.

    Args:
        files: The loss tokens of each file, with OLD as it was recorded.
        diagnoses: The verdicts.
        lags: What the weights split; empty without them.
        notes: What is to be known when reading this.
    """

    files: tuple[Tokens, ...]
    diagnoses: tuple[Diagnosis, ...]
    lags: tuple[AtLag, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> list[Diagnosis]:
        """The verdicts that something is wrong."""
        return [one for one in self.diagnoses if one.verdict.outcome == "finding"]

    def by_check(self) -> dict[str, list[Diagnosis]]:
        """The verdicts by check, in order."""
        found: dict[str, list[Diagnosis]] = {}
        for one in self.diagnoses:
            found.setdefault(one.check, []).append(one)
        return found

    def lag_rows(self) -> list[tuple[str, ...]]:
        """What the weights split, as a table's cells."""
        several = len({row.source for row in self.lags}) > 1
        return [
            (
                f"{row.source} {row.lag}" if several else str(row.lag),
                f"{row.num_tokens:,}",
                f"{row.log_r_d:.2e}",
                f"{row.log_r_s:.2e}",
                f"{row.changed:,}",
                f"{row.changed_weight:.2%}",
            )
            for row in self.lags
        ]

    def as_json(self) -> Mapping[str, Json]:
        """Everything, for a machine."""
        verdicts: list[Json] = []
        for one in self.diagnoses:
            row: dict[str, Json] = {**asdict(one.verdict), "check": one.check, "source": one.source, "framework": one.framework}
            if one.verdict.outcome == "finding":
                row["remedy"] = one.remedy
            verdicts.append(row)
        files: list[Json] = [
            {"source": tokens.batch.source, "framework": tokens.batch.framework, "num_tokens": len(tokens)}
            for tokens in self.files
        ]
        lags: list[Json] = [asdict(row) for row in self.lags]
        return {"files": files, "findings": len(self.findings), "verdicts": verdicts, "lags": lags, "notes": list(self.notes)}


def diagnose(batches: Sequence[Batch], settings: Settings) -> list[Diagnosis]:
    """Run every check on every batch, and those of several batches on all."""
    return list(examine(batches, settings).diagnoses)


def examine(
    batches: Sequence[Batch],
    settings: Settings,
    *,
    weights: Path | None = None,
    model: str | None = None,
    temperature: float = 1.0,
) -> Examination:
    """Run all checks, and with weights compute OLD and what it changes.

    Args:
        batches: What was read.
        settings: What the user says of the training; where nothing, what a batch itself says.
        weights: See `oldlogits.doctor.weights.open_weights`.
        model: The model of the weights.
        temperature: The temperature of tokens whose batch does not say it.
    """
    files = tuple(Tokens.of(batch, _of(batch, settings)) for batch in batches)
    found = [one for tokens in files for one in _checked(Tokens.of(tokens.batch, tokens.settings))]
    framework = batches[0].framework if batches else ""
    some = [tokens for tokens in files if len(tokens)]
    found += [
        Diagnosis(check=name, asks=asks(run), source="", framework=framework, verdict=run(some))
        for name, run in CHECKS_OF_FILES.items()
    ]
    notes = [f"{tokens.batch.source}: {note}" for tokens in files for note in tokens.batch.notes]
    rows: list[AtLag] = []
    if weights is None:
        if any(one.check == "missing-old" and one.verdict.outcome == "finding" for one in found):
            notes.append("without the weights (--weights) r_d and r_s cannot be split at a lag above 0")
        return Examination(files=files, diagnoses=tuple(found), notes=tuple(notes))
    from oldlogits.doctor.recompute import recompute
    from oldlogits.doctor.weights import open_weights

    opened = open_weights(weights, model)
    for batch in batches:
        done = recompute(batch, opened, _of(batch, settings), temperature=temperature)
        one = {"source": batch.source, "framework": batch.framework, "asks": _ASKS}
        found.append(Diagnosis(check=RECOMPUTED, verdict=done.verdict, **one))
        notes += [f"{batch.source}: OLD was not computed of {num:,} loss tokens {why}" for why, num in done.left_out]
        rows += done.lags
    return Examination(files=files, diagnoses=tuple(found), lags=tuple(rows), notes=tuple(notes))


def _checked(tokens: Tokens) -> list[Diagnosis]:
    """All checks of one batch; what they compute of its columns is let go with `tokens`."""
    return [
        Diagnosis(
            check=check.name,
            asks=asks(check.run),
            source=tokens.batch.source,
            framework=tokens.batch.framework,
            verdict=check.of(tokens) if len(tokens) else cannot_tell("the loss trains no token"),
        )
        for check in CHECKS
    ]


def _of(batch: Batch, settings: Settings) -> Settings:
    return settings if settings.stated else batch.settings or settings
