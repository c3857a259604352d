"""The choice of groups against brute force over all schedules, for every small case."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import AccountingError
from oldlogits.rollout.staleness import Outstanding, StalenessBound


def schedule_exists(deadlines, first, batch_size):
    """Whether groups of these deadlines can be trained from version `first` on, `batch_size` a version: by trying."""
    if not deadlines:
        return True
    if min(deadlines) < first:
        return False
    return any(
        schedule_exists([d for i, d in enumerate(deadlines) if i not in taken], first + 1, batch_size)
        for size in range(min(batch_size, len(deadlines)), -1, -1)
        for taken in itertools.combinations(range(len(deadlines)), size)
    )


def small_cases():
    """Every multiset of outstanding groups that admission lets come about, for bounds up to W = 2, B = 2."""
    for window, batch_size in [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]:
        kinds = [(deadline, ready) for deadline in range(window + 1) for ready in (True, False)]
        for size in range((window + 1) * batch_size + 1):
            for groups in itertools.combinations_with_replacement(kinds, size):
                if schedule_exists([d for d, _ in groups], 0, batch_size):
                    yield window, batch_size, groups


CASES = list(small_cases())


def is_safe(choice, groups, batch_size):
    return schedule_exists([d for i, (d, _) in enumerate(groups) if i not in choice], 1, batch_size)


def outstanding_of(groups, version=0):
    return [Outstanding(deadline=version + deadline, ready=ready) for deadline, ready in groups]


def test_it_waits_exactly_when_no_choice_of_ready_groups_leaves_a_schedule_for_the_rest():
    outcomes = Counter()
    for window, batch_size, groups in CASES:
        ready = [i for i, (_, is_ready) in enumerate(groups) if is_ready]
        safe = any(is_safe(choice, groups, batch_size) for choice in itertools.combinations(ready, batch_size))
        bound = StalenessBound(max_staleness=window, prompts_per_update=batch_size)
        chosen = bound.choose(7, outstanding_of(groups, 7))
        assert (chosen is not None) is safe, (window, batch_size, groups)
        if chosen is not None:
            assert len(chosen) == batch_size
            assert set(chosen) <= set(ready)
            assert is_safe(chosen, groups, batch_size)
        outcomes[safe, len(ready) >= batch_size] += 1
    assert min(outcomes[True, True], outcomes[False, True], outcomes[False, False]) > 20, "the cases tell nothing"


def test_once_everything_is_ready_it_never_waits_for_a_full_batch():
    for window, batch_size, groups in CASES:
        if len(groups) >= batch_size:
            bound = StalenessBound(max_staleness=window, prompts_per_update=batch_size)
            assert bound.choose(0, outstanding_of([(d, True) for d, _ in groups])) is not None


def test_a_running_group_that_is_due_is_waited_for_though_another_is_ready():
    bound = StalenessBound(max_staleness=1, prompts_per_update=1)
    due, later = Outstanding(deadline=3, ready=False), Outstanding(deadline=4, ready=True)
    assert bound.choose(3, [due, later]) is None
    assert bound.choose(3, [Outstanding(deadline=3, ready=True), later]) == [0]
    assert bound.choose(2, [due, later]) == [1]


@given(st.integers(0, 3), st.integers(1, 3), st.data())
def test_the_earliest_deadlines_go_first_and_among_equals_the_first_admitted(window, batch_size, data):
    deadlines = data.draw(st.lists(st.integers(0, window), max_size=(window + 1) * batch_size))
    bound = StalenessBound(max_staleness=window, prompts_per_update=batch_size)
    if any(sum(d <= at for d in deadlines) > (at + 1) * batch_size for at in range(window + 1)):
        with pytest.raises(AccountingError, match="more groups are due by version"):
            bound.choose(0, outstanding_of([(d, True) for d in deadlines]))
    elif len(deadlines) >= batch_size:
        order = sorted(range(len(deadlines)), key=lambda i: (deadlines[i], i))
        assert bound.choose(0, outstanding_of([(d, True) for d in deadlines])) == order[:batch_size]


def test_a_group_past_its_deadline_is_a_defect():
    bound = StalenessBound(max_staleness=2, prompts_per_update=2)
    groups = [Outstanding(deadline=4, ready=True)] * 3
    assert bound.choose(3, groups) == [0, 1]
    with pytest.raises(AccountingError, match="due by version 4"):
        bound.choose(4, groups)
    with pytest.raises(AccountingError, match="due by version 5"):
        bound.choose(5, [*groups, groups[0]])


def test_as_many_groups_may_be_outstanding_as_the_window_holds():
    assert StalenessBound(max_staleness=4, prompts_per_update=16).capacity == 80
    assert StalenessBound(max_staleness=0, prompts_per_update=3).capacity == 3
