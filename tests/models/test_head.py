"""The head's log-probs, entropies and gradients against the naive way in float64, what they depend on, and its memory."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from oldlogits.models.forward import Arithmetic, round_at_use
from oldlogits.models.head.logits import LogitForm, logits_of
from oldlogits.models.head.logps import HeadWork, token_logps
from oldlogits.models.load import load_model

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
PLAIN = LogitForm(weights=FP32, factors=FP32, sums=FP32, gradients=FP32)
FORMS = {
    "plain": PLAIN,
    "granite": replace(PLAIN, divisor=3.0),
    "cohere": replace(PLAIN, factor=0.25),
    "gemma": replace(PLAIN, cap=1.5),
    "all at once": replace(PLAIN, divisor=0.5, factor=0.75, cap=2.0),
}
SHAPES = {"one piece": (40, 30, 64), "pieces of words": (1100, 2500, 4096), "pieces of tokens and words": (1500, 3000, 700)}
"""Tokens, words, and the tokens that go through the head at once."""


def drawn(num_tokens, num_words, width=16, dtype=FP32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "rows": torch.randn(num_tokens, width, generator=g).to(dtype),
        "weight": torch.randn(num_words, width, generator=g).mul(0.5).to(dtype),
        "bias": torch.randn(num_words, generator=g).to(dtype),
        "targets": torch.randint(num_words, (num_tokens,), generator=g),
        "temperature": torch.empty(num_tokens).uniform_(0.5, 2, generator=g),
    }


def naive(given, form):
    """Log-probs and entropies from [token, word], in the type of what is given."""
    logits = given["rows"] @ given["weight"].T + given["bias"]
    logits = logits / form.divisor * form.factor
    logits = form.cap * torch.tanh(logits / form.cap) if form.cap else logits
    logps = torch.log_softmax(logits / given["temperature"].to(logits.dtype)[:, None], 1)
    return logps.gather(1, given["targets"][:, None]).squeeze(1), -(logps.exp() * logps).sum(1)


def ours(given, form, at_once, entropy=None):
    work = HeadWork(form=form, tokens_at_once=at_once, entropy=entropy)
    return token_logps(*(given[name] for name in ("rows", "weight", "bias", "targets", "temperature")), work)


def gradients_of(logps, given, names=("rows", "weight", "bias")):
    """Of log-probs that count differently, every third one not at all."""
    counts = torch.arange(len(logps)).remainder(3) * torch.linspace(-1, 1, len(logps))
    (logps * counts.to(logps.dtype)).sum().backward()
    return [given[name].grad for name in names]


def requiring(given):
    return {name: value.detach().clone().requires_grad_(value.is_floating_point()) for name, value in given.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_log_probs_entropies_and_gradients_are_those_of_the_naive_way_in_float64(form, shape):
    num_tokens, num_words, at_once = SHAPES[shape]
    single = drawn(num_tokens, num_words)
    double = requiring({name: value.double() if value.is_floating_point() else value for name, value in single.items()})
    single, entropy = requiring(single), torch.empty(num_tokens)
    found = ours(single, FORMS[form], at_once, entropy)
    expected, spread = naive(double, FORMS[form])
    assert found.dtype == FP32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), spread, rtol=2e-6, atol=2e-6)
    for mine, theirs in zip(gradients_of(found, single), gradients_of(expected, double), strict=True):
        assert mine.dtype == FP32
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("form", ["plain", "all at once"])
def test_the_gradient_is_the_slope_of_the_log_probs(form):
    given = requiring(drawn(5, 7, width=3, dtype=FP64))
    in_float64 = replace(FORMS[form], weights=FP64, factors=FP64, sums=FP64, gradients=FP64)

    def logps(rows, weight, bias):
        return ours(given | {"rows": rows, "weight": weight, "bias": bias}, in_float64, 3)

    assert torch.autograd.gradcheck(logps, [given[name] for name in ("rows", "weight", "bias")])


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_gradients_nor_entropies_that_are_asked_for_change_a_bit_of_a_log_prob(shape):
    num_tokens, num_words, at_once = SHAPES[shape]
    given = drawn(num_tokens, num_words)
    alone = ours(given, PLAIN, at_once)
    assert torch.equal(ours(requiring(given), PLAIN, at_once), alone)
    assert torch.equal(ours(given, PLAIN, at_once, torch.empty(num_tokens)), alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_without_a_gradient_adds_nothing_to_that_of_the_others_not_even_where_it_is_not_finite(shape):
    num_tokens, num_words, at_once = SHAPES[shape]
    given = drawn(num_tokens, num_words)
    given["rows"][::3] = torch.nan  # those that `gradients_of` does not count
    given = requiring(given)
    logps = ours(given, PLAIN, at_once)
    assert logps.isnan().tolist() == [i % 3 == 0 for i in range(num_tokens)]
    counts = torch.arange(num_tokens).remainder(3).float()
    logps.backward(counts)
    assert all(bool(given[name].grad.isfinite().all()) for name in ("rows", "weight", "bias"))
    assert not given["rows"].grad[::3].any()
    assert bool(given["rows"].grad[1::3].any(1).all())


def test_a_batch_in_which_no_token_has_a_gradient_has_none():
    given = requiring(drawn(40, 30))
    ours(given, PLAIN, 64).backward(torch.zeros(40))
    assert not any(bool(given[name].grad.any()) for name in ("rows", "weight", "bias"))


def test_a_frozen_head_gets_no_gradient_and_its_hidden_states_theirs():
    frozen = drawn(1100, 2500)
    trained = requiring(frozen)
    frozen["rows"] = frozen["rows"].requires_grad_()
    gradients_of(ours(trained, PLAIN, 4096), trained)
    gradients_of(ours(frozen, PLAIN, 4096), frozen, ["rows"])
    assert torch.equal(frozen["rows"].grad, trained["rows"].grad)
    assert frozen["weight"].grad is None


def test_no_tokens_have_no_log_probs():
    given = requiring(drawn(0, 30))
    logps = ours(given, PLAIN, 64, torch.empty(0))
    logps.sum().backward()
    assert logps.shape == (0,)
    assert not given["weight"].grad.any()


@pytest.mark.parametrize("arithmetic", [None, Arithmetic(), Arithmetic(compute=BF16), Arithmetic(compute=BF16, head=BF16)])
def test_logits_are_those_of_the_models_own_forward_in_every_arithmetic(tiny_folder, arithmetic):
    model = load_model(tiny_folder)
    if arithmetic is not None:
        round_at_use(model, BF16, arithmetic)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
        found = logits_of(model, model.base_model(input_ids=ids).last_hidden_state[0])
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=0 if arithmetic and arithmetic.head == BF16 else 1e-6)


@pytest.mark.parametrize("words", [slice(0, 27), slice(3, 11), slice(11, 27)])
def test_with_a_head_in_bf16_logits_of_some_words_are_those_of_transformers_to_the_last_bit(tiny_folder, words):
    model, plain = load_model(tiny_folder), AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=BF16).eval()
    round_at_use(model, BF16, Arithmetic(compute=BF16, head=BF16))
    ids, form = torch.arange(20)[None], LogitForm.of(model)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        weight = form.rounded(model.get_output_embeddings().weight[words])
        found = form.logits(hidden, weight, None, torch.empty(20, len(weight)))
        assert torch.equal(found, plain(input_ids=ids).logits[0, :, words].float())


@pytest.mark.parametrize("head", [FP32, BF16])
def test_in_bf16_the_masters_receive_the_gradient_of_the_rounded_weights_in_float32(tiny_folder, head):
    model = load_model(tiny_folder)
    exact = copy.deepcopy(model.get_output_embeddings().weight).detach().to(BF16).double()
    round_at_use(model, BF16, Arithmetic(compute=BF16, head=head))
    weight, form = model.get_output_embeddings().weight, LogitForm.of(model)
    given = drawn(40, len(weight), width=weight.shape[1], dtype=BF16)
    ones = torch.ones(40)
    work = HeadWork(form=form, tokens_at_once=7)
    rows = given["rows"].requires_grad_()
    token_logps(rows, weight, None, given["targets"], ones, work).sum().backward()
    theirs = [rows.detach().double().requires_grad_(), exact.requires_grad_()]
    logps = torch.log_softmax(theirs[0] @ theirs[1].T, 1).gather(1, given["targets"][:, None])
    logps.sum().backward()
    assert weight.grad.dtype == FP32
    assert rows.grad.dtype == BF16
    for found, expected in zip((weight.grad, rows.grad), (one.grad for one in theirs[::-1]), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


PEAK = """
import re, sys, torch
from pathlib import Path
from oldlogits.models.head.logits import LogitForm
from oldlogits.models.head.logps import HeadWork, token_logps
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # of this program alone, in KiB

way, words, tokens = sys.argv[1], 151936, 512
torch.manual_seed(0)
rows, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(words, 8, requires_grad=True)
rows.grad, weight.grad = torch.zeros_like(rows), torch.zeros_like(weight)
targets, heat = torch.randint(words, (tokens,)), torch.ones(tokens)
before = peak()
if way == "naive":
    logps = torch.log_softmax((rows @ weight.T) / heat[:, None], 1).gather(1, targets[:, None])
else:
    fp32 = torch.float32
    form = LogitForm(weights=fp32, factors=fp32, sums=fp32, gradients=fp32)
    work = HeadWork(form=form, tokens_at_once=2048, entropy=torch.empty(tokens))
    logps = token_logps(rows, weight, None, targets, heat, work)
logps.sum().backward()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell the peak of a process")
def test_at_a_large_vocabulary_the_head_takes_at_most_a_sixteenth_of_the_memory_of_the_naive_way_gradient_included():
    """With more tokens the share falls on: what the head takes does not grow with them (`benchmarks/head.py`)."""
    took = {
        way: int(subprocess.run([sys.executable, "-c", PEAK, way], check=True, capture_output=True, text=True).stdout)
        for way in ("naive", "ours")
    }
    assert took["naive"] > 2 * 4 * 512 * 151_936 / 1024, "logits and their gradient, in KiB"
    assert took["ours"] <= took["naive"] / 16
