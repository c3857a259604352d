"""Every name of other trainers leads to a key that exists."""

import re

import pytest

from oldlogits.config.load import _names, config_from_table, known_keys
from oldlogits.core.errors import ConfigError


@pytest.mark.parametrize("kind", ["renamed", "elsewhere"])
def test_every_other_name_leads_to_a_key_that_exists(kind):
    assert {name: key for name, key in _names(kind).items() if key not in known_keys()} == {}


def test_what_is_absent_names_keys_that_exist_only():
    for name, said in _names("absent").items():
        for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", said):
            assert key in known_keys(), name


@pytest.mark.parametrize(
    "key, meant",
    [
        ("learning_rate", "trainer.lr"),
        ("per_device_train_batch_size", "rollout.prompts_per_update"),
        ("clip_ratio_high", "objective.eps_high"),
        ("num_generations", "rollout.group_size"),
        ("kl_coef", "objective.kl_coefficient"),
        ("beta", "objective.kl_coefficient"),
    ],
)
def test_a_name_of_another_trainer_is_told_by_ours(key, meant):
    with pytest.raises(ConfigError) as caught:
        config_from_table({key: 1})
    assert meant in str(caught.value)


def test_a_dotted_name_of_another_trainer_is_told_by_ours():
    with pytest.raises(ConfigError, match=r"rollout\.group_size"):
        config_from_table({"rollout": {"n": 8}})
