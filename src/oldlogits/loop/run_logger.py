"""Everything that a run writes and shows: events, tables, episodes, live view."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import pairwise
from pathlib import Path

from oldlogits.config import Caution, RunConfig
from oldlogits.core.engine_stats import Incident
from oldlogits.core.policies import find_variant
from oldlogits.core.scoring import Scored
from oldlogits.core.trajectory import Sampled, Segment, Trajectory, TrajectoryGroup
from oldlogits.loop.audit import ResetEffect
from oldlogits.loop.calibration import Calibration
from oldlogits.loop.probe import ProbeResult
from oldlogits.loop.totals import SyncResult, Totals
from oldlogits.record.episodes import Episode, EpisodeLog, EpisodeSegment, Split, Stage
from oldlogits.record.events import EventKind, EventLog
from oldlogits.record.folder import RunFolder
from oldlogits.record.live import LiveView
from oldlogits.record.summary import Interval
from oldlogits.record.tables import write_tokens
from oldlogits.train.average import AverageReset
from oldlogits.train.reports import PublishedVersion, ScoringWork
from oldlogits.train.step import UpdateResult

Decode = Callable[[Sequence[int]], str]


class RunLogger:
    """Writes a run folder and feeds the live view.

    Args:
        config: The run.
        folder: Where to write.
        view: What is shown in the terminal.
        decode: Token ids to text, for transcripts.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, view: LiveView, decode: Decode) -> None:
        self.folder, self.view = folder, view
        self._config, self._decode = config, decode
        self.events = EventLog(folder.events)
        self._episodes = EpisodeLog(folder.episodes)

    def close(self) -> None:
        """Close the files."""
        self.events.close()
        self._episodes.close()

    def started(self, *, version: int, num_parameters: int) -> None:
        """The run begins or goes on at `version`."""
        c, variant = self._config, find_variant(self._config.variant)
        truncates = c.objective.clip == "truncated"
        self.events.emit(
            EventKind.RUN_STARTED,
            version=version,
            variant=c.variant,
            r_d=str(variant.r_d),
            r_s=str(variant.r_s),
            corrects_mismatch=variant.corrects_mismatch,
            source=c.proximal.source,
            runtime=c.runtime.type,
            seed=c.seed,
            denominator=c.objective.loss_aggregation,
            band=c.band,
            eps_low=None if truncates else c.objective.eps_low,
            eps_high=None if truncates else c.objective.eps_high,
            truncation=c.objective.is_cap if truncates else None,
            max_staleness=c.max_staleness,
            group_size=c.rollout.group_size,
            prompts_per_update=c.rollout.prompts_per_update,
            model=c.model.path,
            num_parameters=num_parameters,
            numerics=c.engine.precision,
        )

    def warm_started(self, steps: int, loss: float, seconds_s: float) -> None:
        """The starting model is ready, after `steps` supervised steps, or after none when it was cached."""
        self.events.emit(EventKind.WARM_START, version=-1, steps=steps, loss=loss, cached=steps == 0, seconds_s=seconds_s)

    def evaluation(self, stage: Stage, mode: str, rate: Interval, *, version: int, seconds_s: float) -> None:
        """An evaluation was done."""
        self.events.emit(
            EventKind.EVALUATION,
            version=version,
            stage=stage,
            mode=mode,
            mean=rate.mean,
            low=rate.low,
            high=rate.high,
            num_episodes=rate.num_episodes,
            seconds_s=seconds_s,
        )
        if mode == "sampled":
            self.view.show({"eval/mean": rate.mean, "eval/low": rate.low, "eval/high": rate.high})
        when = f"at version {version}" if stage == "during" else f"{stage} training"
        self.view.note(
            f"held-out success {when}, {mode}: {rate.mean:.1%} [{rate.low:.1%}, {rate.high:.1%}] "
            f"of {rate.num_episodes}, {seconds_s:.0f} s"
        )

    def batch(self, groups: Sequence[TrajectoryGroup], *, version: int, waited_s: float) -> None:
        """A batch was taken."""
        self.events.emit(
            EventKind.BATCH,
            version=version,
            groups=[group.id for group in groups],
            num_tokens=sum(t.num_tokens for group in groups for t in group.trajectories),
            staleness_max=version - min(group.oldest_version for group in groups),
            waited_s=waited_s,
        )

    def scored(self, scored: Scored, versions: Sequence[int], work: ScoringWork, *, version: int, seconds_s: float) -> None:
        """A source scored the batch, with that much work for the trainer."""
        self.events.emit(
            EventKind.SCORED,
            version=version,
            policy=scored.policy.value,
            num_switches=scored.num_switches,
            versions=list(versions),
            seconds_s=seconds_s,
            **asdict(work),
        )

    def updated(
        self,
        result: UpdateResult,
        metrics: Mapping[str, float],
        groups: Sequence[TrajectoryGroup],
        *,
        version: int,
    ) -> None:
        """All steps of one version were done: event, tables, transcripts, live view.

        Args:
            result: Of the trainer.
            metrics: Of the objective and the loop.
            groups: What was trained.
            version: The version that the update made.
        """
        counts = {str(lag): n for lag, n in result.staleness_counts.items()}
        self.events.emit(
            EventKind.UPDATE,
            version=version,
            metrics=dict(metrics),
            staleness_counts=counts,
            provenance=dict(result.provenance),
        )
        every = self._config.record.tokens_every
        if every and (version - 1) % every == 0:
            write_tokens(self.folder.tokens, version, result.table)
        every = self._config.record.transcripts_every
        with_text = groups[0].id if every and (version - 1) % every == 0 else ""
        for group in groups:
            for trajectory in group.trajectories:
                self.episode(trajectory, version=version, split="train", stage="train", with_text=group.id == with_text)
        self.view.update(metrics, version=version)

    def average_reset(self, reset: AverageReset, effect: ResetEffect | None, *, version: int) -> None:
        """The weight average was reset to `version`; what that is worth, where a referee tells."""
        errors = asdict(effect) if effect else dict.fromkeys(field.name for field in fields(ResetEffect))
        self.events.emit(EventKind.AVERAGE_RESET, version=version, **asdict(reset), **errors)

    def episode(self, trajectory: Trajectory, *, version: int, split: Split, stage: Stage, with_text: bool) -> None:
        """One episode, with or without its text."""
        self._episodes.append(
            Episode(
                id=trajectory.id,
                group=trajectory.group_id,
                version=version,
                split=split,
                stage=stage,
                reward=trajectory.reward,
                stop_reason=trajectory.stop_reason,
                num_turns=trajectory.num_turns,
                versions=trajectory.versions,
                segments=tuple(map(self._segment, trajectory.segments)) if with_text else (),
            )
        )

    def published(self, published: PublishedVersion, *, seconds_s: float) -> None:
        """A version was stored, which is a part of these seconds."""
        p, stored = published, published.publication
        self.events.emit(
            EventKind.PUBLISHED,
            version=p.version,
            bytes=p.store_bytes,
            version_bytes=stored.stored_bytes if stored is not None else 0,
            changed=stored.share_changed if stored is not None else None,
            store_s=p.store_s,
            seconds_s=seconds_s,
        )

    def weights_updated(self, sent: SyncResult, *, version: int, pause_s: float, load_s: float, stall_s: float) -> None:
        """The engine was brought to rest, took new weights, and had stood still for `stall_s` when it went on."""
        self.events.emit(
            EventKind.WEIGHTS_UPDATED,
            version=version,
            sent="patch" if sent.is_patch else "full",
            bytes=sent.num_bytes,
            refused=sent.refused,
            pause_s=pause_s,
            load_s=load_s,
            stall_s=stall_s,
        )

    def heard(self, news: Incident | Caution, totals: Totals, *, version: int) -> None:
        """The runtime says something by itself."""
        if isinstance(news, Caution):
            self.warned(news, version=version)
        else:
            self._happened(news, totals, version=version)

    def _happened(self, incident: Incident, totals: Totals, *, version: int) -> None:
        """A server went down or came back."""
        totals.add_incident(incident)
        server, reason = incident.server, incident.reason
        if incident.what == "up":
            self.events.emit(EventKind.SERVER_UP, version=version, server=server, reason=reason)
        else:
            self.events.emit(
                EventKind.SERVER_DOWN,
                version=version,
                server=server,
                reason=reason,
                num_requests=incident.num_requests,
                num_kept_tokens=incident.num_kept_tokens,
                num_lost_tokens=incident.num_lost_tokens,
            )
        self.view.note(f"server {server} is {incident.what}: {reason}")

    def probed(self, result: ProbeResult, witness_error: float, *, version: int) -> None:
        """Engine and trainer were compared; the witnesses' worst error is shown beside it."""
        self.events.emit(
            EventKind.PROBE,
            version=version,
            max_abs_error=result.max_abs_error,
            mean_abs_error=result.mean_abs_error,
            num_tokens=result.num_tokens,
            num_above=result.num_above,
        )
        shown = {"probe/max_abs_error": result.max_abs_error}
        if not math.isnan(witness_error):
            shown["witness/max_abs_error"] = witness_error
        self.view.show(shown)

    def checkpoint(self, path: Path, *, version: int) -> None:
        """A checkpoint was completed."""
        self.events.emit(EventKind.CHECKPOINT, version=version, path=str(path.relative_to(self.folder.path)))

    def calibrated(self, found: Calibration, *, version: int) -> None:
        """The engine's own noise was measured."""
        self.events.emit(EventKind.CALIBRATION, version=version, **asdict(found))
        for line in found.lines(self._config):
            self.view.note(line)

    def warned(self, caution: Caution, *, version: int) -> None:
        """A reader of the results should know this."""
        self.events.emit(EventKind.WARNING, version=version, **asdict(caution))
        self.view.note(f"warning: {caution.message}")

    def ended(self, reason: str, error: str, *, version: int) -> None:
        """The run ended."""
        self.events.emit(EventKind.RUN_ENDED, version=version, reason=reason, error=error)

    def _segment(self, segment: Segment) -> EpisodeSegment:
        ids = segment.token_ids
        if not isinstance(segment, Sampled):
            return EpisodeSegment(kind="context", text=self._decode(ids), num_tokens=len(ids))
        return EpisodeSegment(
            kind="sampled",
            text=self._decode(ids),
            num_tokens=len(ids),
            version=segment.version,
            tokens=self._pieces(ids),
            logp_mu=segment.logp_mu,
        )

    def _pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text that each token adds, so that the pieces joined are the text."""
        texts = [self._decode(ids[:end]) for end in range(len(ids) + 1)]
        return tuple(after[len(before) :] for before, after in pairwise(texts))
