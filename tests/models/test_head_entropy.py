"""The gradient of the head's entropies against autograd through a whole softmax in float64, and what it leaves as it is."""

from dataclasses import replace

import pytest
import torch

from oldlogits.models.forward import Arithmetic, round_at_use
from oldlogits.models.head.logits import LogitForm
from oldlogits.models.head.logps import HeadWork, token_logps, token_logps_and_entropies
from oldlogits.models.load import load_model

from .test_head import BF16, FORMS, FP32, FP64, PLAIN, SHAPES, drawn, naive, ours, requiring

NAMES = ("rows", "weight", "bias")


def both(given, form, at_once):
    work = HeadWork(form=form, tokens_at_once=at_once)
    return token_logps_and_entropies(*(given[name] for name in (*NAMES, "targets", "temperature")), work)


def summed(logps, entropies):
    """A loss in which log-probs and entropies count differently: each third token has no log-prob in it, each fourth no
    entropy, and each twelfth neither."""
    at = torch.arange(len(logps))
    slopes = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    return (logps * slopes * (at % 3 > 0)).sum() + (entropies * (slopes + 0.3) * (at % 4 > 0)).sum()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_log_probs_and_entropies_are_those_of_a_whole_softmax_in_float64(form, shape):
    num_tokens, num_words, at_once = SHAPES[shape]
    single = drawn(num_tokens, num_words)
    double = requiring({name: value.double() if value.is_floating_point() else value for name, value in single.items()})
    single = requiring(single)
    logps, entropies = both(single, FORMS[form], at_once)
    expected = naive(double, FORMS[form])
    torch.testing.assert_close(entropies.double(), expected[1], rtol=2e-6, atol=2e-6)
    summed(logps, entropies).backward()
    summed(*expected).backward()
    for name in NAMES:
        mine, theirs = single[name].grad, double[name].grad
        assert mine.dtype == FP32
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("form", ["plain", "all at once"])
def test_the_gradient_is_the_slope_of_the_entropies(form):
    given = requiring(drawn(5, 7, width=3, dtype=FP64))
    in_float64 = replace(FORMS[form], weights=FP64, factors=FP64, sums=FP64, gradients=FP64)

    def found(rows, weight, bias):
        return both(given | {"rows": rows, "weight": weight, "bias": bias}, in_float64, 3)

    assert torch.autograd.gradcheck(found, [given[name] for name in NAMES])


def test_the_entropy_of_even_odds_is_the_log_of_the_words_and_has_no_slope():
    given = requiring(drawn(4, 8))
    even = given | {"weight": torch.zeros(8, 16, requires_grad=True), "bias": torch.zeros(8, requires_grad=True)}
    _, entropies = both(even, PLAIN, 64)
    torch.testing.assert_close(entropies, torch.full((4,), 8.0).log())
    entropies.sum().backward()
    assert float(even["weight"].grad.abs().max()) < 1e-6
    assert float(even["bias"].grad.abs().max()) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_entropies_are_to_the_last_bit_those_without_the_entropies_gradient(shape):
    num_tokens, num_words, at_once = SHAPES[shape]
    given, entropy = drawn(num_tokens, num_words), torch.empty(num_tokens)
    alone = ours(given, PLAIN, at_once, entropy)
    logps, entropies = both(requiring(given), PLAIN, at_once)
    assert torch.equal(logps, alone)
    assert torch.equal(entropies, entropy)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_no_entropy_counts_the_gradient_is_that_of_the_log_probs_alone(shape):
    num_tokens, num_words, at_once = SHAPES[shape]
    first, second = requiring(drawn(num_tokens, num_words)), requiring(drawn(num_tokens, num_words))
    ours(first, PLAIN, at_once).sum().backward()
    both(second, PLAIN, at_once)[0].sum().backward()
    for name in NAMES:
        torch.testing.assert_close(second[name].grad, first[name].grad, rtol=1e-6, atol=1e-6)


def test_a_token_without_a_gradient_adds_nothing_not_even_where_it_is_not_finite():
    given = drawn(40, 30)
    given["rows"][::12] = torch.nan  # those that count neither by their log-prob nor by their entropy
    given = requiring(given)
    logps, entropies = both(given, PLAIN, 7)
    keep = torch.arange(40) % 12 > 0
    summed(torch.where(keep, logps, 0), torch.where(keep, entropies, 0)).backward()
    assert all(bool(given[name].grad.isfinite().all()) for name in NAMES)
    assert not given["rows"].grad[::12].any()


def test_no_tokens_have_no_entropies():
    given = requiring(drawn(0, 30))
    logps, entropies = both(given, PLAIN, 64)
    (logps.sum() + entropies.sum()).backward()
    assert entropies.shape == (0,)
    assert not given["weight"].grad.any()


@pytest.mark.parametrize("head", [FP32, BF16])
def test_in_bf16_the_masters_receive_the_entropies_gradient_of_the_rounded_weights_in_float32(tiny_folder, head):
    model = load_model(tiny_folder)
    exact = model.get_output_embeddings().weight.detach().to(BF16).double().requires_grad_()
    round_at_use(model, BF16, Arithmetic(compute=BF16, head=head))
    weight, form = model.get_output_embeddings().weight, LogitForm.of(model)
    given = drawn(40, len(weight), width=weight.shape[1], dtype=BF16)
    rows, work = given["rows"].requires_grad_(), HeadWork(form=form, tokens_at_once=7)
    _, entropies = token_logps_and_entropies(rows, weight, None, given["targets"], torch.ones(40), work)
    entropies.sum().backward()
    theirs = rows.detach().double().requires_grad_()
    logps = torch.log_softmax(theirs @ exact.T, 1)
    spread = -(logps.exp() * logps).sum(1)
    spread.sum().backward()
    torch.testing.assert_close(entropies.double(), spread, rtol=0, atol=0.02)
    assert (weight.grad.dtype, rows.grad.dtype) == (FP32, BF16)
    for found, expected in ((weight.grad, exact.grad), (rows.grad, theirs.grad)):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("compute", [token_logps, token_logps_and_entropies])
def test_neither_keeps_the_logits_of_all_words_for_the_backward_pass(compute):
    """What is saved is counted: hidden states, weights and some numbers a token, whatever the number of words."""
    given = requiring(drawn(64, 5000))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compute(*(given[name] for name in (*NAMES, "targets", "temperature")), HeadWork(form=PLAIN, tokens_at_once=16))
    assert max(tensor.numel() for tensor in saved) <= given["weight"].numel()
    assert all(tensor.numel() < 64 * 5000 for tensor in saved)
