"""Every built-in loss and every correction of r_d against scalars in float64, whatever the split into micro-batches."""

import dataclasses
import math
import re
import sys

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError, MissingLogprobError
from oldlogits.core.loss import LOSSES, STEP_RULES, LossInputs, Objective
from oldlogits.core.objective.cards import CARDS
from oldlogits.core.objective.correction import Correction
from oldlogits.core.policies import MU, OLD, THETA, VARIANTS, find_variant

from . import loss_oracle
from .typed import at_level, binary_kl, correct, mean_weight

EPS = {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0}
OPTIONS = {
    "gspo": [{}, {"level": "sequence"}, {"level": "prefix"}, {"level": "token"}],
    "gmpo": [{}, {"log_low": 0.05, "log_high": 0.1}],
    "cispo": [{}, {"low": 0.8, "high": 1.2}],
    "sapo": [{}, {"tau_positive": 3.0, "tau_negative": 0.5}],
    "dppo_tv": [{}, {"low": 0.01, "high": 0.05, "cap": 1.1}],
    "dppo_kl": [{}, {"low": 0.001, "high": 0.004, "cap": math.inf}],
    "dis": [{}],
    "kpop": [{}, {"threshold": 0.003}],
    "flash_reinforce": [{}, {"threshold": 0.05}],
    "topr": [{}, {"level": "geometric"}],
    "reinforce": [
        {},
        {"level": "token", "high": math.inf, "mask_low": 0.8, "mask_high": 1.3},
        {"level": "geometric", "high": 1.1},
        {"level": "prefix"},
        {"level": "none"},
    ],
    "opsm": [{}, {"threshold": 0.05}],
    "masked_is": [{}],
}
CASES = [(name, options) for name, many in OPTIONS.items() for options in many]

ELSEWHERE = {"m2po": "this file, by whole steps", "sat": "test_sat.py"}
"""The losses whose comparison with scalars is written apart."""

log_theta = st.floats(-3, -0.05)
steps = st.sampled_from([0.0, 0.01, -0.01, 0.15, -0.15, 0.5, -0.5, 1.5, -1.5])
tokens_of_one = st.lists(st.tuples(log_theta, steps, steps, st.integers(0, 6)), min_size=1, max_size=5)
batches = st.lists(st.tuples(tokens_of_one, st.sampled_from([-1.5, 0.0, 0.7])), min_size=1, max_size=5)


def sequences_of(found):
    """Sequences as the oracle has them; ties of theta, x and mu are frequent."""
    return [
        [{"theta": theta, "x": min(theta - r_s, -1e-3), "mu": min(theta - r_s - r_d, -1e-3), "a": a, "s": s}
         for theta, r_s, r_d, s in tokens]
        for tokens, a in found
    ]  # fmt: skip


def inputs_of(sequences, gap=1, only=None):
    """The tokens of some sequences, in a batch that has `gap` times as many numbers for sequences and one more."""
    rows = [(i * gap, t) for i, sequence in enumerate(sequences) for t in sequence if only is None or i in only]

    def column(name):
        return torch.tensor([t[name] for _, t in rows], dtype=torch.float64)

    return LossInputs(
        logp={MU: column("mu"), OLD: column("x"), THETA: column("theta").requires_grad_()},
        advantages=column("a"),
        loss_mask=torch.ones(len(rows), dtype=torch.bool),
        staleness=torch.tensor([t["s"] for _, t in rows], dtype=torch.int64),
        sequence_index=torch.tensor([i for i, _ in rows], dtype=torch.int64),
        num_sequences=len(sequences) * gap + 1,
    )


def knobs_of(name, options, variant="ppo_clip", **changed):
    kind = CARDS[name].options
    return Objective(variant=VARIANTS[variant], band=math.inf, options=kind(**options) if kind else None, **EPS, **changed)


def value_and_gradient(name, tokens, knobs):
    terms = LOSSES.find(name)(tokens, knobs)
    (gradient,) = torch.autograd.grad(terms.values.sum(), tokens.logp[THETA])
    return terms, gradient


def near_a_bound(sequences, options, *, in_logs=True):
    """Whether a ratio of some level is so near a bound of some loss that rounding decides."""
    bounding = [v for key, v in options.items() if key != "half_lag" and not key.startswith("tau")]
    numbers = [v for v in bounding if isinstance(v, float) and 0 < v < math.inf]
    bounds = [0.8, 1.28, 3.0, 5.0, 20.0, 2.0, math.exp(0.4), math.exp(-0.4), *numbers]
    bounds += [math.exp(sign * v) for v in numbers for sign in (1, -1) if in_logs]
    bounds += [1 + sign * e / (1 + (s / h) ** 2) for s in range(7) for h in (4.0, 1.0) for sign, e in ((1, 0.28), (-1, 0.2))]
    found = []
    for sequence in sequences:
        for level in ("token", "sequence", "geometric", "prefix"):
            for over in ("x", "mu"):
                found += map(math.exp, loss_oracle.levels(sequence, level, over))
            found += map(math.exp, loss_oracle.levels(sequence, level, "mu", "x"))
        moved = [math.exp(t["theta"]) - math.exp(t["x"]) for t in sequence]
        divergences = [loss_oracle.binary_kl(t[p], t[q]) for t in sequence for p, q in (("x", "theta"), ("theta", "x"))]
        found += [*map(abs, moved), *divergences, loss_oracle.mean([t["mu"] - t["theta"] for t in sequence])]
        found += [loss_oracle.mean([loss_oracle.binary_kl(t["x"], t["theta"]) for t in sequence])]
    bounds += [0.2, 0.05, 0.1, 0.005, 0.5] if in_logs else []
    return any(abs(x - b) < 1e-9 for x in found for b in bounds)


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@given(batches)
def test_a_loss_is_its_papers_formula_in_value_gradient_and_activity(name, options, found):
    sequences = sequences_of(found)
    assume(not near_a_bound(sequences, options))
    tokens = inputs_of(sequences, gap=2)
    terms, gradient = value_and_gradient(name, tokens, knobs_of(name, options))
    expected = [one for s in sequences for one in getattr(loss_oracle, name)(s, **EPS, **options)]
    assert terms.values.tolist() == pytest.approx([value for value, _ in expected], rel=1e-6, abs=1e-9)
    assert gradient.tolist() == pytest.approx([slope for _, slope in expected], rel=1e-6, abs=1e-9)
    inactive = ~terms.active_mask
    assert gradient[inactive].count_nonzero() == 0


def test_every_loss_is_compared_with_scalars_once():
    assert sorted([*OPTIONS, *ELSEWHERE]) == sorted(CARDS)


CORRECTIONS = [
    {},
    {"weight_level": "sequence", "weight_high": 1.6},
    {"weight_level": "geometric", "weight_low": 0.9, "weight_high": 1.1},
    {"weight_level": "prefix"},
    {"token_low": 0.8, "token_high": 1.4},
    {"reject": "sequence", "reject_low": 0.5, "reject_high": 2.0},
    {"reject": "geometric", "reject_low": 0.9, "reject_high": 1.1, "weight_high": 1.2},
    {"reject": "k3", "reject_high": 0.02},
    {"veto_low": 0.3, "veto_high": 3.0},
    {"reject": "geometric", "reject_low": 0.9, "reject_high": 1.1, "ratio": "total"},
]


@pytest.mark.slow
@settings(max_examples=30, suppress_health_check=[HealthCheck.filter_too_much])
@pytest.mark.parametrize("weighs", ["weight_and_mask", "mask"])
@pytest.mark.parametrize("loss", ["masked_is", "cispo", "gspo"])
@pytest.mark.parametrize("keys", CORRECTIONS, ids=str)
@given(batches, st.sampled_from([math.inf, 1.45]))
def test_a_correction_weighs_and_masks_as_written_for_every_loss(keys, loss, weighs, found, band):
    sequences = sequences_of(found)
    numbers = {key: value for key, value in keys.items() if isinstance(value, float)}
    assume(not near_a_bound(sequences, numbers | {"band": band, "low": 1 / band}, in_logs=False))
    k3 = [loss_oracle.mean([math.expm1(t["x"] - t["mu"]) - (t["x"] - t["mu"]) for t in s]) for s in sequences]
    assume(all(abs(x - 0.02) > 1e-9 for x in k3))
    tokens = inputs_of(sequences)
    knobs = knobs_of(loss, {}, "decoupled_exact", correction=Correction(**keys), mismatch_correction=weighs)
    knobs = dataclasses.replace(knobs, band=band)
    terms, gradient = value_and_gradient(loss, tokens, knobs)
    plain = [one for s in sequences for one in getattr(loss_oracle, loss)(s, **EPS)]
    weights = [one for s in sequences for one in loss_oracle.corrected(s, keys, band, weighs=weighs == "weight_and_mask")]
    assert terms.band_mask.tolist() == [kept for _, kept in weights]
    for i in (0, 1):
        wanted = [both[i] * w * kept for both, (w, kept) in zip(plain, weights, strict=True)]
        assert (terms.values, gradient)[i].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@settings(max_examples=30)
@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.splits])
@given(batches, st.randoms())
def test_the_parts_of_a_batch_add_up_to_the_whole_whatever_the_split(name, found, rng):
    sequences = sequences_of(found)
    knobs = knobs_of(name, {}, "decoupled_exact", correction=Correction(reject="geometric", reject_low=0.8, reject_high=1.2))
    whole, step_mask = inputs_of(sequences), None
    if rule := CARDS[name].step_rule:
        step_mask = STEP_RULES.find(rule)(whole, knobs)
        whole = dataclasses.replace(whole, step_mask=step_mask)
    terms, gradient = value_and_gradient(name, whole, knobs)
    order = list(range(len(sequences)))
    rng.shuffle(order)
    cut = rng.randint(0, len(order))
    values, gradients = torch.zeros_like(terms.values), torch.zeros_like(gradient)
    for part in (order[:cut], order[cut:]):
        here = [i for i, s in enumerate(whole.sequence_index.tolist()) if s in part]
        tokens = inputs_of(sequences, only=part)
        tokens = tokens if step_mask is None else dataclasses.replace(tokens, step_mask=step_mask[here])
        found_terms, found_gradient = value_and_gradient(name, tokens, knobs)
        values[here], gradients[here] = found_terms.values.detach(), found_gradient
        assert torch.equal(found_terms.active_mask, terms.active_mask[here])
    torch.testing.assert_close(values, terms.values.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [THETA, OLD, MU, "advantage"])
@pytest.mark.parametrize("name", CARDS)
def test_a_token_that_is_not_finite_is_masked_and_leaves_the_others_as_they_are_without_it(name, policy, bad):
    good = [
        {"theta": -1.0, "x": -1.1, "mu": -1.05, "a": 0.7, "s": 1},
        {"theta": -0.4, "x": -0.5, "mu": -0.45, "a": 0.7, "s": 0},
    ]
    sequences = [[*good, dict(good[0])], [dict(good[1], a=-1.0)]]
    knobs = knobs_of(name, {}, "decoupled_exact", correction=Correction(weight_level="geometric", reject="k3", reject_high=0.5))
    tokens, without = inputs_of(sequences), inputs_of([good, sequences[1]])
    with torch.no_grad():
        if policy == "advantage":
            tokens.advantages[2] = bad
        else:
            tokens.logp[policy][2] = bad
    if rule := CARDS[name].step_rule:
        wide = dataclasses.replace(knobs, options=CARDS[name].options(threshold=1.0))
        masks = [STEP_RULES.find(rule)(t, wide) for t in (tokens, without)]
        tokens, without = (dataclasses.replace(t, step_mask=m) for t, m in zip((tokens, without), masks, strict=True))
    (terms, gradient), (expected, wanted) = (value_and_gradient(name, t, knobs) for t in (tokens, without))
    assert not terms.active_mask[2]
    assert terms.values[2] == gradient[2] == 0
    rest = [0, 1, 3]
    if policy == "advantage":  # its ratios count in those of its sequence
        assert torch.isfinite(terms.values).all()
        assert torch.isfinite(gradient).all()
        return
    torch.testing.assert_close(terms.values[rest], expected.values, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[rest], wanted, rtol=1e-12, atol=0)
    assert torch.equal(terms.active_mask[rest], expected.active_mask)


@pytest.mark.parametrize("name", CARDS)
def test_an_advantage_of_0_and_a_batch_of_no_tokens_train_nothing(name):
    zero = inputs_of([[{"theta": -0.1, "x": -9.0, "mu": -9.0, "a": 0.0, "s": 0}]])
    empty = inputs_of([[{"theta": -1.0, "x": -1.0, "mu": -1.0, "a": 1.0, "s": 0}]], only=[])
    for tokens in (zero, empty):
        if CARDS[name].step_rule:
            tokens = dataclasses.replace(tokens, step_mask=torch.ones_like(tokens.loss_mask))
        terms, gradient = value_and_gradient(name, tokens, knobs_of(name, {}))
        assert terms.values.abs().sum() == gradient.abs().sum() == 0


@pytest.mark.parametrize("correction", [Correction(), Correction(weight_level="sequence"), Correction(token_high=5.0)], ids=str)
@pytest.mark.parametrize("variant", ["ppo_clip", "decoupled_exact"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("name", CARDS)
def test_values_and_gradients_of_ratios_beyond_the_range_of_float32_are_finite(name, dual_clip, variant, correction):
    far = [{"theta": t, "x": x, "mu": mu, "a": a, "s": 0} for t in (-0.1, -95.0, -300.0) for x in (-0.1, -95.0, -300.0)
           for mu in (-0.1, -95.0, -300.0) for a in (0.7, -1.0)]  # fmt: skip
    wide = inputs_of([[t] for t in far])
    single = {policy: logp.detach().float().requires_grad_(policy == THETA) for policy, logp in wide.logp.items()}
    tokens = dataclasses.replace(wide, logp=single, advantages=wide.advantages.float())
    knobs = dataclasses.replace(knobs_of(name, {}, variant, correction=correction), dual_clip=dual_clip)
    if CARDS[name].step_rule:
        tokens = dataclasses.replace(tokens, step_mask=torch.ones_like(tokens.loss_mask))
    for knobs_here in (knobs, *([dataclasses.replace(knobs, is_cap=math.inf)] if name == "masked_is" else [])):
        terms, gradient = value_and_gradient(name, tokens, knobs_here)
        assert torch.isfinite(terms.values).all()
        assert torch.isfinite(gradient).all()
        assert gradient[~terms.active_mask].count_nonzero() == 0


@given(batches, st.sampled_from([0.04, 0.0101, 0.3]))
def test_m2po_masks_the_largest_second_moments_of_the_whole_step_and_no_more(found, threshold):
    sequences = sequences_of(found)
    flat = [t for s in sequences for t in s]
    moments = [(t["x"] - t["mu"]) ** 2 for t in flat]
    tokens, knobs = inputs_of(sequences), knobs_of("m2po", {"threshold": threshold}, "decoupled_exact")
    kept = STEP_RULES.find(CARDS["m2po"].step_rule)(tokens, knobs)
    expected = loss_oracle.m2po_kept(flat, threshold)
    assert int(kept.sum()) == len(expected)  # of equal moments any may go
    assert sorted(m for m, k in zip(moments, kept.tolist(), strict=True) if k) == pytest.approx(
        sorted(moments[i] for i in expected)
    )
    terms, gradient = value_and_gradient("m2po", dataclasses.replace(tokens, step_mask=kept), knobs)
    for i, t in enumerate(flat):
        wanted = loss_oracle.ratio(t) * math.exp(t["x"] - t["mu"]) * t["a"] * bool(kept[i])
        assert terms.values[i].item() == pytest.approx(wanted, rel=1e-9)
        assert gradient[i].item() == pytest.approx(wanted, rel=1e-9)


def test_m2po_without_the_mask_of_its_step_is_an_error():
    with pytest.raises(ConfigError, match="whole optimizer step"):
        LOSSES.find("m2po")(inputs_of([[{"theta": -1.0, "x": -1.0, "mu": -1.0, "a": 1.0, "s": 0}]]), knobs_of("m2po", {}))


@given(batches, st.sampled_from(["token", "sequence", "geometric", "prefix"]))
def test_normalised_weights_have_the_mean_1_over_tokens_or_sequences(found, level):
    sequences = sequences_of(found)
    keys = {"weight_level": level, "weight_high": 1.3}
    knobs = knobs_of("masked_is", {}, "decoupled_exact", correction=Correction(**keys, normalise=True))
    tokens = inputs_of(sequences, gap=3)
    log_r_d = tokens.logp[OLD] - tokens.logp[MU]
    mean = mean_weight(log_r_d, tokens, knobs)
    weights = [[w for w, _ in loss_oracle.corrected(s, keys)] for s in sequences]
    by_sequence = level in ("sequence", "geometric")
    flat = [one[0] for one in weights] if by_sequence else [w for one in weights for w in one]
    assert mean.item() == pytest.approx(sum(flat) / len(flat), rel=1e-9)


def test_levels_do_not_depend_on_the_order_of_sequences_and_skip_tokens_that_do_not_count():
    logs, index = torch.tensor([0.1, 0.2, 0.4, 0.8]), torch.tensor([2, 0, 2, 2])
    counted = torch.tensor([True, True, False, True])
    kept = {"counted": counted, "sequence_index": index, "num_sequences": 4}
    found = {level: at_level(logs, level, **kept).tolist() for level in ("token", "sequence", "geometric", "prefix")}
    assert found["token"] == pytest.approx([0.1, 0.2, 0.0, 0.8])
    assert found["sequence"] == pytest.approx([0.9, 0.2, 0.9, 0.9])
    assert found["geometric"] == pytest.approx([0.45, 0.2, 0.45, 0.45])
    assert found["prefix"] == pytest.approx([0.1, 0.2, 0.1, 0.9])


@given(st.floats(-30, -1e-7), st.floats(-30, -1e-7))
def test_the_binary_divergence_is_that_of_two_outcomes_and_0_for_equal_ones(a, b):
    p, q = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    assert binary_kl(p, q).item() == pytest.approx(loss_oracle.binary_kl(a, b), rel=1e-6, abs=1e-12)
    assert binary_kl(p, p).item() == pytest.approx(0, abs=1e-15)


def test_knobs_of_another_loss_and_a_policy_that_is_missing_are_errors():
    one = inputs_of([[{"theta": -1.0, "x": -1.0, "mu": -1.0, "a": 1.0, "s": 0}]])
    with pytest.raises(ConfigError, match="knobs of another loss"):
        LOSSES.find("cispo")(one, knobs_of("sapo", {}))
    without_mu = dataclasses.replace(one, logp={OLD: one.logp[OLD], THETA: one.logp[THETA]})
    with pytest.raises(MissingLogprobError, match="MU"):
        LOSSES.find("opsm")(without_mu, knobs_of("opsm", {}))
    total = Objective(variant=find_variant("ppo_clip"), correction=Correction(veto_low=0.1, ratio="total"))
    with pytest.raises(ConfigError, match="theta/mu"):
        correct(torch.zeros(1, dtype=torch.float64), without_mu, total)


@pytest.mark.parametrize("name", sorted(set(CARDS) - {"masked_is"}))
def test_the_file_of_every_loss_names_the_paper_of_its_card(name):
    loss = LOSSES.find(name)
    text = sys.modules[loss.__module__].__doc__ + loss.__doc__
    assert [paper for paper in re.findall(r"\d{4}\.\d{5}", CARDS[name].paper) if paper not in text] == []
