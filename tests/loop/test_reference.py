"""A reference that is a version of the store: what it costs an episode, how long it is kept, and that a run goes on with it."""

import math
import shutil
import statistics

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.cli.main import run as command
from oldlogits.core.errors import ConfigError, MissingLogprobError, VersionEvictedError
from oldlogits.loop.reference import penalties_of
from oldlogits.run.cost import estimate
from oldlogits.run.seconds import Assumptions, predict
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer

from ..builders import batch_of, sampled, trajectory
from ..runs import Words, assert_same_state, check_accounting, events_of, recipe, write_recipe
from ..train.test_trainer import PROBE, all_tokens, batch_at, old_of


class Numbered(Words):
    """Each answered turn is worth its number, beside the reward of the end."""

    def reset(self, start):
        self._answered = 0
        return super().reset(start)

    def get_turn_reward(self):
        self._answered += 1
        return float(self._answered)


ALL = {
    "objective": {
        "kl_coefficient": 0.05,
        "kl_estimator": "k2",
        "kl_reference_every": 3,
        "entropy_bonus": 0.01,
        "advantage": "token-normalised",
    },
    "engine": {"precision": "fp8"},
}


def metrics_of(run, name):
    return [event.metrics[name] for event in events_of(run, "update")]


def episodes_of(run, version):
    """The trajectories of an update: reward, advantage, largest staleness, and the sum of log mu - log proximal."""
    found = {}
    for row in pq.read_table(run / f"tokens/v{version:06d}.parquet").to_pylist():
        one = found.setdefault(row["trajectory"], {"group": row["trajectory"].partition(".")[0], "k1": 0.0, "staleness": 0})
        one |= {"reward": row["reward"], "advantage": row["advantage"]}
        one["k1"] += row["logp_mu"] - row["logp_proximal"]
        one["staleness"] = max(one["staleness"], row["staleness"])
    return list(found.values())


def group_means(episodes, values):
    """The mean of each episode's group."""
    groups = [one["group"] for one in episodes]
    return [statistics.mean(v for v, of in zip(values, groups, strict=True) if of == group) for group in groups]


def test_a_trajectorys_penalty_is_the_sum_of_its_tokens_log_ratios():
    made = [
        trajectory([3], sampled([4, 5], logp=[-1.0, -2.0]), [6], sampled([7], logp=[-0.5]), id="g0.0"),
        trajectory([3], sampled([4], logp=[-3.0]), id="g0.1"),
    ]
    reference = np.array([-1.5, -1.75, -math.inf, -1.0], np.float32)
    found = penalties_of(batch_of(made, [0.0, 0.0]), reference, 0.5)
    assert found.tolist() == [0.5 * ((-1.0 + 1.5) + (-2.0 + 1.75)), 0.5 * (-3.0 + 1.0)]
    assert found.dtype == np.float64


def train(trainer, version):
    """Publish, score and train one batch."""
    trainer.publish()
    trainer.put_batch(batch := batch_at(version))
    trainer.score_reference()
    return trainer.train(old_of(trainer, batch))


@pytest.fixture
def referring(tiny_folder):
    config = recipe(tiny_folder, objective={"kl_coefficient": 0.1, "kl_reference_every": 3}, variant="decoupled_exact")
    return Trainer(trainer_spec(config), tiny_folder, PROBE)


def test_the_reference_scores_every_batch_with_the_bits_that_it_was_published_with(referring):
    """It moves on at versions 3 and 6; what it gives some tokens is what the live weights gave them at its own version."""
    batch, lived, held = batch_at(0), {}, []
    for version in range(8):
        referring.publish()
        referring.retain(version)
        held.append(referring.stored_versions)
        referring.put_batch(batch)
        lived[version] = referring.scorer.score(all_tokens(batch), None)
        assert referring.score_reference().tolist() == lived[version // 3 * 3].tolist()
        assert referring.state().oldest_version == (version - 1 if version % 3 == 1 else version)
        train(referring, version)
    assert held == [(0,), (0, 1), (0, 2), (3,), (3, 4), (3, 5), (6,), (6, 7)]
    assert len({tuple(found.tolist()) for found in lived.values()}) == 8, "the weights move, or nothing was tested"


def test_a_batch_that_it_has_not_scored_is_refused(referring):
    referring.publish()
    referring.put_batch(batch := batch_at(0))
    with pytest.raises(MissingLogprobError, match="a reference"):
        referring.train(old_of(referring, batch))


def test_what_it_scored_is_of_this_batch_alone(referring):
    referring.publish()
    referring.put_batch(batch_at(0))
    referring.score_reference()
    advantages = np.array([0.5, -0.5, 2.0, -2.0], np.float32)
    referring.scorer.put_advantages(advantages)
    assert referring.scorer.current_batch().logp_reference is not None
    assert referring.scorer.current_batch().advantages.tolist() == advantages.tolist()
    referring.put_batch(batch_at(0))
    assert referring.scorer.current_batch().logp_reference is None


def test_a_checkpoint_has_the_reference_and_one_of_other_ranks_is_refused_when_it_is_asked_for(
    referring, tiny_folder, tmp_path
):
    for version in range(2):
        train(referring, version)
        referring.publish()
        referring.retain(referring.version)
    referring.put_batch(batch_at(2))
    expected = referring.score_reference()
    (tmp_path / "checkpoint").mkdir()
    referring.save(tmp_path / "checkpoint")
    again = Trainer(referring._spec, tiny_folder, PROBE)
    again.restore(tmp_path / "checkpoint")
    again.publish()
    again.put_batch(batch_at(2))
    assert again.stored_versions == (0, 2)
    assert again.score_reference().tolist() == expected.tolist()
    for patch in (tmp_path / "checkpoint/state").glob("*.patch"):
        patch.rename(patch.with_name(patch.name.replace("of-00001", "of-00002")))
    other = Trainer(referring._spec, tiny_folder, PROBE)
    other.restore(tmp_path / "checkpoint")
    other.publish()
    other.put_batch(batch_at(2))
    with pytest.raises(VersionEvictedError, match="version 0 is not in the store"):
        other.score_reference()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"variant": "ppo_clip_train_infer", "proximal": {"source": "none"}}])
def test_a_run_with_every_term_goes_on_from_a_checkpoint_bit_for_bit(keys, tiny_folder, tmp_path):
    """Version 0, 3 and 6 are the reference in turn; the checkpoint of version 4 is older than the reference's next move."""
    out, record = tmp_path / "run", {"checkpoint_every": 2, "keep_checkpoints": 9}
    config = recipe(tiny_folder, num_updates=7, record=record, **ALL, **keys)
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)]) == 0
    assert metrics_of(out, "kl/ref_age") == [0, 1, 2, 0, 1, 2, 0]
    assert all(value > 0 for value in metrics_of(out, "kl/theta_ref_k3"))
    last = shutil.move(out / "checkpoints/v000007", tmp_path / "last")
    shutil.rmtree(out / "checkpoints/v000006")
    before = [pq.read_table(out / f"tokens/v{version:06d}.parquet").to_pydict() for version in range(1, 8)]
    assert command(["train", "--resume", str(out)]) == 0
    for version, table in enumerate(before, start=1):
        assert pq.read_table(out / f"tokens/v{version:06d}.parquet").to_pydict() == table, f"update {version}"
    assert_same_state(out / "checkpoints/v000007/state", last / "state")
    check_accounting(out)


@pytest.mark.slow
def test_in_the_reward_advantages_are_those_of_rewards_less_the_divergence(tiny_folder, tmp_path):
    """In the first update every token's OLD is the reference, version 0."""
    out, coefficient = tmp_path / "run", 0.5
    objective = {"kl_coefficient": coefficient, "kl_in": "reward", "advantage": "mean-only"}
    config = recipe(tiny_folder, num_updates=2, objective=objective, engine={"precision": "int4"})
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)]) == 0
    episodes = episodes_of(out, 1)
    assert {one["staleness"] for one in episodes} == {0}
    less = [one["reward"] - coefficient * one["k1"] for one in episodes]
    expected = [own - mean for own, mean in zip(less, group_means(episodes, less), strict=True)]
    plain = [one["reward"] for one in episodes]
    plain = [own - mean for own, mean in zip(plain, group_means(episodes, plain), strict=True)]
    np.testing.assert_allclose([one["advantage"] for one in episodes], expected, rtol=0, atol=2e-5)
    assert np.abs(np.subtract(expected, plain)).max() > 1e-3, "the engine's noise is a divergence, or nothing was tested"
    penalty = coefficient * sum(one["k1"] for one in episodes) / len(episodes)
    assert metrics_of(out, "reward/kl_penalty")[0] == pytest.approx(penalty, abs=2e-5)


def test_a_dry_run_says_what_a_reference_costs(tiny_folder):
    plain, kept = recipe(tiny_folder), recipe(tiny_folder, objective={"kl_coefficient": 0.1})
    before, cost = estimate(plain), estimate(kept)
    assert cost.store_bytes - before.store_bytes == cost.reference_bytes == cost.version_bytes
    assert cost.expected_store_bytes - before.expected_store_bytes == cost.version_bytes
    assert any("scored once more" in line for line in cost.lines())
    assert not any("scored once more" in line for line in before.lines())
    without = {"variant": "ppo_clip_train_infer", "proximal": {"source": "none"}}
    alone = estimate(recipe(tiny_folder, objective={"kl_coefficient": 0.1}, **without))
    assert alone.store_bytes == 3 * alone.version_bytes
    machine = Assumptions(trainer_gpus=1)
    assert predict(kept, cost, machine).forwards == predict(plain, before, machine).forwards + 1
    assert predict(kept, cost, machine).score_s > predict(plain, before, machine).score_s


REFUSED = {
    "k1 in the loss": ({"kl_coefficient": 0.1, "kl_estimator": "k1"}, "gradient of k1 in the loss is 0"),
    "k3 in the reward": ({"kl_coefficient": 0.1, "kl_estimator": "k3", "kl_in": "reward"}, "k3 in the reward"),
    "a place without a reference": ({"kl_in": "reward"}, "no reference"),
    "a move without a reference": ({"kl_reference_every": 3}, "no reference"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_terms_that_would_do_nothing_or_something_else_are_refused(name, tiny_folder):
    objective, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        recipe(tiny_folder, objective=objective)


@pytest.mark.parametrize(
    ("rollout", "objective", "message"),
    [
        ({"group_size": 1, "min_group_size": 1}, {}, "compares a group's members"),
        ({"min_group_size": 1}, {"advantage": "batch-normalised"}, "compares a group's members"),
        ({"group_size": 1, "min_group_size": 1, "filter_uniform": True}, {"advantage": "batch-baseline"}, "all equal"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(rollout, objective, message, tiny_folder):
    with pytest.raises(ConfigError, match=message):
        recipe(tiny_folder, rollout={"prompts_per_update": 12, **rollout}, objective=objective)


def test_a_kernel_that_gives_no_entropies_is_refused_beside_a_bonus(tiny_folder):
    with pytest.raises(ConfigError, match="no entropies"):
        recipe(tiny_folder, trainer={"head_kernel": "liger", "device": "cuda"}, objective={"entropy_bonus": 0.01})


@pytest.mark.slow
def test_tasks_that_are_played_once_are_trained_against_the_batch(tiny_folder, tmp_path):
    rollout = {"group_size": 1, "min_group_size": 1, "prompts_per_update": 8}
    config = recipe(tiny_folder, num_updates=2, rollout=rollout, objective={"advantage": "batch-baseline"})
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(tmp_path / "run")]) == 0
    episodes = episodes_of(tmp_path / "run", 1)
    rewards = [one["reward"] for one in episodes]
    assert len(rewards) == 8
    expected = [(r - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-6) for r in rewards]
    np.testing.assert_allclose([one["advantage"] for one in episodes], expected, rtol=1e-5, atol=1e-6)
    assert check_accounting(tmp_path / "run")["trained"] == 16


@pytest.mark.slow
def test_rewards_of_turns_reach_the_tokens_of_their_own_turn_and_of_those_before(tiny_folder, tmp_path):
    """Turn k, from 0, was given k + 1: what is left of the reward from it on is the reward less k (k + 1) / 2."""
    env = {"target": f"{__name__}:Numbered", "max_episode_tokens": 96, "max_tokens_per_turn": 12, "max_turns": 4}
    objective = {"advantage": "turn-to-go", "kl_coefficient": 0.01, "entropy_bonus": 0.01}
    config = recipe(tiny_folder, num_updates=2, env=env, objective=objective)
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(tmp_path / "run")]) == 0
    rows = pq.read_table(tmp_path / "run/tokens/v000001.parquet").to_pylist()
    turns, last = {}, {}
    for row in rows:
        name, index = row["trajectory"], row["index"]
        turns[name] = turns.get(name, -1) + (index != last.get(name, -2) + 1)
        last[name] = index
        k = row["turn"] = turns[name]
        row["to_go"], row["group"] = row["reward"] - k * (k + 1) / 2, name.partition(".")[0]
    assert max(turns.values()) > 0
    for row in rows:
        alike = {one["trajectory"]: one["to_go"] for one in rows if (one["group"], one["turn"]) == (row["group"], row["turn"])}
        assert row["advantage"] == pytest.approx(row["to_go"] - statistics.mean(alike.values()), abs=1e-5)
    differing = {name: {row["advantage"] for row in rows if row["trajectory"] == name} for name in turns}
    assert any(len(found) > 1 for found in differing.values())
