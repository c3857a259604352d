"""The loss seam: the built-in frame is `surrogate`, and a sequence-level loss sees whole sequences."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError, MissingLogprobError
from oldlogits.core.loss import LOSSES, LossInputs, LossTerms, Objective
from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
from oldlogits.objective import split_ratio, surrogate

ROW = VARIANTS["decoupled_exact"]
logs = st.floats(-6, -0.01)
KNOBS = Objective(variant=ROW, band=1.4, eps_low=0.1, eps_high=0.3, dual_clip=2.5)


def inputs_of(logp, advantages, sequence_index=None):
    advantages = torch.tensor(advantages, dtype=torch.float64)
    index = torch.zeros(len(advantages), dtype=torch.int64) if sequence_index is None else torch.tensor(sequence_index)
    return LossInputs(
        logp={policy: torch.tensor(values, dtype=torch.float64) for policy, values in logp.items()},
        advantages=advantages,
        loss_mask=torch.ones(len(advantages), dtype=torch.bool),
        staleness=torch.zeros_like(index),
        sequence_index=index,
        num_sequences=int(index.max()) + 1,
    )


@pytest.mark.slow
@given(
    st.lists(st.tuples(logs, logs, logs, st.sampled_from([-1.0, 0.0, 2.0])), min_size=1, max_size=12),
    st.sampled_from([{}, {"mismatch_correction": "mask"}, {"is_cap": 1.2}, {"dual_clip": None}, {"band": math.inf}]),
)
def test_the_built_in_loss_is_the_surrogate_of_the_two_ratios_bit_for_bit(tokens, changed):
    mu, old, theta, advantages = map(list, zip(*tokens, strict=True))
    knobs = dataclasses.replace(KNOBS, **changed)
    inputs = inputs_of({MU: mu, OLD: old, THETA: theta}, advantages)
    inputs.logp[THETA].requires_grad_()
    found = LOSSES.find("masked_is")(inputs, knobs)
    expected = surrogate(
        split_ratio(ROW, inputs.logp),
        inputs.advantages,
        inputs.loss_mask,
        band=knobs.band,
        eps_low=knobs.eps_low,
        eps_high=knobs.eps_high,
        dual_clip=knobs.dual_clip,
        discrepancy=knobs.mismatch_correction,
        truncation=knobs.is_cap,
    )
    for name in ("values", "band_mask", "clip_mask", "active_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    gradients = [torch.autograd.grad(terms.values.sum(), inputs.logp[THETA])[0] for terms in (found, expected)]
    assert torch.equal(*gradients)
    assert found.log_r_d.tolist() == [o - m for o, m in zip(old, mu, strict=True)]
    assert found.log_r_s.tolist() == [t - o for t, o in zip(theta, old, strict=True)]
    assert not found.log_r_s.requires_grad


def test_a_policy_that_is_missing_is_an_error_and_never_a_ratio_of_1():
    with pytest.raises(MissingLogprobError, match="log-probs of OLD are missing"):
        LOSSES.find("masked_is")(inputs_of({MU: [-1.0], THETA: [-1.0]}, [1.0]), KNOBS)


def test_terms_that_are_not_one_per_token_are_refused_with_their_shapes():
    token, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"one value per token; got: values \(2,\), log_r_d \(3,\)"):
        LossTerms(values=torch.zeros(2), log_r_d=token, log_r_s=token, band_mask=mask, clip_mask=mask)
    scalar = torch.zeros(())
    with pytest.raises(ConfigError, match="one value per token"):
        LossTerms(values=scalar, log_r_d=scalar, log_r_s=scalar, band_mask=scalar.bool(), clip_mask=scalar.bool())


def test_an_unknown_loss_is_refused_with_the_built_in_ones():
    with pytest.raises(ConfigError, match=r"unknown loss; got: 'masked'; allowed: objective\.loss = masked_is, gspo, .* or"):
        LOSSES.find("masked")
