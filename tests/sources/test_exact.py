"""The exact sources against a forward pass of each version's own weights, one trajectory at a time.

A small world of players that sample a few tokens at each version, in turns that weight updates cut in two, and end when
they like; batches take them in any order. The trainer is real and trains, so that every version has other weights.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ExactnessError, VersionEvictedError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import BatchTokens, DedicatedScorer
from oldlogits.core.trajectory import Context, Sampled, Trajectory
from oldlogits.core.weights import FullWeights
from oldlogits.models.load import load_model, point_at
from oldlogits.rpc.client import Dispatcher, Inline, client
from oldlogits.run.specs import scorer_spec, trainer_spec
from oldlogits.sources import check_scored, make_source
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.scorer_model import ScorerModel
from oldlogits.train.trainer import Trainer, TrainerService

from ..builders import batch_of, sampled, trajectory

PROBE = [3, 9, 10, 11, 12, 2, 4, 13]
NUM_VERSIONS = 6
EXACT = ("snapshot", "eager", "interruption", "dedicated")


@dataclass
class Player:
    """One trajectory as it grows."""

    id: str
    rng: random.Random
    segments: list = field(default_factory=list)
    turn: list = field(default_factory=list)  # (token, version) of the running turn
    temperature: float = 1.0

    def read(self):
        self.segments.append(Context(token_ids=tuple(self.rng.choices(range(3, 24), k=self.rng.randint(1, 5)))))

    def sample(self, version):
        self.turn += [(self.rng.randint(3, 23), version) for _ in range(self.rng.randint(0, 4))]

    def unfinished(self):
        """The running turn as segments of one version each."""
        versions = dict.fromkeys(version for _, version in self.turn)
        return [sampled([t for t, at in self.turn if at == v], v, temperature=self.temperature) for v in versions]

    def close(self):
        self.segments += self.unfinished()
        self.turn = []

    def versions(self):
        return [s.version for s in (*self.segments, *self.unfinished()) if isinstance(s, Sampled)]

    def whole(self):
        return Trajectory(id=self.id, group_id="g", segments=tuple(self.segments), reward=0.0, stop_reason="done")


def inline(trainer):
    """A trainer of this process as the sources see it."""
    return client(TrainerCalls, Inline(TrainerService(trainer, time.perf_counter).call))


class World:
    """Plays, and drives a source in the order of the loop's hooks."""

    def __init__(self, name, folder, *, seed=0, tells_partials=True, window=2):
        table = {"source": name, "scorer_versions": window}
        config = config_from_table(
            {"variant": "ppo_clip", "trainer": {"lr": 0.02, "minibatches_per_update": 1, "warmup_steps": 0}, "proximal": table}
        )
        self.trainer = Trainer(trainer_spec(config), folder, PROBE)
        handle = inline(self.trainer)
        scorer = None
        if name == "dedicated":
            calls = Dispatcher(DedicatedScorer, ScorerModel(scorer_spec(config), folder, PROBE)).call
            scorer = client(DedicatedScorer, Inline(calls), window=window)
        self.source = make_source(name, handle, scorer)
        self.oracle = load_model(folder)
        self.weights = {}
        self.rng = random.Random(seed)
        self.tells_partials = tells_partials
        self.players, self.waiting, self.num_made = [], [], 0
        self.errors, self.lags, self.most_stored, self.fallback_tokens, self.num_mid_turn = [], [], 0, 0, 0

    async def play(self):
        await self.publish()
        for version in range(NUM_VERSIONS):
            await self.sample(version)
            self.rng.shuffle(self.waiting)  # versions arrive out of order
            batch, self.waiting = self.waiting[:4], self.waiting[4:]
            await self.train(batch, version)
        await self.source.close()

    async def sample(self, version):
        while len(self.players) < 8:
            self.players.append(Player(f"g.{self.num_made}", self.rng, temperature=self.rng.choice([1.0, 0.7])))
            self.players[-1].read()
            self.source.on_segment_closed(self.players[-1].id, self.players[-1].segments)
            self.num_made += 1
        for player in list(self.players):
            player.sample(version)
            if self.rng.random() < 0.5 and player.turn:
                player.close()
                ends = self.rng.random() < 0.5
                if not ends:
                    player.read()
                self.source.on_segment_closed(player.id, player.segments)
                if ends:
                    self.players.remove(player)
                    self.waiting.append(player)
                    await self.source.on_arrival([player.whole()])
                    await asyncio.sleep(0)
        self.num_mid_turn += sum(bool(player.turn) for player in self.players)

    async def pause(self):
        if self.source.needs_partials and self.tells_partials:
            await self.source.on_paused({player.id: player.unfinished() for player in self.players})

    async def train(self, players, version):
        batch = batch_of([p.whole() for p in players], [self.rng.choice([-1.0, 1.0]) for _ in players]) if players else None
        if batch is not None:
            self.trainer.put_batch(batch)
        if self.source.needs_pause:
            await self.pause()
        if batch is not None:
            tags = batch.version[batch.loss_mask]
            tokens = BatchTokens(versions=tags, trajectory_ids=batch.trajectory_ids, trainer_version=version)
            scored = await self.source.acquire(tokens)
            check_scored(scored, tags)
            assert scored.policy is OLD
            self.errors.append(np.abs(scored.values - self.expected(players)).max())
            self.lags += (version - tags).tolist()
            self.trainer.train(scored)
        else:
            self.trainer.version += 1
        await self.publish()
        self.source.drop([p.id for p in players])
        in_flight = min([version + 1, *(v for p in (*self.players, *self.waiting) for v in p.versions())])
        self.trainer.retain(min(version + 1, self.source.oldest_needed(in_flight)))
        self.fallback_tokens += self.source.metrics().get("source/fallback_tokens", 0)

    async def publish(self):
        published = self.trainer.publish()
        self.weights[published.version] = {name: w.clone() for name, w in published.update.tensors.items()}
        self.most_stored = max(self.most_stored, len(self.trainer.stored_versions))
        if not self.source.needs_pause and published.version:
            await self.pause()
        if published.version:
            await self.play_a_short_one(published.version)
        await self.source.on_published(published.version, published.update, published.probe_logps)
        await asyncio.sleep(0)

    async def play_a_short_one(self, version):
        """The engine goes on before the source is told of the version: a whole trajectory may come in between."""
        player = Player(f"g.{self.num_made}", self.rng)
        self.num_made += 1
        player.read()
        player.turn = [(self.rng.randint(3, 23), version) for _ in range(2)]
        player.close()
        self.source.on_segment_closed(player.id, player.segments)
        self.waiting.append(player)
        await self.source.on_arrival([player.whole()])

    def expected(self, players):
        """Every token by the weights of its own version: no padding, no batching, no cut."""
        values = []
        for player in players:
            position, ids = 0, [t for s in player.segments for t in s.token_ids]
            for segment in player.segments:
                if isinstance(segment, Sampled):
                    point_at(self.oracle, self.weights[segment.version])
                    with torch.no_grad():
                        logits = self.oracle(input_ids=torch.tensor([ids])).logits[0].double() / segment.temperature
                    logps = torch.log_softmax(logits, -1)
                    values += [float(logps[position + i - 1, t]) for i, t in enumerate(segment.token_ids)]
                position += len(segment.token_ids)
        return np.array(values)


def played(name, folder, **settings):
    world = World(name, folder, **settings)
    asyncio.run(world.play())
    return world


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_exact_source_gives_what_the_weights_of_each_tokens_own_version_gave(name, seed, tiny_folder):
    world = played(name, tiny_folder, seed=seed)
    assert max(world.errors) < 1e-5
    assert len(set(world.lags)) > 2
    assert world.num_mid_turn > 5
    span = [float((world.weights[0][n] - w).abs().max()) for n, w in world.weights[NUM_VERSIONS].items()]
    assert max(span) > 0.05, "the versions differ, or nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("name, most", [("eager", 2), ("interruption", 0)])
def test_a_source_stores_no_more_versions_than_it_says(name, most, tiny_folder):
    world = played(name, tiny_folder)
    assert world.most_stored == most
    assert world.fallback_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "dedicated"])
def test_tokens_that_become_known_too_late_are_scored_from_the_store_and_counted(name, tiny_folder):
    world = played(name, tiny_folder, tells_partials=False)
    assert max(world.errors) < 1e-5
    assert world.fallback_tokens > 0
    assert world.most_stored > 2


@pytest.mark.slow
def test_a_scorer_with_a_window_of_one_leaves_older_tokens_to_the_store(tiny_folder):
    world = played("dedicated", tiny_folder, window=1)
    assert max(world.errors) < 1e-5
    assert world.fallback_tokens > 0
    assert world.source.metrics()["source/resident_copies"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eager", "interruption", "dedicated"])
def test_a_source_holds_nothing_but_what_is_in_flight(name, tiny_folder):
    world = played(name, tiny_folder)
    assert set(world.source.in_flight._trajectories) == {p.id for p in (*world.players, *world.waiting)}
    world.source.drop([p.id for p in (*world.players, *world.waiting)])
    assert len(world.source.in_flight) == 0


@pytest.mark.slow
def test_interruption_refuses_a_version_that_is_no_longer_live(tiny_folder):
    world = played("interruption", tiny_folder)
    late = trajectory([3, 9], sampled([12, 13], NUM_VERSIONS - 1), id="late")
    tokens = BatchTokens(versions=np.full(2, NUM_VERSIONS - 1), trajectory_ids=("late",), trainer_version=NUM_VERSIONS)

    async def scenario():
        world.source.in_flight.end([late])
        await world.source.acquire(tokens)

    with pytest.raises(VersionEvictedError, match=f"version {NUM_VERSIONS - 1} is not in the store"):
        asyncio.run(scenario())


def test_spans_of_whole_trajectories_have_the_bits_of_the_same_tokens_scored_as_a_batch(tiny_folder):
    trainer = World("snapshot", tiny_folder).trainer
    trainer.publish()
    whole = [trajectory([3, 9 + i], sampled([12, 13 + i, 2], 0, temperature=0.7), id=f"g0.{i}") for i in range(4)]
    trainer.put_batch(batch_of(whole))
    source = make_source("eager", inline(trainer), None)
    source.in_flight.end(whole)
    version, spans = source.in_flight.next_spans(9)
    assert trainer.scorer.score_spans(spans, version).values.tolist() == trainer.scorer.score(np.arange(12), 0).tolist()


def test_the_dedicated_scorer_refuses_weights_that_are_not_what_the_trainer_published(tiny_folder):
    world = World("dedicated", tiny_folder)
    published = world.trainer.publish()
    scorer = world.source._dedicated
    assert asyncio.run(scorer.publish(0, published.update, published.probe_logps)) < 1e-6
    wrong = {name: w + 0.01 for name, w in published.update.tensors.items()}
    with pytest.raises(ExactnessError, match="the dedicated scorer's version 1 contradicts the live weights at its publish"):
        asyncio.run(scorer.publish(1, FullWeights(tensors=wrong), published.probe_logps))
