"""Routing from the engine to a forward pass: every loss token over the experts that the engine had chosen for it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.batch.kv_segments import kv_chains, segment_sequences
from oldlogits.batch.routing import span_routing
from oldlogits.batch.sequences import pack
from oldlogits.batch.shard import shard_micro_batches
from oldlogits.core.engine import Generation, Span
from oldlogits.core.errors import TrajectoryError
from oldlogits.core.scoring import ScoringSpan
from oldlogits.core.trajectory import Context, Routing
from oldlogits.rollout.journal.progress import joined
from oldlogits.rollout.turns import sampled_segments

from ..builders import batch_of, sampled, trajectory

SHAPE = (3, 2)


def chosen(version, position):
    """The experts that a version chooses for the token at a position: another one for each of all these."""
    return (np.arange(6).reshape(SHAPE) + 7 * version + 31 * position) % 251


def routing_of(entries):
    return np.array([chosen(version, p) for p, version in enumerate(entries)], np.uint8).reshape(-1, *SHAPE)


class Engine:
    """A cache that grows token by token: which version computed each entry."""

    def __init__(self):
        self.entries, self.length, self.attended = [], 0, {}

    def read(self, num):
        self.length += num

    def sample(self, spans):
        """Sample spans of (tokens, version, kv): a generation with the experts of all that each span attended to."""
        found, start = [], 0
        for num, version, kv in spans:
            for k in range(num):
                if kv == "fresh" and k == 0:
                    self.entries = []
                self.entries = self.entries + [version] * (self.length - len(self.entries))
                self.attended[self.length] = self.entries
                self.length += 1
            routing = Routing.of(routing_of(self.entries))
            found.append(Span(version=version, start=start, end=start + num, kv=kv, routing=routing))
            start += num
        return Generation(output_ids=tuple(range(start)), logprobs=(-1.0,) * start, spans=tuple(found), finish_reason="length")


part = st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from(["fresh", "mixed"]))
turn = st.tuples(st.integers(1, 3), st.lists(part, min_size=1, max_size=3))


@st.composite
def played(draw, kinds=("fresh", "mixed")):
    """Trajectories of turns, and for each token, by flat index, which versions computed what it attended to."""
    made, expected, start = [], {}, 0
    for i in range(draw(st.integers(1, 3))):
        engine, segments, version = Engine(), [], 0
        for num_read, parts in draw(st.lists(turn, min_size=1, max_size=3)):
            engine.read(num_read)
            segments.append(Context(token_ids=tuple(range(num_read))))
            spans = []
            for num, increment, kv in parts:
                version += increment
                kv = kv if kv in kinds and len(segments) + len(spans) > 1 else "fresh"
                if spans and spans[-1][1:] == (version, kv):
                    spans[-1] = (spans[-1][0] + num, version, kv)
                else:
                    spans.append((num, version, kv))
            segments += sampled_segments(engine.sample(spans), 1.0, segments)
        made.append(trajectory(*segments, id=f"g0.{i}"))
        expected |= {start + p: entries for p, entries in engine.attended.items()}
        start += made[-1].num_tokens
    return made, expected


@given(played(), st.integers(1, 60), st.integers(1, 3))
def test_every_token_is_scored_once_over_the_experts_that_the_engine_had_and_a_trajectory_stays_together(drawn, budget, ranks):
    made, expected = drawn
    batch = batch_of(made)
    tokens = np.flatnonzero(batch.loss_mask)
    found, where = {}, {}
    for rank in range(ranks):
        for i, one in enumerate(shard_micro_batches(batch, tokens, budget, rank=rank, num_ranks=ranks)):
            if one.is_padding:
                continue
            micro = one.micro
            for row, column, target, flat in zip(
                *(values.tolist() for values in (micro.row, micro.column, micro.targets, micro.flat)), strict=True
            ):
                assert flat not in found
                assert target == batch.token_ids[flat]
                begin = flat - column - 1
                assert micro.input_ids[row, : column + 1].tolist() == batch.token_ids[begin:flat].tolist()
                assert micro.is_read[row, : column + 1].all()
                found[flat] = micro.routing[row, : column + 1].numpy()
                where.setdefault(int(batch.sequence[flat]), set()).add((rank, i))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[flat], routing_of(expected[flat])) for flat in found)
    assert all(len(micro_batches) == 1 for micro_batches in where.values())


@given(played())
def test_the_segments_of_a_mixed_forward_have_the_experts_of_their_own_version(drawn):
    made, expected = drawn
    batch = batch_of(made)
    for chain in kv_chains(batch):
        cut = segment_sequences(batch, chain)[0]
        for segment, start in zip(chain, cut.starts, strict=False):
            read = routing_of(expected[int(segment.tokens[-1])])[segment.begin - segment.origin :]
            assert np.array_equal(cut.routing[start : start + segment.num_entries], read)
        assert len(cut.routing) == cut.num_tokens


@given(played(kinds=("fresh",)))
def test_a_span_that_is_scored_before_its_trajectory_ends_has_the_experts_of_its_version(drawn):
    made, expected = drawn
    one, batch = made[0], batch_of(made[:1])
    for version in one.versions:
        last = int(np.flatnonzero(batch.version == version)[-1])
        routing = span_routing(one.segments, one.id, version, last + 1)
        assert np.array_equal(routing[:last], routing_of(expected[last]))
        span = ScoringSpan(
            trajectory_id=one.id,
            token_ids=batch.token_ids[: last + 1],
            positions=np.array([last]),
            temperature=np.ones(1, np.float32),
            routing=routing,
        )
        sequences, tokens = pack([span, span])
        [micro] = [one.micro for one in shard_micro_batches(sequences, tokens, 10**6, rank=0, num_ranks=1)]
        assert micro.routing.shape == (2, last, *SHAPE)
        assert np.array_equal(micro.routing[1].numpy(), routing_of(expected[last]))


def test_only_what_a_version_read_anew_is_kept_again():
    engine, segments = Engine(), [Context(token_ids=(0,) * 4)]
    engine.read(4)
    segments += sampled_segments(engine.sample([(3, 0, "fresh")]), 1.0, segments)
    segments.append(Context(token_ids=(0,) * 2))
    engine.read(2)
    segments += sampled_segments(engine.sample([(1, 0, "fresh"), (2, 1, "fresh"), (2, 2, "mixed")]), 1.0, segments)
    lengths = [len(s.routing) if not isinstance(s, Context) else None for s in segments]
    # version 0: 6 entries, then those of its last token and of two that were read; version 1: all 11 anew; version 2: its own 2
    assert lengths == [None, 6, None, 3, 11, 2]


@given(st.data())
def test_pieces_of_a_running_turn_add_up_to_the_routing_of_the_whole(data):
    def generation_after(first, parts, told):
        """What a journal hears: the whole turn's spans, but for the first tokens."""
        whole = Engine()
        whole.read(4)
        spans = whole.sample(parts).spans
        found = []
        for span in spans:
            if span.end > first:
                begin = 4 + first - 1 if span.start < first else 0
                routing = Routing.of(span.routing.choices[begin:])
                found.append(replace(span, start=max(span.start, first) - first, end=span.end - first, routing=routing))
        num = whole.length - 4 - first
        return Generation(output_ids=(0,) * num, logprobs=(-1.0,) * num, spans=tuple(found), finish_reason="abort")

    num, switch = data.draw(st.integers(2, 6)), data.draw(st.integers(0, 6))
    parts_at = lambda n: [(min(n, switch), 0, "fresh")] * (switch > 0) + [(n - switch, 1, "fresh")] * (n > switch)  # noqa: E731
    context, pieces, known = Context(token_ids=(0,) * 4), [], 0
    for now in sorted(data.draw(st.sets(st.integers(1, num), min_size=1)) | {num}):
        heard = sampled_segments(generation_after(known, parts_at(now), known), 1.0, [context, *pieces])
        pieces, known = [*pieces, *heard], now
    whole = Engine()
    whole.read(4)
    expected = sampled_segments(whole.sample(parts_at(num)), 1.0, [context])
    assert [(s.version, s.routing) for s in joined(pieces)] == [(s.version, s.routing) for s in expected]


def test_tokens_without_routing_among_those_with_it_are_named():
    routing = Routing.of(routing_of([0, 0, 0]))
    whole = trajectory([1, 2], replace(sampled([3, 4]), routing=routing))
    assert batch_of([whole]).chains is not None
    assert batch_of([trajectory([1, 2], sampled([3, 4]))]).chains is None
    for broken in (
        trajectory([1, 2], replace(sampled([3, 4]), routing=routing.last(2))),
        trajectory([1, 2], replace(sampled([3, 4]), routing=routing), [5], sampled([6], 1)),
    ):
        with pytest.raises(TrajectoryError, match=r"the routing of tokens is missing.*model\.routing = 'off'"):
            batch_of([broken])
    other = Routing.of(routing_of([0, 0, 0]).reshape(3, 2, 3))
    strange = trajectory([1, 2], replace(sampled([3, 4]), routing=other), id="g0.1")
    with pytest.raises(TrajectoryError, match="of several models"):
        batch_of([whole, strange])
