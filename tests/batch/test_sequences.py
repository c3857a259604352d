import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.batch.sequences import pack
from oldlogits.core.scoring import ScoringSpan


@st.composite
def pieces(draw):
    """A piece whose last token is to be scored."""
    length = draw(st.integers(2, 8))
    positions = sorted({*draw(st.sets(st.integers(1, length - 1))), length - 1})
    return ScoringSpan(
        trajectory_id="a",
        token_ids=np.array(draw(st.lists(st.integers(0, 99), min_size=length, max_size=length)), np.int64),
        positions=np.array(positions, np.int64),
        temperature=np.array([draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in positions], np.float32),
    )


@given(st.lists(pieces(), min_size=1, max_size=5))
def test_packed_pieces_can_be_read_back_token_by_token(given):
    sequences, tokens = pack(given)
    assert sequences.num_sequences == len(given)
    assert sequences.num_tokens == sum(len(piece.token_ids) for piece in given) == len(sequences.temperature)
    rest = tokens.tolist()
    for i, piece in enumerate(given):
        start, end = sequences.starts[i], sequences.starts[i + 1]
        assert sequences.token_ids[start:end].tolist() == piece.token_ids.tolist()
        mine, rest = rest[: len(piece.positions)], rest[len(piece.positions) :]
        assert [t - start for t in mine] == piece.positions.tolist()
        assert sequences.temperature[mine].tolist() == piece.temperature.tolist()
        others = set(range(start, end)) - set(mine)
        assert {float(sequences.temperature[t]) for t in others} <= {1.0}
    assert rest == []
    assert (np.diff(tokens) > 0).all() or len(tokens) == 1
