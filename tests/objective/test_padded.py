import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError, MissingLogprobError
from oldlogits.core.loss import Objective
from oldlogits.core.policies import EWMA, LINEAR, LOGLINEAR, MU, OLD, THETA, find_variant
from oldlogits.objective import padded

from . import oracle
from .typed import flatten_padded, linear_logp, loglinear_logp, padded_loss, unflatten_padded

NAMES = ["ppo_clip", "ppo_clip_train_infer", "decoupled_exact", "linear_prox", "loglinear_prox", "ppo_ewma_train_infer"]
LENGTHS = [(0, 3), (2, 4), (1, 1), (3, 6)]  # of each row: first token that is trained, and the one behind the last


def batch(side, seed=0):
    """Four rows of at most six tokens, padded on one side with NaN; log-probs by policy, advantages by row, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    width = 7
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row, (start, end) in enumerate(LENGTHS):
        shift = 1 if side == "right" else width - end
        mask[row, start + shift : end + shift] = True
    base = -0.2 - 3 * torch.rand(4, width, generator=generator, dtype=torch.float64)

    def noisy(scale):
        values = base - scale * torch.rand(4, width, generator=generator, dtype=torch.float64)
        return torch.where(mask, values, torch.nan)

    logp = {MU: noisy(0.7), OLD: noisy(0.3), EWMA: noisy(0.4), THETA: noisy(0.9)}
    logp[LINEAR] = linear_logp(logp[MU].flatten(), logp[THETA].flatten(), 0.5).view(4, width)
    logp[LOGLINEAR] = loglinear_logp(logp[MU].flatten(), logp[THETA].flatten(), 0.5).view(4, width)
    advantages = torch.tensor([1.5, -2.0, 0.7, -0.3], dtype=torch.float64)
    return logp, advantages, mask


def by_hand(name, logp, advantages, mask, aggregation):
    """The loss and its gradient in scalar arithmetic, token by token."""
    rows = [[column for column in range(mask.shape[1]) if mask[row, column]] for row in range(len(mask))]
    tokens = {
        (row, column): oracle.token(
            name,
            {str(policy): math.exp(values[row, column]) for policy, values in logp.items()},
            float(advantages[row]),
            oracle.Objective(),
        )
        for row, columns in enumerate(rows)
        for column in columns
    }
    if aggregation == "sequence-mean":
        count = {place: len(rows[place[0]]) * sum(map(bool, rows)) for place in tokens}
    else:
        kept = [place for place, token in tokens.items() if token.band or aggregation == "token-mean"]
        count = dict.fromkeys(kept, len(kept))
    loss = -sum(tokens[place].value / n for place, n in count.items())
    gradient = {place: -tokens[place].gradient / n for place, n in count.items()}
    return loss, gradient


@pytest.mark.parametrize("aggregation", ["token-mean", "token-mean-kept", "sequence-mean"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_has_the_loss_and_gradient_of_its_tokens_by_hand(name, side, aggregation):
    logp, advantages, mask = batch(side)
    theta = logp[THETA].clone().requires_grad_()
    found = padded_loss(
        {**logp, THETA: theta}, advantages, mask, Objective(variant=find_variant(name)), aggregation=aggregation
    )
    expected, gradient = by_hand(name, logp, advantages, mask, aggregation)
    assert found.loss.item() == pytest.approx(expected, rel=1e-12)
    found.loss.backward()
    for place in ((row, column) for row in range(4) for column in range(mask.shape[1])):
        assert theta.grad[place].item() == pytest.approx(gradient.get(place, 0.0), rel=1e-12, abs=1e-15)
    assert found.metrics()["loss/value"] == found.loss.item()
    assert found.metrics()["mask/num_tokens"] == int(mask.sum()) == 8


def test_log_probs_that_stand_where_logits_do_are_shifted_and_nothing_else_is():
    logp, advantages, mask = batch("right")
    knobs = Objective(variant=find_variant("decoupled_exact"))
    per_token = advantages[:, None] * torch.arange(7)
    own = padded_loss(logp, per_token, mask, knobs)
    for width in (6, 7):  # without and with the column that predicts what is not there
        moved = {policy: values.roll(-1, dims=1)[:, :width] for policy, values in logp.items()}
        found = padded_loss(moved, per_token, mask, knobs, predicts="next")
        assert found.loss.item() == own.loss.item() != 0
        assert found.metrics() == own.metrics()
    together = {policy: values.roll(-1, dims=1) for policy, values in logp.items()}
    assert padded_loss(together, per_token.roll(-1, dims=1), mask.roll(-1, dims=1), knobs).loss.item() == own.loss.item()


@settings(max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5), st.floats(-9, 9))
def test_flattening_and_back_keeps_what_is_masked_and_fills_the_rest(rows, fill):
    mask = torch.tensor(rows)
    values = torch.arange(mask.numel(), dtype=torch.float64).view(mask.shape)
    back = unflatten_padded(flatten_padded(values, mask), mask, fill)
    assert torch.equal(back[mask], values[mask])
    assert (back[~mask] == fill).all()


def test_one_value_a_row_reaches_all_tokens_of_the_row_and_staleness_is_told_apart():
    logp, advantages, mask = batch("left")
    knobs = Objective(variant=find_variant("decoupled_exact"))
    staleness = torch.tensor([0, 2, 0, 1])
    found = padded_loss(logp, advantages, mask, knobs, staleness=staleness)
    assert torch.equal(found.tokens.advantages, advantages[found.tokens.sequence_index])
    metrics = found.metrics()
    assert [metrics.get(f"mask/num_tokens@lag{lag}") for lag in (0, 1, 2)] == [3, 3, 2]


def test_losses_of_parts_add_up_with_the_count_of_the_whole_step():
    logp, advantages, mask = batch("right")
    knobs, num_tokens = Objective(variant=find_variant("decoupled_exact")), float(mask.sum())
    parts = [
        padded_loss(
            {policy: values[rows] for policy, values in logp.items()},
            advantages[rows],
            mask[rows],
            knobs,
            aggregation="constant",
            constant=num_tokens,
        ).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts).item() == pytest.approx(padded_loss(logp, advantages, mask, knobs).loss.item(), rel=1e-12)


def test_a_batch_without_a_token_has_the_loss_zero():
    logp, advantages, mask = batch("right")
    found = padded_loss(logp, advantages, torch.zeros_like(mask), Objective(variant=find_variant("decoupled_exact")))
    assert found.loss.item() == 0.0
    assert found.metrics() == {"loss/value": 0.0}


def test_what_does_not_fit_or_is_missing_is_an_error():
    logp, advantages, mask = batch("right")
    knobs = Objective(variant=find_variant("decoupled_exact"))
    with pytest.raises(ConfigError, match=r"got: shape \(4, 5\), mask \(4, 7\)"):
        padded.flatten_padded(logp[MU][:, :5], mask)
    with pytest.raises(ConfigError, match="predicts = 'own'"):
        padded.flatten_padded(logp[MU][:, :6], mask)
    with pytest.raises(MissingLogprobError, match="first token of a row has no log-prob"):
        padded.flatten_padded(logp[MU], torch.ones_like(mask), "next")
    with pytest.raises(MissingLogprobError, match="log-probs of OLD are missing"):
        padded.padded_loss({MU: logp[MU], THETA: logp[THETA]}, advantages, mask, knobs)


def test_the_example_holds():
    results = doctest.testmod(padded)
    assert (results.attempted, results.failed) == (6, 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_of_numbers_is_refused_and_never_taken_for_indices(dtype):
    with pytest.raises(ConfigError, match=r"mask\.bool\(\)"):
        padded.flatten_padded(torch.arange(6.0).view(2, 3), torch.tensor([[0, 1, 1], [0, 1, 0]]).to(dtype))


@pytest.mark.parametrize("wrong", ["mask of integers", "mask of numbers", "sums of rows"])
def test_what_would_be_taken_for_something_else_is_refused(wrong):
    """Integers are places to torch, and one log-prob a row would become that of each of its tokens."""
    logp, advantages, mask = batch("right")
    if wrong == "sums of rows":
        logp = {policy: values.nan_to_num().sum(1) for policy, values in logp.items()}
    else:
        mask = mask.long() if wrong == "mask of integers" else mask.double()
    with pytest.raises(
        ConfigError, match="a padded mask marks tokens" if wrong.startswith("mask") else "log-probs are of tokens"
    ):
        padded.padded_loss(logp, advantages, mask, Objective(variant=find_variant("decoupled_exact")))
