import math

import pytest

from oldlogits.core.errors import ConfigError
from oldlogits.core.protocols import Sampling

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
