"""The seconds of an update are those of a hand count from the recipe's sizes and the assumptions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oldlogits.config.check import resolve
from oldlogits.config.load import config_from_table
from oldlogits.run.cost import estimate
from oldlogits.run.seconds import Assumptions, predict

PAPER = "recipes/paper/Qwen3-4B"
ROUND = Assumptions(
    trainer_gpus=4,
    engine_gpus=2,
    peak_tflops=1000.0,
    train_share=0.5,
    score_share=0.5,
    memory_gb=100.0,
    memory_tb_per_s=1.0,
    memory_share=0.5,
    step_overhead_ms=0.0,
    link_gb_per_s=10.0,
    episode_share=0.5,
    sampled_share=0.25,
    versions_per_episode=3.0,
)


def recipe_of(**table):
    rollout = {"prompts_per_update": 4, "group_size": 8}
    sections = {
        "model": {"path": PAPER, "forward_dtype": "bf16"},
        "env": {"max_episode_tokens": 8000},
        "engine": {"type": "vllm", "urls": ["http://127.0.0.1:8000"], "precision": "bf16", "max_num_seqs": 4},
        "rollout": rollout,
        "trainer": {"lr": 1e-6},
    }
    return resolve(config_from_table({**sections, **table}))


def predicted(assumed=ROUND, **table):
    config = recipe_of(**table)
    return predict(config, estimate(config), assumed)


@pytest.fixture(autouse=True)
def at_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


HEAD = 151_936 * 2560
MATRICES = 36 * (2560 * 128 * (2 * 32 + 2 * 8) + 3 * 2560 * 9728)
BODY = 2 * MATRICES + 4 * 36 * 32 * 128 * 4000 / 2
TOKENS = 32 * 4000


def test_gradient_and_scoring_are_operations_over_what_the_gpus_reach():
    found = predicted()
    assert found.train_s == pytest.approx(3 * TOKENS * (BODY + 0.25 * 2 * HEAD) / (4 * 0.5e15))
    assert found.forwards == 2.0  # of three versions: a third, two thirds and all of an episode
    assert found.score_s == pytest.approx(TOKENS * (2 * BODY + 0.25 * 2 * HEAD) / (4 * 0.5e15))


@pytest.mark.parametrize("variant, forwards", [("decoupled_async", 1.0), ("ppo_ewma_train_infer", 1.0), ("linear_prox", 0.0)])
def test_other_routes_read_an_episode_once_or_never(variant, forwards):
    found = predicted(variant=variant)
    assert found.forwards == forwards
    assert (found.score_s > 0) == (forwards > 0)


def test_a_dedicated_scorer_takes_no_time_of_the_trainer():
    assert predicted(proximal={"source": "dedicated"}).score_s == 0.0


def test_a_decode_step_reads_the_weights_and_half_an_episode_of_each_sequence():
    found = predicted()
    assert found.sequences == 4
    weights, context = 2 * 4_022_468_096, 2 * 2 * 36 * 8 * 128 * 2000
    assert found.engine_tokens_per_s == pytest.approx(2 * 4 / ((weights + 4 * context) / 0.5e12))
    assert found.decode_s == pytest.approx(TOKENS * 0.25 / found.engine_tokens_per_s)
    assert found.prefill_s == pytest.approx(2 * TOKENS * BODY / (2 * 0.5e15))


def test_sequences_that_memory_does_not_hold_wait():
    found = predicted(
        replace(ROUND, memory_gb=10.0), engine={"type": "vllm", "urls": ["http://127.0.0.1:8000"], "max_num_seqs": 99}
    )
    assert found.sequences == pytest.approx((9e9 - 2 * 4_022_468_096) / (2 * 2 * 36 * 8 * 128 * 2000))


def test_an_update_takes_as_long_as_the_slower_side_and_the_weights():
    found = predicted()
    assert found.update_s == pytest.approx(max(found.trainer_s, found.engines_s) + found.sync_s)
    assert found.switch_s == pytest.approx(6 * 2 * 2 * 4_022_468_096 / (4 * 0.5e12))


def test_of_a_mixture_the_experts_that_serve_a_token_count():
    found = predicted(model={"path": "recipes/paper/Qwen3-30B-A3B", "forward_dtype": "bf16"})
    active = 48 * (2048 * 128 * (2 * 32 + 2 * 4) + 3 * 2048 * 8 * 768)
    body = 2 * active + 4 * 48 * 32 * 128 * 4000 / 2
    assert found.train_s == pytest.approx(3 * TOKENS * (body + 0.25 * 2 * 151_936 * 2048) / (4 * 0.5e15))


STEP = 2 * 28 * 4_022_468_096 / (4 * 0.5e12)
"""Seconds of two optimizer steps: 4 numbers read and 3 written for each parameter, in fp32."""


def test_a_step_moves_masters_and_gradient_whole_and_moments_as_they_are_kept():
    assert predicted().optimizer_s == pytest.approx(STEP)
    small = predicted(trainer={"lr": 1e-6, "optimizer": "adamw-8bit"}).optimizer_s
    assert small == pytest.approx(STEP * (12 + 2 * (2 + 8 / 256)) / 28)
    away = predicted(trainer={"lr": 1e-6, "offload_optimizer": True}).optimizer_s
    assert away == pytest.approx(STEP + 2 * 8 * 4_022_468_096 / (4 * 10e9)), "gradient and masters cross the link"


@pytest.mark.parametrize("layout, is_bound", [("shared", True), ("packed", False), ("padded", False)])
def test_where_a_prompt_is_read_once_for_a_group_the_trainers_seconds_are_said_to_be_a_bound(layout, is_bound):
    config, found = recipe_of(trainer={"lr": 1e-6, "layout": layout}), predicted(trainer={"lr": 1e-6, "layout": layout})
    [said] = [line for line in found.lines(config, ROUND) if line.startswith("the trainer")]
    assert ("at most: what episodes share counts for each" in said) == is_bound
