"""SAT against scalars in float64 written from its description: which bounds close, how far, and what stays."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from oldlogits.core.loss import LOSSES, LossInputs, Objective
from oldlogits.core.objective.cards import CARDS
from oldlogits.core.objective.options import SatOptions
from oldlogits.core.policies import MU, THETA, VARIANTS

LOW, HIGH, DUAL = 0.2, 0.28, 3.0


def quantile(values, share):
    """With linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def oracle(tokens, share, exponent):
    """(value, slope) of each (log r, A)."""
    q = quantile([abs(d) for d, _ in tokens], share)
    found = []
    for d, a in tokens:
        c = 1 / (1 + (abs(d) / q) ** exponent) if q > 0 and abs(d) > q else 1.0
        upper = 1 + HIGH * (c if d > 0 else 1.0)
        lower = 1 - LOW * (c if d < 0 else 1.0)
        r = math.exp(d)
        h = min(r, upper) if a > 0 else min(max(r, lower), DUAL) if a < 0 else r
        found.append((a * h, a * h if h == r else 0.0))
    return found


def terms_of(tokens, **options):
    theta = torch.tensor([d - 1.0 for d, _ in tokens], dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logp={MU: torch.full_like(theta, -1.0).detach(), THETA: theta},
        advantages=torch.tensor([a for _, a in tokens], dtype=torch.float64),
        loss_mask=torch.ones(len(tokens), dtype=torch.bool),
        staleness=torch.zeros(len(tokens), dtype=torch.int64),
        sequence_index=torch.arange(len(tokens)),
        num_sequences=len(tokens),
    )
    knobs = Objective(
        variant=VARIANTS["ppo_clip_train_infer"], eps_low=LOW, eps_high=HIGH, dual_clip=DUAL, options=SatOptions(**options)
    )
    terms = LOSSES.find("sat")(inputs, knobs)
    (gradient,) = torch.autograd.grad(terms.values.sum(), theta) if tokens else (theta,)
    return terms, gradient


moves = st.integers(-96, 96).map(lambda i: i / 64)  # exact in binary, so that ties of |d| are ties


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    st.lists(st.tuples(moves, st.sampled_from([-1.5, 0.0, 0.7])), min_size=1, max_size=12),
    st.sampled_from([0.5, 0.9]),
    st.sampled_from([1.0, 2.0]),
)
def test_only_the_bound_that_a_token_of_the_tail_moves_towards_closes(tokens, share, exponent):
    q = quantile([abs(d) for d, _ in tokens], share)
    assume(all(not 0 < abs(abs(d) - q) < 1e-9 for d, _ in tokens))
    expected = oracle(tokens, share, exponent)
    assume(all(abs(math.exp(d) - b) > 1e-9 for d, _ in tokens for b in (1 - LOW, 1 + HIGH, DUAL)))
    terms, gradient = terms_of(tokens, quantile=share, exponent=exponent)
    assert terms.values.tolist() == pytest.approx([value for value, _ in expected], rel=1e-9, abs=1e-12)
    assert gradient.tolist() == pytest.approx([slope for _, slope in expected], rel=1e-9, abs=1e-12)


def test_the_worked_example_of_the_docstring():
    d = [0.1, 0.1, 0.1, 0.3]
    terms, gradient = terms_of([(one, 1.0) for one in d])
    closed = 1 + HIGH / (1 + 1.25**2)
    assert closed == pytest.approx(1.109, abs=5e-4)
    assert terms.values.tolist() == pytest.approx([math.exp(0.1)] * 3 + [closed])
    assert terms.clip_mask.tolist() == [True, True, True, False]
    assert gradient[3] == 0


def test_it_is_never_wider_than_ppos_clip_and_equal_where_all_tokens_have_moved_alike():
    for d in (0.0, 0.2, -0.1):
        terms, _ = terms_of([(d, 1.0), (d, -1.0), (d, 1.0)])
        assert terms.values.tolist() == pytest.approx([math.exp(d), -math.exp(d), math.exp(d)])


def test_an_empty_micro_batch_has_no_terms():
    terms, _ = terms_of([])
    assert terms.values.shape == (0,)


def test_it_alone_depends_on_the_split_into_micro_batches():
    assert {name for name, card in CARDS.items() if not card.splits} == {"sat"}
