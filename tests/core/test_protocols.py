import math

import pytest

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.errors import ConfigError, MissingLogprobError, TrajectoryError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": NAN},
        {"temperature": INF},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": NAN},
        {"top_k": -1},
    ],
)
def test_sampling_refuses_values_out_of_range(wrong):
    with pytest.raises(ConfigError, match="sampling parameters out of range"):
        Sampling(**{"max_tokens": 1} | wrong)


@pytest.mark.parametrize("right", [{"temperature": 0.0}, {"top_p": 1e-3}, {"top_k": 0}, {"top_k": 5}])
def test_sampling_accepts_the_ends_of_its_ranges(right):
    assert [getattr(Sampling(max_tokens=1, **right), name) for name in right] == list(right.values())


@pytest.mark.parametrize("logprobs", [(), (-1.0,), (-1.0, -1.0, -1.0)])
def test_an_engine_that_returns_tokens_without_log_probs_is_refused_with_a_remedy(logprobs):
    spans = (Span(version=0, start=0, end=2),)
    Generation(output_ids=(5, 6), logprobs=(-1.0, -2.0), spans=spans, finish_reason="stop")
    with pytest.raises(MissingLogprobError, match=f"2 tokens, {len(logprobs)} log-probs; .*; fix: ask the engine"):
        Generation(output_ids=(5, 6), logprobs=logprobs, spans=spans, finish_reason="stop")


@pytest.mark.parametrize("edges", [[], [(0, 1)], [(1, 2)], [(0, 1), (1, 1), (1, 2)], [(0, 2), (1, 2)]])
def test_an_engine_that_returns_tokens_without_a_version_is_refused(edges):
    spans = tuple(Span(version=0, start=start, end=end) for start, end in edges)
    with pytest.raises(TrajectoryError, match="tokens without a version"):
        Generation(output_ids=(5, 6), logprobs=(-1.0, -2.0), spans=spans, finish_reason="stop")
