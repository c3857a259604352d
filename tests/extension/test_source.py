"""A source in one file from outside, in a whole run beside the built-in one that it must agree with."""

import numpy as np
import pytest

from oldlogits.core.errors import ConfigError, MissingPolicyError
from oldlogits.core.source import SOURCES, check_source
from oldlogits.run.run import run

from ..runs import events_of, recipe, tokens_of
from .own_source import SmallSteps

NAME = f"{SmallSteps.__module__}:SmallSteps"
COLUMNS = ("token_id", "staleness", "provenance", "logp_mu", "logp_proximal", "logp_theta")


@pytest.mark.slow
def test_a_run_is_fed_by_it_with_the_exact_old_log_probs_of_every_token(tiny_folder, tmp_path):
    tokens = {}
    for source in (NAME, "snapshot"):
        out = tmp_path / source.partition(":")[0]
        assert run(recipe(tiny_folder, proximal={"source": source}), out).error is None
        tokens[source] = tokens_of(out, *COLUMNS)
    own, snapshot = tokens[NAME], tokens["snapshot"]
    assert set(own["provenance"]) == {"exact"}
    assert np.abs(own["logp_proximal"] - own["logp_mu"]).max() <= 1e-4, "an fp32 engine at the token's own version"
    stale = own["staleness"] > 0
    assert np.abs(own["logp_proximal"] - own["logp_theta"])[stale].max() > 1e-2
    first = len(own["token_id"]) // 4  # the first update; later ones may round otherwise
    np.testing.assert_array_equal(own["token_id"][:first], snapshot["token_id"][:first])
    np.testing.assert_allclose(own["logp_proximal"][:first], snapshot["logp_proximal"][:first], rtol=0, atol=1e-5)
    updates = events_of(tmp_path / NAME.partition(":")[0], "update")
    counts = [event.metrics["source/num_calls"] for event in updates]
    assert counts == sorted(set(counts))
    assert counts[0] >= 3


def test_what_it_provides_is_checked_as_for_a_built_in_one():
    check_source("decoupled_exact", NAME)
    with pytest.raises(MissingPolicyError, match=r"needs log-probs of ASYNC, but source '.*:SmallSteps' provides OLD"):
        check_source("decoupled_async", NAME)
    with pytest.raises(ConfigError, match="is no source; got: check_source without provides, acquire"):
        SOURCES.find("oldlogits.core.source:check_source")


def test_what_differs_is_an_attribute_with_a_default():
    source = SOURCES.find(NAME)
    assert source.most_stored(4) == 6
    assert not any((source.needs_scorer, source.needs_pause, source.needs_partials, source.keeps_average))
