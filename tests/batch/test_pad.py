import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.batch.pad import micro_batches, plan, read_lengths

from ..builders import batch_of, sampled, trajectory
from .test_collate import trajectories

lengths = st.lists(st.integers(0, 40), max_size=20).map(lambda n: np.array(n, np.int64))
budgets = st.integers(1, 100)


@given(lengths, budgets)
def test_a_plan_holds_every_sequence_that_has_tokens_once(n, budget):
    planned = [int(i) for rows in plan(n, budget) for i in rows]
    assert sorted(planned) == np.flatnonzero(n).tolist()


@given(lengths, budgets)
def test_a_plan_keeps_the_budget_but_for_a_sequence_that_alone_exceeds_it(n, budget):
    for rows in plan(n, budget):
        assert len(rows) * n[rows].max() <= budget or len(rows) == 1


@pytest.mark.slow
@given(lengths, budgets)
def test_a_plan_goes_from_long_to_short_and_fills_each_micro_batch(n, budget):
    plans = plan(n, budget)
    order = [int(n[i]) for rows in plans for i in rows]
    assert order == sorted(order, reverse=True)
    for rows in plans[:-1]:
        assert (len(rows) + 1) * n[rows].max() > budget


@pytest.mark.slow
@given(trajectories(), budgets, st.data())
def test_every_token_asked_for_is_scored_exactly_once_under_any_budget(made, budget, data):
    batch = batch_of(made)
    asked = np.flatnonzero(batch.loss_mask)
    asked = asked[np.array(data.draw(st.lists(st.booleans(), min_size=len(asked), max_size=len(asked))), bool)]
    micros = list(micro_batches(batch, asked, budget))
    scored = np.concatenate([m.flat.numpy() for m in micros]) if micros else np.zeros(0, np.int64)
    assert sorted(scored.tolist()) == asked.tolist()


@pytest.mark.slow
@given(trajectories(), budgets)
def test_a_micro_batch_reads_exactly_the_tokens_before_each_token_it_scores(made, budget):
    batch = batch_of(made)
    for m in micro_batches(batch, np.flatnonzero(batch.loss_mask), budget):
        rows, width = m.input_ids.shape
        assert rows * width <= budget or rows == 1
        for row, column, target, temperature, flat in zip(m.row, m.column, m.targets, m.temperature, m.flat, strict=True):
            start = batch.starts[batch.sequence[flat]]
            assert m.input_ids[row, : column + 1].tolist() == batch.token_ids[start:flat].tolist()
            assert target == batch.token_ids[flat]
            assert temperature == batch.temperature[flat]


def test_a_sequence_is_cut_after_the_last_token_that_is_scored():
    batch = batch_of([trajectory([1, 2], sampled([3]), [4, 5, 6, 7]), trajectory([1], sampled([2, 3]), id="g0.1")])
    (micro,) = micro_batches(batch, np.array([2, 8, 9]), 100)
    assert micro.input_ids.shape == (2, 2)
    assert [sorted(zip(micro.row.tolist(), micro.column.tolist(), strict=True))] == [[(0, 1), (1, 0), (1, 1)]]


@pytest.mark.slow
@given(trajectories(), st.data())
def test_what_is_read_of_a_sequence_is_what_the_micro_batches_hold_without_padding(made, data):
    batch = batch_of(made)
    asked = np.flatnonzero(batch.loss_mask)
    asked = asked[np.array(data.draw(st.lists(st.booleans(), min_size=len(asked), max_size=len(asked))), bool)]
    rows = [m.column[m.row == row].max() + 1 for m in micro_batches(batch, asked, 1) for row in range(len(m.input_ids))]
    assert sorted(map(int, rows)) == sorted(n for n in read_lengths(batch, asked).tolist() if n)


@pytest.mark.parametrize("budget", [4, 5])
def test_two_sequences_share_a_micro_batch_from_the_budget_on_that_holds_both(budget):
    batch = batch_of([trajectory([1, 2], sampled([3, 4])), trajectory([1], sampled([2]), id="g0.1")])
    sizes = [tuple(m.input_ids.shape) for m in micro_batches(batch, np.flatnonzero(batch.loss_mask), budget + 1)]
    assert sizes == ([(1, 3), (1, 1)] if budget == 4 else [(2, 3)])
