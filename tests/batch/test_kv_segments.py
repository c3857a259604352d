import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.batch.kv_segments import kv_chains, segment_sequences
from oldlogits.core.errors import TrajectoryError
from oldlogits.core.trajectory import Context

from ..builders import batch_of, sampled, trajectory

segment = st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from(["fresh", "mixed"]))
turn = st.tuples(st.integers(1, 3), st.lists(segment, min_size=1, max_size=3))


@st.composite
def trajectories(draw):
    """Turns of several segments; but for the first, a segment goes on over older entries or has them recomputed."""
    made = []
    for i in range(draw(st.integers(1, 3))):
        version, segments = 0, []
        for num_read, parts in draw(st.lists(turn, min_size=1, max_size=3)):
            segments.append(list(range(num_read)))
            for num_said, increment, kv in parts:
                version += increment
                segments.append(sampled(range(num_said), version, kv=kv if len(segments) > 1 else "fresh"))
        made.append(trajectory(*segments, id=f"g0.{i}"))
    return made


def attended(one):
    """The versions of the entries that each sampled token attends to, as an engine's cache grows token by token."""
    position, entries, found = 0, [], {}
    for s in one.segments:
        for k in range(len(s.token_ids)):
            if isinstance(s, Context):
                continue
            entries = [] if s.kv == "fresh" and k == 0 else entries
            entries = entries + [s.version] * (position + k - len(entries))
            found[position + k] = tuple(entries)
        position += len(s.token_ids)
    return found


@pytest.mark.slow
@given(trajectories())
def test_chains_say_of_every_token_which_versions_computed_what_it_attended_to(made):
    batch = batch_of(made)
    expected = {int(start) + p: e for start, one in zip(batch.starts, made, strict=False) for p, e in attended(one).items()}
    found = {}
    for chain in kv_chains(batch):
        entries = ()
        for segment in chain:
            assert segment.begin - segment.origin == len(entries)
            assert (batch.version[segment.tokens] == segment.version).all()
            for token in segment.tokens.tolist():
                assert token not in found
                found[token] = (*entries, *[segment.version] * (token - segment.begin))
            entries += (segment.version,) * segment.num_entries
    assert found == expected


@pytest.mark.slow
@given(trajectories())
def test_chunks_cut_out_hold_their_tokens_and_know_where_they_come_from(made):
    batch = batch_of(made)
    segments = [segment for chain in kv_chains(batch) for segment in chain]
    cut, tokens, flat = segment_sequences(batch, segments)
    np.testing.assert_array_equal(flat, np.concatenate([np.arange(c.begin, c.tokens[-1] + 1) for c in segments]))
    np.testing.assert_array_equal(flat[tokens], np.concatenate([c.tokens for c in segments]))
    np.testing.assert_array_equal(cut.lengths, [c.num_entries + 1 for c in segments])
    np.testing.assert_array_equal(cut.token_ids, batch.token_ids[flat])
    np.testing.assert_array_equal(cut.temperature, batch.temperature[flat])


def shapes(*segments):
    return [[(c.version, c.begin, c.tokens.tolist()) for c in chain] for chain in kv_chains(batch_of([trajectory(*segments)]))]


def test_an_update_in_mid_turn_goes_on_with_the_entry_of_the_last_token_before_it():
    found = shapes([1, 2, 3], sampled([4, 5], 0), sampled([6, 7], 1, kv="mixed"), sampled([8], 3, kv="mixed"))
    assert found == [[(0, 0, [3, 4]), (1, 4, [5, 6]), (3, 6, [7])]]


def test_a_turn_over_older_entries_has_its_version_compute_what_was_read_since():
    found = shapes([1, 2], sampled([3, 4], 0), [5, 6], sampled([7, 8], 1, kv="mixed"), [9], sampled([10], 1, kv="mixed"))
    assert found == [[(0, 0, [2, 3]), (1, 3, [6, 7, 9])]]


def test_fresh_turns_of_one_version_share_a_chain_and_a_fresh_one_after_a_mixed_one_begins_anew():
    turns = [sampled([1], 2), [2], sampled([3], 2), sampled([4], 5, kv="mixed"), [5], sampled([6], 5), [7], sampled([8], 6)]
    assert shapes([9], *turns) == [[(2, 0, [1, 3]), (5, 3, [4])], [(5, 0, [6])], [(6, 0, [8])]]


def test_a_trajectory_that_begins_over_older_entries_is_refused_by_name():
    made = [trajectory([1], sampled([2])), trajectory([1], sampled([2], kv="mixed"), id="g0.1")]
    with pytest.raises(TrajectoryError, match=r"unknown versions.*first sampled token of g0\.1"):
        kv_chains(batch_of(made))
