"""Decision errors against the objective of one token in plain float64 arithmetic."""

import json
import math
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.old_logits.measure.decision import PROXIMAL_POLICIES, decision_errors
from studies.old_logits.measure.trace import TraceInfo
from tests.objective.oracle import Objective, interpolate, token

BANDS = (1.05, 1.1, 1.5, 3.0)
EPS_LOW, EPS_HIGH, DUAL_CLIP, WEIGHT_MU = 0.2, 0.28, 3.0, 0.3
INFO = TraceInfo(
    variant="decoupled_exact",
    source="snapshot",
    window=8,
    lag="even",
    engine="fp8",
    seed=7,
    beta={"ewma": 0.8, "ewma-mean-lag": 0.7, "ewma-auto": 0.6},
)
RECORDED = {"arrival": "async", "ewma": "ewma", "ewma-mean-lag": "ewma-mean-lag", "ewma-auto": "ewma-auto"}
RECORDED |= {"aged": "aged", "rescore": "rescore", "mu": "mu"}
LINEAR = {"linear": "linear", "log-linear": "loglinear"}


def trace(seed: int, num_tokens: int = 300, noise: float = 0.15, far: bool = True) -> pa.Table:
    """Random log-probs; `far`: so far from every bound that float32 and float64 agree."""
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-4, -0.2, num_tokens)
    columns = {
        "update": np.zeros(num_tokens, np.int32),
        "step": np.zeros(num_tokens, np.int32),
        "staleness": rng.integers(0, 9, num_tokens).astype(np.int32),
        "advantage": rng.choice([-1.5, -0.5, 0.0, 0.7], num_tokens).astype(np.float32),
        "logp_theta": theta.astype(np.float32),
    }
    columns["logp_old"] = (theta + rng.normal(0, noise, num_tokens)).astype(np.float32)
    for name in RECORDED.values():
        columns[f"logp_{name}"] = (columns["logp_old"] + rng.normal(0, noise / 2, num_tokens)).astype(np.float32)
    table = INFO.on(pa.table(columns))
    return table.filter(pa.array([margin(row) > 1e-4 for row in table.to_pylist()])) if far else table


def tokens_of(row: dict, band: float):
    """The oracle's verdict on one token with OLD, and with each proximal policy in its place."""
    prob = {name.removeprefix("logp_"): math.exp(value) for name, value in row.items() if name.startswith("logp_")}
    mixed = interpolate(prob["mu"], prob["theta"], WEIGHT_MU)
    knobs = Objective(band=band, eps_low=EPS_LOW, eps_high=EPS_HIGH, dual_clip=DUAL_CLIP)
    proximal_policies = {"old": prob["old"]} | {name: prob[column] for name, column in RECORDED.items()}
    proximal_policies |= {name: mixed[column] for name, column in LINEAR.items()}
    return {
        name: (x, token("decoupled_exact", {"mu": prob["mu"], "old": x, "theta": prob["theta"]}, row["advantage"], knobs))
        for name, x in proximal_policies.items()
    }


def margin(row: dict) -> float:
    return min(found.margin for band in BANDS for _, found in tokens_of(row, band).values())


def errors_of(table: pa.Table):
    return decision_errors(
        table,
        driver="exact",
        trace=3,
        bands=BANDS,
        eps_low=EPS_LOW,
        eps_high=EPS_HIGH,
        dual_clip=DUAL_CLIP,
        weight_mu=WEIGHT_MU,
    )


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.08, 0.3])
def test_every_figure_is_that_of_the_plain_arithmetic(noise):
    table = trace(0, noise=noise)
    rows = table.to_pylist()
    found = errors_of(table)
    assert [(e.band, e.proximal_policy) for e in found] == [(band, name) for band in BANDS for name in PROXIMAL_POLICIES]
    num_nonzero = sum(row["advantage"] != 0 for row in rows)
    assert 0 < num_nonzero < len(rows)
    seen = set()
    for e in found:
        kept = masked = kept_nonzero = masked_nonzero = 0
        weight = weight_kept = weight_masked = log_error = 0.0
        for row in rows:
            verdicts = tokens_of(row, e.band)
            (old, exact), (x, proximal_policy) = verdicts["old"], verdicts[e.proximal_policy]
            here = math.exp(row["logp_theta"] - row["logp_mu"]) * abs(row["advantage"])
            log_error += abs(math.log(x / old))
            weight += here * exact.active
            if proximal_policy.active and not exact.active:
                kept, kept_nonzero, weight_kept = kept + 1, kept_nonzero + (row["advantage"] != 0), weight_kept + here
            if exact.active and not proximal_policy.active:
                masked, masked_nonzero = masked + 1, masked_nonzero + (row["advantage"] != 0)
                weight_masked += here
        seen |= {("kept", kept > 0), ("masked", masked > 0)}
        n = len(rows)
        assert (e.num_tokens, e.num_nonzero) == (n, num_nonzero)
        assert e.log_error == pytest.approx(log_error / n, rel=1e-4)
        assert (e.wrongly_kept, e.wrongly_masked) == pytest.approx((kept / n, masked / n))
        assert e.by_count == pytest.approx((kept + masked) / n)
        assert e.wrongly_kept_nonzero == pytest.approx(kept_nonzero / num_nonzero)
        assert e.wrongly_masked_nonzero == pytest.approx(masked_nonzero / num_nonzero)
        assert (e.by_weight_kept, e.by_weight_masked) == pytest.approx((weight_kept / weight, weight_masked / weight), rel=1e-5)
        assert e.by_weight == pytest.approx((weight_kept + weight_masked) / weight, rel=1e-5)
        assert e.staleness == pytest.approx(np.mean(table.column("staleness").to_numpy()))
    assert {("kept", True), ("masked", True)} <= seen


@pytest.mark.slow
@settings(max_examples=25)
@given(seed=st.integers(0, 50), name=st.sampled_from(["arrival", "ewma", "aged", "rescore"]))
def test_exact_against_itself_is_0(seed, name):
    table = trace(seed, num_tokens=20, far=False)
    column = f"logp_{RECORDED[name]}"
    same = table.set_column(table.column_names.index(column), column, table.column("logp_old"))
    for e in errors_of(same):
        if e.proximal_policy == name:
            shares = [value for key, value in asdict(e).items() if key.startswith(("by_", "wrongly_", "log_"))]
            assert shares == [0.0] * 9


def test_rows_say_what_they_are_of_and_survive_parquet_and_json(tmp_path):
    table = trace(1, num_tokens=50)
    pq.write_table(table, tmp_path / "trace.parquet")
    found = errors_of(pq.read_table(tmp_path / "trace.parquet"))
    assert found == errors_of(table)
    assert {(e.window, e.lag, e.engine, e.driver, e.trace, e.seed) for e in found} == {(8, "even", "fp8", "exact", 3, 7)}
    betas = {e.proximal_policy: e.beta for e in found}
    assert betas == dict.fromkeys(PROXIMAL_POLICIES) | INFO.beta | {"aged": 0.8}
    assert json.loads(json.dumps(asdict(found[0]), allow_nan=False)) == asdict(found[0])


def test_a_trace_without_advantages_has_no_weight_and_no_error_by_weight():
    table = trace(2, num_tokens=100)
    i = table.column_names.index("advantage")
    flat = table.set_column(i, "advantage", pa.array(np.zeros(len(table), np.float32)))
    found = errors_of(flat)
    assert {(e.by_weight, e.num_nonzero, e.wrongly_kept_nonzero) for e in found} == {(0.0, 0, 0.0)}
    assert max(e.by_count for e in found) > 0  # the band acts whatever the advantage
