from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oldlogits.core.errors import TrajectoryError
from oldlogits.core.trajectory import Routing
from oldlogits.rollout.journal.records import Grew, Running, decode, encode

from ..builders import sampled

choices = st.tuples(st.sampled_from([np.uint8, np.uint16]), st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda drawn: arrays(drawn[0], drawn[1:])
)


@given(choices, st.integers(0, 7))
def test_choices_come_back_bit_for_bit_and_their_last_tokens_are_those_of_the_array(found, num):
    routing = Routing.of(found)
    assert routing.choices.dtype == found.dtype
    assert np.array_equal(routing.choices, found)
    assert len(routing) == len(found)
    assert np.array_equal(routing.last(num).choices, found[max(0, len(found) - num) :])
    assert np.array_equal((routing.last(num) + routing).choices, np.concatenate([routing.last(num).choices, found]))
    assert len(routing.data) == found.nbytes, "a byte or two for each choice"


def test_routing_is_a_value_and_that_of_another_model_cannot_follow():
    found = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    assert Routing.of(found) == Routing.of(found.copy())
    assert hash(Routing.of(found)) == hash(Routing.of(found.copy()))
    assert Routing.of(found) != Routing.of(found.reshape(2, 2, 3))
    for other in (found.reshape(2, 2, 3), found.astype(np.uint16)):
        with pytest.raises(TrajectoryError, match="routing of two models"):
            Routing.of(found) + Routing.of(other)
    with pytest.raises(TrajectoryError, match="a multiple of 6 bytes"):
        Routing(data=b"12345", num_layers=3, num_chosen=2)


@given(choices)
def test_the_journal_gives_routing_back_bit_for_bit(found):
    segment = replace(sampled([1, 2], 3), routing=Routing.of(found))
    for record in (
        Grew(episode="g000000.0", start=0, segments=(segment,)),
        Running(episode="g000000.0", num_segments=1, start=0, sampled=(segment,)),
    ):
        assert decode(encode(record)) == record
