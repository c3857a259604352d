import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped

from oldlogits.engines.embedded import sampling

draw_tokens = jaxtyped(typechecker=beartype)(sampling.draw_tokens)
restrict_support = jaxtyped(typechecker=beartype)(sampling.restrict_support)

logit_rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=7)


def softmax(row, temperature=1.0):
    weights = [math.exp(x / temperature) for x in row]
    return [weight / sum(weights) for weight in weights]


def draw(row, temperature, uniform):
    tokens, logprobs = draw_tokens(
        torch.tensor([row]), torch.tensor([float(temperature)]), torch.tensor([uniform], dtype=torch.float64)
    )
    return tokens.item(), logprobs.item()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(row=logit_rows, temperature=st.floats(0.25, 4, width=32), uniform=st.floats(0, 1, exclude_max=True))
def test_the_token_is_where_the_cumulative_probability_passes_the_uniform(row, temperature, uniform):
    token, logprob = draw(row, temperature, uniform)
    probability = softmax(row, temperature)
    before = math.fsum(probability[:token])
    assert before - 1e-5 <= uniform < before + probability[token] + 1e-5
    assert logprob == pytest.approx(math.log(probability[token]), abs=1e-5)


def test_known_draws():
    row = [math.log(0.2), math.log(0.8)]
    assert draw(row, 1, 0.19)[0] == 0
    assert draw(row, 1, 0.21)[0] == 1
    assert draw(row, 1, 0.0)[0] == 0
    assert draw(row, 1, math.nextafter(1, 0))[0] == 1


def test_greedy_takes_the_likeliest_and_reports_its_logprob_at_temperature_one():
    token, logprob = draw([0.0, 2.0, 1.0], 0, 0.0)
    assert token == 1
    assert logprob == pytest.approx(math.log(softmax([0.0, 2.0, 1.0])[1]))


@pytest.mark.parametrize("uniform", [0.0, 0.3, math.nextafter(1, 0)])
def test_a_token_outside_the_support_is_never_drawn(uniform):
    assert draw([-math.inf, 0.0, -math.inf, 0.5, -math.inf], 1, uniform)[0] in (1, 3)


def test_logits_that_are_not_finite_give_a_token_and_a_nan_logprob():
    token, logprob = draw([math.nan, 1.0, 2.0], 1, 0.5)
    assert 0 <= token < 3
    assert math.isnan(logprob)


def test_frequencies_follow_the_distribution_at_the_temperature():
    row, n = [0.0, 1.0, 2.0, -1.0], 40_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, _ = draw_tokens(torch.tensor([row]).expand(n, -1), torch.full((n,), 2.0), uniform)
    for token, p in enumerate(softmax(row, 2.0)):
        assert (tokens == token).sum() / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def support(row, temperature, top_p, top_k):
    """The kept tokens, by the definition: the k likeliest, then the shortest run that reaches mass p."""
    ranked = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or len(row)]
    probability = softmax([row[i] for i in ranked], temperature)
    kept, mass = [], 0.0
    for token, p in zip(ranked, probability, strict=True):
        if mass >= top_p < 1:
            break
        kept.append(token)
        mass += p
    return kept, mass


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(st.integers(-20, 20), min_size=2, max_size=7, unique=True),
    temperature=st.floats(0.5, 4, width=32),
    top_p=st.floats(0.125, 1, width=32),
    top_k=st.integers(0, 8),
)
def test_the_support_is_the_nucleus_among_the_k_likeliest(row, temperature, top_p, top_k):
    row = [x / 4 for x in row]
    args = torch.tensor([row]), torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([top_k])
    restricted = restrict_support(*args)[0].tolist()
    kept, mass = support(row, temperature, top_p, top_k)
    previous = mass - softmax([row[i] for i in kept], temperature)[-1] * mass
    if min(abs(mass - top_p), abs(previous - top_p)) > 1e-4:  # on the very edge rounding decides
        assert {i for i, x in enumerate(restricted) if x > -math.inf} == set(kept)
    assert all(x == -math.inf or x == y for x, y in zip(restricted, row, strict=True))


def test_greedy_rows_and_rows_without_limits_keep_their_logits():
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    settings_of_rows = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.1, 1.0, 0.1]), torch.tensor([1, 0, 0])
    inf = math.inf
    assert restrict_support(logits, *settings_of_rows).tolist() == [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [-inf, -inf, 3.0]]
