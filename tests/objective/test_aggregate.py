import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError

from .typed import aggregate, kept_mask, token_weights, weighted_loss

MODES = ("token-mean", "token-mean-kept", "sequence-mean", "constant")
a_token = st.tuples(st.floats(-9, 9), st.booleans(), st.booleans(), st.integers(0, 3))
batches = st.lists(a_token, max_size=24)


def columns(tokens):
    values, loss, kept, sequence = zip(*tokens, strict=True) if tokens else ((), (), (), ())
    return (
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(loss, dtype=torch.bool),
        torch.tensor(kept, dtype=torch.bool),
        torch.tensor(sequence, dtype=torch.int64),
    )


def by_hand(tokens, mode):
    """The loss of a list of (value, loss token, kept, sequence), in Python."""
    loss_tokens = [(value, kept, sequence) for value, is_loss, kept, sequence in tokens if is_loss]
    if mode == "constant":
        return -sum(value for value, _, _ in loss_tokens) / 7.0
    if mode == "token-mean-kept":
        loss_tokens = [entry for entry in loss_tokens if entry[1]]
    if not loss_tokens:
        return 0.0
    if mode == "sequence-mean":
        sequences = {sequence: [v for v, _, s in loss_tokens if s == sequence] for _, _, sequence in loss_tokens}
        return -sum(sum(values) / len(values) for values in sequences.values()) / len(sequences)
    return -sum(value for value, _, _ in loss_tokens) / len(loss_tokens)


def needs(kept, sequence):
    return {"kept_mask": kept, "sequence_index": sequence, "num_sequences": 4, "constant": 7.0}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@given(tokens=batches)
def test_each_denominator_is_what_its_name_says(mode, tokens):
    values, loss, kept, sequence = columns(tokens)
    loss_value = aggregate(values, loss, mode=mode, **needs(kept, sequence))
    assert loss_value.item() == pytest.approx(by_hand(tokens, mode), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@given(tokens=batches, cuts=st.lists(st.integers(0, 24), max_size=4))
def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_whole_batch(mode, tokens, cuts):
    """However the batch is cut: sequences may be cut too, and micro-batches may be empty."""
    values, loss, kept, sequence = columns(tokens)
    whole = values.clone().requires_grad_()
    expected = aggregate(whole, loss, mode=mode, **needs(kept, sequence))
    expected.backward()

    parts = values.clone().requires_grad_()
    weights = token_weights(loss, mode=mode, dtype=torch.float64, **needs(kept, sequence))
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    losses = []
    for start, end in itertools.pairwise(bounds):
        losses.append(weighted_loss(parts[start:end], weights[start:end]))
        losses[-1].backward()
    assert sum(loss.item() for loss in losses) == pytest.approx(expected.item(), abs=1e-12)
    assert torch.equal(parts.grad, whole.grad)


def test_micro_batch_means_would_not_add_up():
    """Why the denominator is counted once: the mean of means weighs a short micro-batch's tokens more."""
    values, loss = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.ones(4, dtype=torch.bool)
    halves = [aggregate(values[i], loss[i], mode="token-mean").item() for i in (slice(0, 3), slice(3, 4))]
    assert aggregate(values, loss, mode="token-mean").item() == -2.0
    assert sum(halves) / 2 == -3.0


@pytest.mark.parametrize("mode", ["token-mean", "token-mean-kept", "sequence-mean"])
def test_weights_of_a_non_empty_batch_sum_to_one_and_are_zero_outside_the_loss(mode):
    loss = torch.tensor([True, False, True, True, True])
    kept, sequence = torch.tensor([True, True, False, True, True]), torch.tensor([0, 0, 2, 2, 3])
    weights = token_weights(loss, mode=mode, **needs(kept, sequence))
    assert weights.dtype is torch.float32
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights[1] == 0


def test_the_documented_example_holds():
    loss, sequence = torch.tensor([True, True, False, True]), torch.tensor([0, 0, 1, 1])
    assert token_weights(loss, mode="token-mean").tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    by_sequence = token_weights(loss, mode="sequence-mean", sequence_index=sequence, num_sequences=2)
    assert by_sequence.tolist() == [0.25, 0.25, 0.0, 0.5]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [0, 3])
def test_a_batch_without_loss_tokens_has_loss_zero_and_gradient_zero(mode, length):
    values = torch.ones(length, requires_grad=True)
    nothing, sequence = torch.zeros(length, dtype=torch.bool), torch.zeros(length, dtype=torch.int64)
    loss = aggregate(values, nothing, mode=mode, **needs(nothing, sequence))
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad.tolist() == [0.0] * length


def test_no_kept_token_gives_zero_not_nan():
    loss = torch.ones(2, dtype=torch.bool)
    kept = kept_mask(torch.tensor([3.0, -3.0]), loss, 1.5)
    assert aggregate(torch.zeros(2), loss, mode="token-mean-kept", kept_mask=kept).item() == 0.0


def test_kept_and_valid_denominators_differ_by_n_over_n_kept():
    values, loss = torch.tensor([2.0, 0.0, 0.0, 4.0]), torch.ones(4, dtype=torch.bool)
    kept = torch.tensor([True, False, False, True])
    valid = aggregate(values, loss, mode="token-mean")
    assert aggregate(values, loss, mode="token-mean-kept", kept_mask=kept).item() == valid.item() * 4 / 2


@pytest.mark.parametrize(
    ("mode", "named"),
    [("token-mean-kept", "kept_mask"), ("sequence-mean", "sequence_index"), ("constant", "constant")],
)
def test_a_denominator_without_what_it_needs_is_refused(mode, named):
    with pytest.raises(ConfigError, match=f"denominator '{mode}' needs {named}"):
        token_weights(torch.ones(1, dtype=torch.bool), mode=mode)


def test_a_constant_that_is_not_positive_and_an_unknown_mode_are_refused():
    from oldlogits.objective import token_weights as unchecked

    with pytest.raises(ConfigError, match="denominator must be positive"):
        token_weights(torch.ones(1, dtype=torch.bool), mode="constant", constant=0.0)
    with pytest.raises(ConfigError, match="unknown denominator"):
        unchecked(torch.ones(1, dtype=torch.bool), mode="mean")
