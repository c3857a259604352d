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


def pieces_of(ledger, **limits):
    found = ledger.next_pieces(100, **limits)
    return None if found is None else (found[0], [piece.trajectory_id for piece in found[1]])


def put(ledger, value=0.0):
    """Score the next pieces; each token gets `value`."""
    version, pieces = ledger.next_pieces(100)
    ledger.put(pieces, version, np.full(sum(len(p.positions) for p in pieces), value, np.float32))


def test_a_piece_holds_the_trajectory_up_to_its_last_token_and_says_which_tokens_are_its():
    ledger = InFlightTokens()
    one = trajectory(
        [5, 6], sampled([7, 8], 0, temperature=0.5), sampled([9], 1), [10], sampled([11, 12], 1, temperature=2.0), [13], id="a"
    )
    ledger.ended([one])
    version, (first,) = ledger.next_pieces(9)
    assert (version, first.token_ids.tolist(), first.positions.tolist()) == (0, [5, 6, 7, 8], [2, 3])
    assert first.temperature.tolist() == [0.5, 0.5]
    ledger.put([first], 0, np.float32([-1, -2]))
    version, (second,) = ledger.next_pieces(9)
    assert (version, second.token_ids.tolist(), second.positions.tolist()) == (1, [5, 6, 7, 8, 9, 10, 11, 12], [4, 6, 7])
    assert second.temperature.tolist() == [1.0, 2.0, 2.0]
    ledger.put([second], 1, np.float32([-3, -4, -5]))
    assert ledger.next_pieces(9) is None
    values, computed_at = ledger.values_of(["a"])
    assert values.tolist() == [-1, -2, -3, -4, -5]
    assert computed_at.tolist() == [0, 0, 1, 1, 1]
    assert (first.num_read, second.num_read) == (3, 7), "the last token is predicted, not read"
    assert ledger.num_repeated_tokens == 3, "the second pass reads again what the first had read"


def test_a_piece_is_complete_when_its_trajectory_has_ended_or_its_version_has_been_replaced():
    ledger = InFlightTokens()
    segments = [context(1), sampled([2], 0)]
    ledger.grew("a", segments)
    assert pieces_of(ledger) is None, "version 0 may sample more"
    ledger.paused({"a": [sampled([3, 4], 0)]})
    version, (piece,) = ledger.next_pieces(9)
    assert (version, piece.positions.tolist(), piece.token_ids.tolist()) == (0, [1, 2, 3], [1, 2, 3, 4])
    put(ledger)
    segments += [sampled([3, 4], 0), sampled([5], 1)]
    ledger.grew("a", segments)
    assert pieces_of(ledger) is None
    ledger.ended([trajectory([1], *segments[1:], id="a")])
    assert pieces_of(ledger) == (1, ["a"])


def test_without_the_word_of_a_pause_a_newer_segment_completes_the_older_versions():
    ledger = InFlightTokens()
    ledger.grew("a", [context(1), sampled([2], 0), sampled([3], 2)])
    assert pieces_of(ledger) == (0, ["a"])
    put(ledger)
    assert pieces_of(ledger) is None
    assert ledger.oldest_needed() == 0, "the ledger's own version"
    ledger.version = 5
    assert ledger.oldest_needed() == 2, "tokens of version 2 may still become known"


def test_pieces_come_oldest_version_first_in_the_order_of_admission_and_no_more_than_asked_for():
    ledger = InFlightTokens()
    for name, version in (("a", 2), ("b", 1), ("c", 1), ("d", 1)):
        ledger.ended([trajectory([1], sampled([2], version), id=name)])
    assert pieces_of(ledger) == (1, ["b", "c", "d"])
    assert [p.trajectory_id for p in ledger.next_pieces(2)[1]] == ["b", "c"]
    assert pieces_of(ledger, of=["d", "a", "nobody"]) == (1, ["d"])
    assert pieces_of(ledger, versions=(2, 3)) == (2, ["a"])
    assert pieces_of(ledger, versions=()) is None


def test_values_of_a_trajectory_that_was_dropped_meanwhile_are_let_go():
    ledger = InFlightTokens()
    ledger.ended([trajectory([1], sampled([2], id_version), id=name) for name, id_version in (("a", 0), ("b", 0))])
    version, pieces = ledger.next_pieces(9)
    ledger.drop(["a", "never seen"])
    ledger.put(pieces, version, np.float32([-1, -2]))
    assert len(ledger) == 1
    assert ledger.values_of(["b"])[0].tolist() == [-2]
    with pytest.raises(KeyError):
        ledger.values_of(["a"])


moves = st.lists(
    st.tuples(st.sampled_from(["sample", "close", "end", "pause", "score", "drop"]), st.integers(0, 2), st.integers(1, 3)),
    max_size=40,
)


@given(moves)
def test_every_token_is_scored_once_at_its_own_version_and_nothing_that_is_needed_is_given_up(moves):
    """A brute-force world of three trajectories; the value of a token is its id, so that order is checked as well."""
    ledger, version, next_id = InFlightTokens(), 0, 100
    closed = {name: [context(1)] for name in "abc"}
    running = {name: [] for name in "abc"}  # (token, version)
    ended, dropped, kept_from = set(), set(), 0
    for name in "abc":
        ledger.grew(name, closed[name])

    def segments_of(tokens):
        by_version = {v: [t for t, at in tokens if at == v] for v in dict.fromkeys(at for _, at in tokens)}
        return [sampled(ids, v) for v, ids in by_version.items()]

    def score():
        while (found := ledger.next_pieces(2)) is not None:
            at, pieces = found
            assert at >= kept_from, "its weights are still there"
            ledger.put(pieces, at, np.concatenate([p.token_ids[p.positions] for p in pieces]).astype(np.float32))

    for move, which, count in moves:
        name = "abc"[which]
        if move == "pause":
            ledger.paused({n: segments_of(tokens) for n, tokens in running.items() if tokens})
            version += 1
        elif move == "score":
            score()
            kept_from = max(kept_from, ledger.oldest_needed())
            assert kept_from <= version
        elif move == "drop":
            ledger.drop([name])
            dropped.add(name)
        elif name in ended | dropped:
            continue
        elif move == "sample":
            running[name] += [(next_id + i, version) for i in range(count)]
            next_id += count
        elif move == "close" or not (running[name] or any(isinstance(s, Sampled) for s in closed[name])):
            closed[name] += [*segments_of(running[name]), context(2)]
            running[name] = []
            ledger.grew(name, closed[name])
        else:
            closed[name] += segments_of(running[name])
            running[name] = []
            ledger.ended([trajectory([1], *closed[name][1:], id=name)])
            ended.add(name)
    score()
    for name in ended - dropped:
        tokens = [(t, s.version) for s in closed[name] if isinstance(s, Sampled) for t in s.token_ids]
        values, computed_at = ledger.values_of([name])
        assert list(zip(values.tolist(), computed_at.tolist(), strict=True)) == tokens
    assert len(ledger) == 3 - len(dropped)
