"""How much of the old logits' cost each exact route hides: replayed trajectories, real processes, no engine.

python -m benchmarks.overlap [--updates 12]
python -m benchmarks.overlap --pauses recipes/desk.toml [any recipe override]

Every trajectory has tokens of several versions; the groups of the next batch arrive while the trainer steps. Snapshot and
eager take turns, update by update, so that a slow moment of the machine meets both; the others run alone. "hidden" is the
share of the scoring time that no update waited for. With --pauses, how long weight updates stop the engine under snapshot
and under eager.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from oldlogits.backends.processes import start_scorer, start_trainer
from oldlogits.batch.collate import collate
from oldlogits.config.load import config_from_table, load_config
from oldlogits.config.schema import RunConfig
from oldlogits.core.scoring import BatchTokens, DedicatedScorer
from oldlogits.core.trajectory import Context, Sampled, Segment, Trajectory, TrajectoryGroup
from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import WeightsUpdated
from oldlogits.rpc.client import client
from oldlogits.run.run import run
from oldlogits.run.specs import scorer_spec, trainer_spec
from oldlogits.sources import check_scored, make_source
from oldlogits.train.calls import TrainerCalls
from order_desk.starting_models import TinySize
from order_desk.tiny import save_tiny, tiny_model, tiny_tokenizer

WINDOW = 4  # versions that a trajectory spans
GROUPS, MEMBERS = 16, 8
PROMPT, TURN, RESULT = 60, 20, 12  # tokens
VOCABULARY = 80
SIZE = TinySize(hidden=128, layers=4, max_context=256)


def batch_of(version: int) -> list[TrajectoryGroup]:
    """The groups trained at `version`: tokens of the WINDOW versions before it, a turn of each."""
    rng = random.Random(version)
    versions = range(max(0, version - WINDOW), max(version, 1))

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(5, VOCABULARY), k=n))

    def segments() -> tuple[Segment, ...]:
        turns = [
            (Sampled(token_ids=tokens(TURN), logp_mu=(-4.4,) * TURN, version=v), Context(token_ids=tokens(RESULT)))
            for v in versions
        ]
        return (Context(token_ids=tokens(PROMPT)), *(segment for turn in turns for segment in turn))

    return [
        TrajectoryGroup(
            id=f"{version}/{g}",
            trajectories=tuple(
                Trajectory(
                    id=f"{version}/{g}.{m}", group_id=f"{version}/{g}", segments=segments(), reward=m % 2, stop_reason="done"
                )
                for m in range(MEMBERS)
            ),
        )
        for g in range(GROUPS)
    ]


class Replay:
    """One route with a trainer process, and a scorer process if it has one."""

    def __init__(self, route: str, folder: Path) -> None:
        table = {"variant": "ppo_clip", "proximal": {"source": route}, "trainer": {"minibatches_per_update": 2, "lr": 1e-5}}
        self.config: RunConfig = config_from_table(table)
        probe = list(range(5, 37))
        self.trainer = start_trainer(trainer_spec(self.config), folder, probe)
        self.calls = client(TrainerCalls, self.trainer)  # type: ignore[type-abstract]
        told = scorer_spec(self.config)
        self.scorer = start_scorer(told, folder, probe) if told is not None else None
        scorer: DedicatedScorer | None = None
        if told is not None and self.scorer is not None:
            scorer = client(DedicatedScorer, self.scorer, window=told.window)  # type: ignore[type-abstract]
        self.source = make_source(route, self.calls, scorer)
        self.version = 0
        self.update_s: list[float] = []
        self.paused_s: list[float] = []
        self.wait_s = self.score_s = 0.0
        self.arrivals: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Open the processes and fill the first batch."""
        await self.trainer.ready()
        if self.scorer is not None:
            await self.scorer.ready()
        await self._publish()
        for group in batch_of(0):
            await self.source.on_arrival(group.trajectories)

    async def update(self) -> None:
        """One version, in the order of the loop."""
        groups, handle, version = batch_of(self.version), self.calls, self.version
        batch = collate(groups, [1.0, -1.0] * (GROUPS * MEMBERS // 2), num_steps=2)
        self._grow()
        started = time.perf_counter()
        arrivals = asyncio.create_task(self._arrive(version + 1))
        await handle.put_batch(batch)
        paused = time.perf_counter()
        if self.source.needs_pause:
            await arrivals  # the engine stands still from here on
            await self.source.on_paused({})
        versions = batch.version[batch.loss_mask]
        before = time.perf_counter()
        tokens = BatchTokens(versions=versions, trajectory_ids=batch.trajectory_ids, trainer_version=version)
        scored = await self.source.acquire(tokens)
        acquired = time.perf_counter()
        assert scored is not None
        check_scored(scored, versions)
        await handle.train(scored)
        await self._publish()
        await arrivals
        self.source.drop(batch.trajectory_ids)
        await handle.retain(min(self.version, self.source.oldest_needed(max(0, version - WINDOW + 1))))
        ended = time.perf_counter()
        self.update_s.append(ended - started)
        self.paused_s.append(ended - paused if self.source.needs_pause else 0.0)
        found = self.source.metrics()
        self.wait_s += found.get("source/wait_s", acquired - before)
        self.score_s += found.get("source/score_s", acquired - before)

    async def close(self) -> None:
        """End the processes."""
        await asyncio.gather(*self.arrivals)
        await self.source.close()
        self.trainer.close()
        if self.scorer is not None:
            self.scorer.close()

    async def _publish(self) -> None:
        published = await self.calls.publish()
        self.version = published.version
        if not self.source.needs_pause and self.source.needs_partials:
            await self.source.on_paused({})
        await self.source.on_published(published.version, published.update, published.probe_logps)

    def _grow(self) -> None:
        """What the engine samples at this version, of the batches to come."""
        for version in range(self.version + 1, self.version + WINDOW + 1):
            for group in batch_of(version):
                for t in group.trajectories:
                    until = next(
                        (i for i, s in enumerate(t.segments) if isinstance(s, Sampled) and s.version > self.version), None
                    )
                    self.source.on_segment_closed(t.id, t.segments[:until])

    async def _arrive(self, version: int) -> None:
        """The groups of the next batch, one after the other."""
        for group in batch_of(version):
            await asyncio.sleep(0.002)
            self.arrivals.add(task := asyncio.create_task(self.source.on_arrival(group.trajectories)))
            task.add_done_callback(self.arrivals.discard)


async def replay(routes: list[str], num_updates: int, folder: Path) -> dict[str, Replay]:
    """The routes, in turns."""
    replays = {route: Replay(route, folder) for route in routes}
    try:
        for one in replays.values():
            await one.start()
        for update in range(num_updates + WINDOW):
            for one in replays.values():
                await one.update()
                if update < WINDOW:  # until trajectories span all versions
                    one.update_s, one.paused_s, one.wait_s, one.score_s = [], [], 0.0, 0.0
    finally:
        for one in replays.values():
            await one.close()
    return replays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--pauses", type=Path)
    options, overrides = parser.parse_known_args()
    if options.pauses is not None:
        return pauses(options.pauses, overrides)
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(VOCABULARY)])
    replays: dict[str, Replay] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tiny(folder, tiny_model(SIZE, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, 0), tokenizer)
        for routes in (["snapshot", "eager"], ["interruption"], ["dedicated"]):
            replays |= asyncio.run(replay(routes, options.updates, folder))
    print("| route | update s, median | / snapshot | wait s | score s | hidden: 1 - wait / score | paused s, median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for route, one in replays.items():
        ratio = median(one.update_s) / median(replays["snapshot"].update_s)
        hidden = 1 - one.wait_s / one.score_s
        seconds = f"{median(one.update_s):.2f} | {ratio:.2f} | {one.wait_s:.2f} | {one.score_s:.2f}"
        print(f"| {route} | {seconds} | {hidden:.2f} | {median(one.paused_s):.2f} |")


def pauses(recipe: Path, overrides: list[str]) -> None:
    """Two interleaved rounds of a recipe under each route: the medians of the engine's stall at a weight update."""
    stalls: dict[str, list[float]] = {"snapshot": [], "eager": []}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(2):
            for route in stalls:
                out = Path(name) / f"{route}{turn}"
                result = run(load_config(recipe, [*overrides, "--proximal.source", route]), out)
                if result.error is not None:
                    raise result.error
                events = typed(read_events(out / "events.jsonl"), WeightsUpdated)
                stalls[route] += [event.stall_s for event in events[1:]]
    found = {route: median(values) for route, values in stalls.items()}
    print(f"stall at a weight update, median: {found}, eager / snapshot: {found['eager'] / found['snapshot']:.2f}")


if __name__ == "__main__":
    main()
