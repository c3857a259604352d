"""A sequence-level loss in one file from outside, against scalars in float64 and in whole runs."""

import math
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import LOSSES, LossInputs, Objective
from oldlogits.core.policies import OLD, THETA, VARIANTS
from oldlogits.record.events import Audited
from oldlogits.run.run import run

from ..runs import events_of, recipe
from .own_loss import gspo

NAME = f"{gspo.__module__}:gspo"
EPS_LOW, EPS_HIGH = 0.01, 0.02
KNOBS = Objective(variant=VARIANTS["ppo_clip"], eps_low=EPS_LOW, eps_high=EPS_HIGH)


def oracle(sequences):
    """By sequence of (old, theta, advantage): the ratio, whether it is clipped, the surrogate and its gradient by token."""
    found = []
    for old, theta, advantage in sequences:
        n = len(theta)
        s = math.prod(math.exp(t - o) for t, o in zip(theta, old, strict=True)) ** (1 / n)
        clipped = s > 1 + EPS_HIGH if advantage > 0 else s < 1 - EPS_LOW if advantage < 0 else False
        bounded = min(s, 1 + EPS_HIGH) if advantage > 0 else max(s, 1 - EPS_LOW)
        # each of the n tokens has the value A s, and s moves by s / n with each log-prob
        found.append((s, clipped, advantage * (bounded if advantage else s), 0.0 if clipped else advantage * s))
    return found


logs = st.floats(-3, -0.1)
one_sequence = st.lists(st.tuples(logs, st.floats(-0.2, 0.2)), min_size=1, max_size=5)


@pytest.mark.slow
@given(st.lists(st.tuples(one_sequence, st.sampled_from([-1.5, 0.0, 1.0])), min_size=1, max_size=4), st.randoms())
def test_the_loss_is_the_clipped_geometric_mean_ratio_of_each_sequence_whatever_the_order_of_their_tokens(found, rng):
    sequences = [([old for old, _ in part], [old + d for old, d in part], advantage) for part, advantage in found]
    expected = oracle(sequences)
    if any(abs(s - bound) < 1e-9 for s, *_ in expected for bound in (1 + EPS_HIGH, 1 - EPS_LOW)):
        return  # rounding decides
    tokens = [(i, o, t, a) for i, (old, theta, a) in enumerate(sequences) for o, t in zip(old, theta, strict=True)]
    rng.shuffle(tokens)
    index, old, theta, advantages = (list(column) for column in zip(*tokens, strict=True))
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        logp={OLD: torch.tensor(old, dtype=torch.float64), THETA: theta},
        advantages=torch.tensor(advantages, dtype=torch.float64),
        loss_mask=torch.ones(len(index), dtype=torch.bool),
        staleness=torch.zeros(len(index), dtype=torch.int64),
        sequence_index=torch.tensor(index),
        num_sequences=len(sequences) + 1,  # another one is in another micro-batch
    )
    terms = LOSSES.find(NAME)(inputs, KNOBS)
    terms.values.sum().backward()
    for token, i in enumerate(index):
        s, clipped, value, gradient = expected[i]
        assert terms.log_r_s[token].item() == pytest.approx(math.log(s), abs=1e-12)
        assert bool(terms.clip_mask[token]) is not clipped
        assert terms.values[token].item() == pytest.approx(value, abs=1e-12)
        assert theta.grad[token].item() == pytest.approx(gradient, abs=1e-12)


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """Two runs that differ in the size of their micro-batches: one sequence at a time, and all at once."""
    folders = {}
    for budget in (8, 8192):
        folders[budget] = tmp_path_factory.mktemp("gspo") / "run"
        config = recipe(
            tiny_folder,
            variant="ppo_clip",
            num_updates=2,
            objective={"loss": NAME, "eps_low": EPS_LOW, "eps_high": EPS_HIGH},
            trainer={"minibatches_per_update": 1, "micro_batch_tokens": budget},
            audit={"share": 1.0},
        )
        assert run(config, folders[budget]).error is None
    return folders


def table_of(folder, version):
    table = pq.read_table(folder / "tokens" / f"v{version:06d}.parquet")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


@pytest.mark.slow
def test_a_run_trains_with_it_and_its_numbers_are_those_of_the_formula(trained):
    clipped = 0
    for event in events_of(trained[8192], "update"):
        table, metrics = table_of(trained[8192], event.version), event.metrics
        rows = defaultdict(list)
        for row, name in enumerate(table["trajectory"]):
            rows[name].append(row)
        parts = [
            (
                table["logp_proximal"][own].astype(float),
                table["logp_theta"][own].astype(float),
                float(table["advantage"][own[0]]),
            )
            for own in rows.values()
        ]
        expected = oracle(parts)
        for own, (s, is_clipped, _, _) in zip(rows.values(), expected, strict=True):
            np.testing.assert_allclose(table["log_r_s"][own], math.log(s), rtol=0, atol=1e-6)
            assert (table["active_mask"][own] == (not is_clipped)).all()
        num = len(table["trajectory"])
        loss = -sum(value * len(own) for own, (_, _, value, _) in zip(rows.values(), expected, strict=True)) / num
        assert metrics["loss/value"] == pytest.approx(loss, abs=1e-6)
        clipped += sum(len(own) for own, one in zip(rows.values(), expected, strict=True) if one[1])
        kept = 1 - sum(len(own) for own, one in zip(rows.values(), expected, strict=True) if one[1]) / num
        assert metrics["mask/rho"] == pytest.approx(kept)
    assert clipped > 0, "a clip that never acts proves nothing"


def test_its_numbers_do_not_depend_on_the_size_of_micro_batches_since_no_sequence_is_split(trained):
    small, large = (table_of(trained[budget], 1) for budget in (8, 8192))
    np.testing.assert_array_equal(small["token_id"], large["token_id"])
    np.testing.assert_allclose(small["log_r_s"], large["log_r_s"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(small["clip_mask"], large["clip_mask"])


def test_the_audit_decides_with_the_same_loss(trained):
    audits = [event for event in events_of(trained[8192]) if isinstance(event, Audited)]
    assert len(audits) == 2
    for event in audits:
        assert sum(event.wrongly_kept) == sum(event.wrongly_masked) == 0
        assert sum(event.num_tokens) > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("masked", "unknown loss; got: 'masked'"),
        (f"{gspo.__module__}:gspp", "does not exist; got: no gspp in"),
        ("no_such_module:gspo", "cannot be imported; got: ModuleNotFoundError"),
    ],
)
def test_a_recipe_that_names_no_loss_is_refused_when_it_is_read(tiny_folder, name, message):
    with pytest.raises(ConfigError, match=message):
        recipe(tiny_folder, objective={"loss": name})


def test_knobs_that_the_built_in_loss_could_not_use_are_left_to_a_loss_from_outside(tiny_folder):
    idle = {"band": math.inf, "variant": "decoupled_exact"}
    with pytest.raises(ConfigError, match="r_d is to mask and not to weight"):
        recipe(tiny_folder, **idle, objective={"mismatch_correction": "mask"})
    assert recipe(tiny_folder, **idle, objective={"mismatch_correction": "mask", "loss": NAME}).objective.loss == NAME
