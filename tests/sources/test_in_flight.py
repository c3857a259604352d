"""What is known of trajectories in flight, against a brute-force account of every token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.trajectory import Context, Sampled
from oldlogits.sources.in_flight import InFlightTokens

from ..builders import sampled, trajectory


def context(*ids):
    return Context(token_ids=ids)


def spans_of(in_flight, **limits):
    found = in_flight.next_spans(100, **limits)
    return None if found is None else (found[0], [span.trajectory_id for span in found[1]])


def put(in_flight, value=0.0):
    """Score the next spans; each token gets `value`."""
    version, spans = in_flight.next_spans(100)
    in_flight.put(spans, version, np.full(sum(len(p.positions) for p in spans), value, np.float32))


def test_a_span_holds_the_trajectory_up_to_its_last_token_and_says_which_tokens_are_its():
    in_flight = InFlightTokens()
    one = trajectory(
        [5, 6], sampled([7, 8], 0, temperature=0.5), sampled([9], 1), [10], sampled([11, 12], 1, temperature=2.0), [13], id="a"
    )
    in_flight.end([one])
    version, (first,) = in_flight.next_spans(9)
    assert (version, first.token_ids.tolist(), first.positions.tolist()) == (0, [5, 6, 7, 8], [2, 3])
    assert first.temperature.tolist() == [0.5, 0.5]
    in_flight.put([first], 0, np.float32([-1, -2]))
    version, (second,) = in_flight.next_spans(9)
    assert (version, second.token_ids.tolist(), second.positions.tolist()) == (1, [5, 6, 7, 8, 9, 10, 11, 12], [4, 6, 7])
    assert second.temperature.tolist() == [1.0, 2.0, 2.0]
    in_flight.put([second], 1, np.float32([-3, -4, -5]))
    assert in_flight.next_spans(9) is None
    values, computed_at = in_flight.values(["a"])
    assert values.tolist() == [-1, -2, -3, -4, -5]
    assert computed_at.tolist() == [0, 0, 1, 1, 1]
    assert (first.num_read, second.num_read) == (3, 7), "the last token is predicted, not read"
    assert in_flight.num_repeated_tokens == 3, "the second pass reads again what the first had read"


def test_a_span_is_complete_when_its_trajectory_has_ended_or_its_version_has_been_replaced():
    in_flight = InFlightTokens()
    segments = [context(1), sampled([2], 0)]
    in_flight.extend("a", segments)
    assert spans_of(in_flight) is None, "version 0 may sample more"
    in_flight.pause({"a": [sampled([3, 4], 0)]})
    version, (span,) = in_flight.next_spans(9)
    assert (version, span.positions.tolist(), span.token_ids.tolist()) == (0, [1, 2, 3], [1, 2, 3, 4])
    put(in_flight)
    segments += [sampled([3, 4], 0), sampled([5], 1)]
    in_flight.extend("a", segments)
    assert spans_of(in_flight) is None
    in_flight.end([trajectory([1], *segments[1:], id="a")])
    assert spans_of(in_flight) == (1, ["a"])


def test_without_the_word_of_a_pause_a_newer_segment_completes_the_older_versions():
    in_flight = InFlightTokens()
    in_flight.extend("a", [context(1), sampled([2], 0), sampled([3], 2)])
    assert spans_of(in_flight) == (0, ["a"])
    put(in_flight)
    assert spans_of(in_flight) is None
    assert in_flight.oldest_needed() == 0, "its own version"
    in_flight.version = 5
    assert in_flight.oldest_needed() == 2, "tokens of version 2 may still become known"


def test_spans_come_oldest_version_first_in_the_order_of_admission_and_no_more_than_asked_for():
    in_flight = InFlightTokens()
    for name, version in (("a", 2), ("b", 1), ("c", 1), ("d", 1)):
        in_flight.end([trajectory([1], sampled([2], version), id=name)])
    assert spans_of(in_flight) == (1, ["b", "c", "d"])
    assert [p.trajectory_id for p in in_flight.next_spans(2)[1]] == ["b", "c"]
    assert spans_of(in_flight, trajectory_ids=["d", "a", "nobody"]) == (1, ["d"])
    assert spans_of(in_flight, versions=(2, 3)) == (2, ["a"])
    assert spans_of(in_flight, versions=()) is None


def test_values_of_a_trajectory_that_was_dropped_meanwhile_are_let_go():
    in_flight = InFlightTokens()
    in_flight.end([trajectory([1], sampled([2], id_version), id=name) for name, id_version in (("a", 0), ("b", 0))])
    version, spans = in_flight.next_spans(9)
    in_flight.drop(["a", "never seen"])
    in_flight.put(spans, version, np.float32([-1, -2]))
    assert len(in_flight) == 1
    assert in_flight.values(["b"])[0].tolist() == [-2]
    with pytest.raises(KeyError):
        in_flight.values(["a"])


moves = st.lists(
    st.tuples(st.sampled_from(["sample", "close", "end", "pause", "score", "drop"]), st.integers(0, 2), st.integers(1, 3)),
    max_size=40,
)


@given(moves)
def test_every_token_is_scored_once_at_its_own_version_and_nothing_that_is_needed_is_given_up(moves):
    """A brute-force world of three trajectories; the value of a token is its id, so that order is checked as well."""
    in_flight, version, next_id = InFlightTokens(), 0, 100
    closed = {name: [context(1)] for name in "abc"}
    running = {name: [] for name in "abc"}  # (token, version)
    ended, dropped, kept_from = set(), set(), 0
    for name in "abc":
        in_flight.extend(name, closed[name])

    def segments_of(tokens):
        by_version = {v: [t for t, at in tokens if at == v] for v in dict.fromkeys(at for _, at in tokens)}
        return [sampled(ids, v) for v, ids in by_version.items()]

    def score():
        while (found := in_flight.next_spans(2)) is not None:
            at, spans = found
            assert at >= kept_from, "its weights are still there"
            in_flight.put(spans, at, np.concatenate([p.token_ids[p.positions] for p in spans]).astype(np.float32))

    for move, which, count in moves:
        name = "abc"[which]
        if move == "pause":
            in_flight.pause({n: segments_of(tokens) for n, tokens in running.items() if tokens})
            version += 1
        elif move == "score":
            score()
            kept_from = max(kept_from, in_flight.oldest_needed())
            assert kept_from <= version
        elif move == "drop":
            in_flight.drop([name])
            dropped.add(name)
        elif name in ended | dropped:
            continue
        elif move == "sample":
            running[name] += [(next_id + i, version) for i in range(count)]
            next_id += count
        elif move == "close" or not (running[name] or any(isinstance(s, Sampled) for s in closed[name])):
            closed[name] += [*segments_of(running[name]), context(2)]
            running[name] = []
            in_flight.extend(name, closed[name])
        else:
            closed[name] += segments_of(running[name])
            running[name] = []
            in_flight.end([trajectory([1], *closed[name][1:], id=name)])
            ended.add(name)
    score()
    for name in ended - dropped:
        tokens = [(t, s.version) for s in closed[name] if isinstance(s, Sampled) for t in s.token_ids]
        values, computed_at = in_flight.values([name])
        assert list(zip(values.tolist(), computed_at.tolist(), strict=True)) == tokens
    assert len(in_flight) == 3 - len(dropped)


def test_values_of_a_version_that_samples_on_are_not_restored_and_all_its_tokens_are_scored():
    in_flight = InFlightTokens()
    in_flight.version = 2
    known = (context(1), sampled([2], 1), sampled([3], 2))
    assert in_flight.restore("a", known, {1: [-1.0], 2: [-2.0]}) == {2}, "the engine is at version 2 again"
    in_flight.end([trajectory([1], *known[1:], sampled([4], 2), id="a")])
    version, (span,) = in_flight.next_spans(9)
    assert (version, span.positions.tolist()) == (2, [2, 3])
    in_flight.put([span], 2, np.float32([-3, -4]))
    assert in_flight.values(["a"])[0].tolist() == [-1, -3, -4]


def test_a_trajectory_that_goes_on_keeps_the_values_of_versions_that_are_over_and_no_others():
    segments = [context(1), sampled([2, 3], 0), sampled([4], 1), context(5), sampled([6], 2)]
    values = {0: [-1.0, -2.0], 1: [-3.0, -3.5], 2: [-4.0]}
    in_flight = InFlightTokens()
    in_flight.version = 2
    assert in_flight.restore("a", segments, values) == {1, 2}, "1 is incomplete, and 2 may sample more"
    segments.append(sampled([7], 2))
    in_flight.end([trajectory([1], *segments[1:], id="a")])
    put(in_flight, -3.0)
    put(in_flight, -4.0)
    found, computed_at = in_flight.values(["a"])
    assert found.tolist() == [-1, -2, -3, -4, -4]
    assert computed_at.tolist() == [0, 0, 1, 2, 2]
    in_flight.version = 3
    assert in_flight.restore("b", segments[:-1], values) == {1}
    assert in_flight.restore("c", [context(1)], {}) == set()
