import math

import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch.utils._python_dispatch import TorchDispatchMode

from oldlogits.engines.embedded import sampling

draw_tokens = jaxtyped(typechecker=beartype)(sampling.draw_tokens)
invert = jaxtyped(typechecker=beartype)(sampling.invert)
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


VOCABS = [5, sampling.BLOCK, sampling.BLOCK + 1, 7 * sampling.BLOCK - 3, 151_936]
NEARLY_ONE = math.nextafter(1, 0)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("vocab", VOCABS)
def test_over_blocks_the_token_is_the_one_that_the_whole_sum_in_float64_gives(vocab):
    rows = 6 if vocab > 1000 else 300
    logits = (8 * rand(rows, vocab) - 4).float()
    logits[:, ::3] = -math.inf
    uniform = torch.cat((rand(rows - 2, seed=1), torch.tensor([0.0, NEARLY_ONE], dtype=torch.float64)))
    tokens, logprobs = draw_tokens(logits, torch.full((rows,), 0.7), uniform)
    cumulative = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
    before = torch.cat((torch.zeros(rows, 1), cumulative), 1).gather(1, tokens[:, None])[:, 0]
    after, total = cumulative.gather(1, tokens[:, None])[:, 0], cumulative[:, -1]
    assert (before <= uniform * total + 1e-6).all()
    assert (uniform * total < after + 1e-6).all()
    assert (tokens % 3 != 0).all()
    expected = torch.log_softmax(logits.double() / 0.7, -1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("num", [3, 128, 200, 1000])
def test_weights_are_inverted_exactly(num):
    """Whole numbers add up without rounding in whatever order."""
    weights = torch.randint(0, 4, (2000, num), generator=torch.Generator().manual_seed(num)).float()
    weights[:, 0], weights[:5] = 0, 0
    weights[range(5), [0, 1, num // 2, num - 2, num - 1]] = 7  # all of the mass on one
    weights[5:, num - 1] += weights[5:].sum(1) == 0
    uniform = torch.cat((torch.tensor([0.0, NEARLY_ONE, 0.5, 0.0, NEARLY_ONE] * 2, dtype=torch.float64), rand(1990)))
    cumulative = weights.double().cumsum(-1)
    expected = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1)
    found, total = invert(weights, uniform)
    assert torch.equal(found, expected)
    assert torch.equal(total, cumulative[:, -1])


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("uniform", [0.0, 0.5, NEARLY_ONE])
def test_the_only_token_in_the_support_is_drawn_wherever_it_stands(vocab, uniform):
    for at in {0, vocab // 2, vocab - 1, min(vocab, sampling.BLOCK) - 1}:
        row = torch.full((1, vocab), -math.inf)
        row[0, at] = -3.0
        token, logprob = draw_tokens(row, torch.ones(1), torch.tensor([uniform], dtype=torch.float64))
        assert (token.item(), logprob.item()) == (at, 0.0)


def test_frequencies_over_several_blocks_follow_the_distribution():
    vocab, n = 300, 60_000
    row = (4 * rand(vocab) - 2).float()
    tokens, _ = draw_tokens(row.expand(n, -1).contiguous(), torch.ones(n), rand(n, seed=1))
    expected = n * torch.softmax(row.double(), -1)
    chi2 = ((torch.bincount(tokens, minlength=vocab) - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - (vocab - 1)) < 4 * math.sqrt(2 * (vocab - 1))


def test_rows_of_a_large_vocabulary_are_taken_piece_by_piece_and_give_what_each_gives_alone():
    logits, uniform, temperature = rand(5, 100_000).float() * 9, rand(5, seed=1), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    tokens, logprobs = draw_tokens(logits, temperature, uniform)
    for i in range(5):
        alone = draw_tokens(logits[i : i + 1], temperature[i : i + 1], uniform[i : i + 1])
        assert (tokens[i], logprobs[i]) == (alone[0][0], alone[1][0])
    assert tokens[1] == logits[1].argmax()


def test_nothing_as_large_as_the_logits_is_made_to_draw_from_them():
    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
                self.found = max(self.found, made.untyped_storage().nbytes())
            return made

    logits = torch.zeros(32, 40_000)
    with Largest() as largest:
        draw_tokens(logits, torch.ones(32), rand(32))
    assert largest.found <= logits.nbytes / 2


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


def restricted_by_sorting(logits, temperature, top_p, top_k):
    """The definition over a whole stable sort: of equally likely tokens the first are kept."""
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    dropped = (top_k[:, None] > 0) & (torch.arange(logits.shape[1]) >= top_k[:, None])
    probability = torch.softmax(ordered.masked_fill(dropped, -math.inf).double() / temperature[:, None], dim=-1)
    dropped |= (probability.cumsum(-1) - probability >= top_p[:, None].double() + 1e-9) & (top_p[:, None] < 1)
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), -math.inf)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_large_vocabulary_is_restricted_as_by_sorting_all_of_it_ties_included(spread):
    vocab = 9001
    top_k = torch.tensor([1, 7, 2000, 0, 0, 0, 50, 0])
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.2, 0.95, 1.0, 0.89, 1e-6])
    temperature = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0])
    logits = spread * torch.randint(-20, 20, (8, vocab), generator=torch.Generator().manual_seed(0)).float() / 4
    expected = restricted_by_sorting(logits, temperature, top_p, top_k)
    assert torch.equal(restrict_support(logits.clone(), temperature, top_p, top_k), expected)
    assert (expected.isfinite().sum(-1) < vocab).tolist() == [True, True, True, True, True, False, True, True]
