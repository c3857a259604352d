"""Predictions against real runs: step times of a run's own events, and what the simulation makes of them."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulate.__main__ import cluster_tables, command, markdown
from benchmarks.simulate.cluster import PRESETS, Cluster, load_cluster, with_gpus
from benchmarks.simulate.document import BEGIN, END, marked
from benchmarks.simulate.fit import MeasuredRun, _episode, _mean_of_quantiles
from benchmarks.simulate.scenario import MeasuredWorkload, Turn
from benchmarks.simulate.validate import BARS, Bar, Comparison, compare
from oldlogits.cli.main import REFUSED, attempt
from oldlogits.core.errors import ConfigError
from oldlogits.run.run import run as run_recipe
from tests.runs import recipe

RECIPES = {
    "the trainer is the bottleneck": {
        "trainer": {"minibatches_per_update": 2},
        "rollout": {"group_size": 8, "prompts_per_update": 12},
        "env": {"latency_s": 0.02},
        "proximal": {"source": "eager"},
    },
    "the environments are": {
        "trainer": {"minibatches_per_update": 1},
        "rollout": {"group_size": 4, "prompts_per_update": 6, "max_running_groups": 4},
        "env": {"latency_s": 0.3},
    },
}


def test_the_turns_of_an_episode_are_read_off_the_positions_of_its_sampled_tokens() -> None:
    assert _episode(np.array([5, 6, 9], np.int32)) == (Turn(num_read=5, num_sampled=2), Turn(num_read=2, num_sampled=1))


def test_the_mean_of_quantiles_is_that_of_the_distribution_they_describe() -> None:
    assert _mean_of_quantiles([(0.0, 0.0), (50.0, 100.0)]) == pytest.approx(2.0)  # exponential of mean 2
    assert _mean_of_quantiles([(0.0, 3.0), (1.0, 3.0)]) == pytest.approx(3.0)
    points = ((0.0, 0.1), (math.log(2), 0.5), (math.log(10), 0.7), (math.log(100), 4.0))
    workload, rng = MeasuredWorkload(groups=(), gaps_s={"gap": points}), random.Random(0)
    drawn = [workload.draw_gap_s("gap", rng) for _ in range(40_000)]
    assert np.mean(drawn) == pytest.approx(_mean_of_quantiles(points), rel=0.02)
    assert np.percentile(drawn, [50, 90]) == pytest.approx([0.5, 0.7], rel=0.03)


@pytest.mark.parametrize(
    ("kind", "predicted", "passes"),
    [("relative", 11.4, True), ("relative", 8.4, False), ("absolute", 10.14, True), ("absolute", 10.16, False)],
)
def test_a_bar_is_relative_or_absolute(kind, predicted, passes) -> None:
    row = Comparison(name="x", predicted=predicted, low=0, high=0, measured=10.0, bar=Bar(kind=kind, allowed=0.15))
    assert row.passes is passes


def test_step_times_of_a_cluster_are_the_arithmetic_of_the_page() -> None:
    """4.02 B on 64 GPUs: 48 engines of one GPU, 16 to train. A bf16 copy is 8.04 GB."""
    cluster = with_gpus(PRESETS["4b"], 64)
    scenario = cluster.scenario("snapshot")
    assert (scenario.num_engines, cluster.num_learning_gpus("snapshot")) == (48, (16, 0))
    assert cluster.num_learning_gpus("dedicated") == (13, 3)
    assert scenario.trainer.read_s == pytest.approx(2 * 4.02e9 / (989e12 * 0.45 * 16))
    assert scenario.trainer.token_s == pytest.approx(8 * 4.02e9 / (989e12 * 0.4 * 16))
    assert scenario.engine.step_s == pytest.approx(0.004 + 8.04e9 / (3.35e12 * 0.6))
    assert scenario.engine.context_s == pytest.approx(2 * 2 * 36 * 8 * 128 / (3.35e12 * 0.6))
    assert scenario.load_s == pytest.approx(0.01 * 8.04e9 / 50e9 + 8.04e9 / 80e9 + 8.04e9 / 25e9)
    assert cluster.store_bytes == pytest.approx((1 + 5 * 0.01) * 8.04e9)  # staleness 4: the new version and 5 older ones
    assert scenario.trainer.checkout_s == pytest.approx(8.04e9 / (16 * 25e9) + 8.04e9 / (2 * 80e9))
    assert scenario.trainer.publish_s == pytest.approx(8.04e9 / (16 * 25e9) + 2.4 * 8.04e9 / (2 * 80e9))


def test_a_cluster_is_a_preset_or_the_keys_of_a_file() -> None:
    assert load_cluster("30b-a3b").model.active_parameters == 3.3e9
    assert load_cluster("x", {"layout": {"num_gpus": 16}}).layout.num_gpus == 16
    with pytest.raises(ConfigError, match="num_gpu"):
        load_cluster("x", {"layout": {"num_gpu": 16}})
    with pytest.raises(ConfigError, match="4b, 30b-a3b"):
        load_cluster("5b")
    with pytest.raises(ConfigError, match="too small"):
        with_gpus(Cluster(), 1).scenario("snapshot")
    with pytest.raises(ConfigError, match="unknown route"):
        Cluster().scenario("nothing")


@pytest.mark.slow
def test_the_command_makes_the_tables_of_a_document_anew(capsys, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("num_updates = 4\n[layout]\nnum_gpus = 8\n[rollout]\ngroups_per_gpu = 0.25\n")
    words = [str(tmp_path / "small.toml"), "--gpus", "8", "16", "--routes", "none", "--num-seeds", "1"]
    document = tmp_path / "page.md"
    document.write_text(f"before\n\n{BEGIN}{' '.join(words)} -->\nold figures\n{END}\n\nafter\n")
    assert attempt(command, [str(document)]) == 0
    text = document.read_text()
    assert (text[:7], text[-7:]) == ("before\n", "\nafter\n")
    assert "old figures" not in text
    lines = text.splitlines()
    assert "| 8 | a copy | 8.04 GB | 8.04 GB | 0.48 | 6 | 48.24 GB | 24.12 GB |" in lines
    assert sum(line.startswith(("| 8 | none | 6, 2, 0", "| 16 | none | 12, 4, 0")) for line in lines) == 2
    assert attempt(command, words) == 0
    assert "6, 2, 0" in capsys.readouterr().out
    document.write_text("no marks")
    assert attempt(command, [str(document)]) == REFUSED


def test_the_bytes_in_the_page_are_those_that_the_command_gives() -> None:
    blocks = marked((Path(__file__).parents[1] / "scale.md").read_text(encoding="utf-8"))
    assert blocks
    for words, block in blocks:
        assert block.strip().startswith(markdown(next(cluster_tables(words))))


def test_what_is_no_run_folder_is_refused(capsys, tmp_path: Path) -> None:
    assert attempt(command, [str(tmp_path)]) == REFUSED
    assert "no run folder" in capsys.readouterr().err
    assert attempt(command, ["5b"]) == REFUSED
    assert attempt(command, []) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_predicted_from_its_own_step_times(tmp_path: Path, tiny_folder: Path, name: str) -> None:
    config = recipe(tiny_folder, num_updates=24, runtime={"type": "local"}, **RECIPES[name])
    assert run_recipe(config, tmp_path / "run").error is None
    rows = compare(MeasuredRun.read(tmp_path / "run"))
    judged = {row.name: row for row in rows if row.passes is not None}
    assert judged.keys() == BARS.keys()
    speed, staleness = judged["trajectories_per_s"], judged["staleness_mean"]
    assert 0.5 < speed.predicted / speed.measured < 2, "the bars are for quiet machines: scale.md"
    assert 0.5 < staleness.predicted / staleness.measured < 2
