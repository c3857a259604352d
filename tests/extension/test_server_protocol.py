"""A server protocol that is registered by its import path: the run starts such servers, trains on them, and ends them."""

import numpy as np
import pytest

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError
from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe, tokens_of

NAME = "tests.extension.own_protocol:OwnProtocol"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", ["snapshot", "interruption"])
def test_a_run_starts_two_servers_of_a_protocol_of_ones_own_and_trains_on_exact_old_logits(source, tiny_folder, tmp_path):
    engine = {"type": "vllm", "server": NAME, "num_servers": 2}
    config = recipe(tiny_folder, runtime={"type": "local"}, proximal={"source": source}, engine=engine)
    result = run(config, tmp_path / "run")
    assert result.error is None
    probes = events_of(tmp_path / "run", "probe")
    assert [event.version for event in probes] == [0, 1, 2, 3, 4]
    assert max(event.max_abs_error for event in probes) <= 1e-4
    tokens = tokens_of(tmp_path / "run", "log_r_d", "provenance")
    assert set(tokens["provenance"]) == {"exact"}
    assert np.abs(tokens["log_r_d"]).max() <= 1e-4
    assert check_accounting(tmp_path / "run")["trained"] == 4 * 3 * 4
    assert not events_of(tmp_path / "run", "server_down")


def test_numerics_that_its_servers_are_not_started_with_are_refused():
    with pytest.raises(ConfigError, match="own_protocol:OwnProtocol' that the run starts cannot have these numerics"):
        check(config_from_table({"engine": {"type": "vllm", "server": NAME, "precision": "int8"}}))
