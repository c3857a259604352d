from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.record.intervals import paired_gain, wilson
from oldlogits.record.jsonl import RecordError
from oldlogits.record.summary import Summary

Z = 1.959963984540054


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(counts):
    # Independent oracle: the bounds are the p0 at which |p - p0| = z sqrt(p0 (1 - p0) / n).
    successes, n = counts
    interval = wilson(successes, n)
    p = successes / n
    for bound in (interval.low, interval.high):
        assert abs(p - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)
    assert 0 <= interval.low <= p <= interval.high <= 1
    assert interval.low < interval.high


def test_wilson_agrees_with_a_published_example():
    # Agresti & Coull 1998, 0 successes of 10: [0, 0.278] to three digits.
    interval = wilson(0, 10)
    assert (interval.low, round(interval.high, 3), interval.num_episodes) == (0.0, 0.278, 10)


@pytest.mark.parametrize("counts", [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_rate(counts):
    with pytest.raises(RecordError):
        wilson(*counts)


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=60))
def test_the_paired_gain_is_the_normal_interval_of_the_differences(pairs):
    before, after = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    gain = paired_gain(list(before), list(after))
    half = Z * np.std(after - before, ddof=1) / np.sqrt(len(before))
    assert gain.mean == pytest.approx(np.mean(after - before), abs=1e-9)
    assert gain.high - gain.mean == pytest.approx(half, abs=1e-9)
    assert gain.mean - gain.low == pytest.approx(half, abs=1e-9)


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, 50)
    gain = paired_gain(list(difficulty), list(difficulty + rng.normal(1, 0.1, 50)))
    assert 0.9 < gain.low < gain.high < 1.1


def test_one_pair_has_no_finite_interval():
    gain = paired_gain([0.0], [1.0])
    assert (gain.mean, gain.low, gain.high) == (1.0, -math.inf, math.inf)


@pytest.mark.parametrize("lists", [([], []), ([1.0], [1.0, 2.0])])
def test_a_gain_needs_the_same_episodes(lists):
    with pytest.raises(RecordError, match="same episodes"):
        paired_gain(*lists)


def test_a_summary_is_read_back_equal_and_is_strict_json(fake_run, tmp_path: Path):
    summary = Summary.read(fake_run(2) / "summary.json")
    odd = replace(summary, gain=paired_gain([0.0], [1.0]), success_after=None, log_r_d_max_abs=math.inf, ended="interrupted")
    path = tmp_path / "summary.json"
    odd.write(path)
    assert Summary.read(path) == odd
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert list(found) == [field.name for field in fields(Summary)]
    assert (found["gain"]["high"], found["success_after"]) == ("inf", None)


def test_a_file_with_other_keys_is_no_summary(tmp_path: Path):
    (tmp_path / "summary.json").write_text('{"success_before": null}')
    with pytest.raises(RecordError, match="is no summary"):
        Summary.read(tmp_path / "summary.json")
