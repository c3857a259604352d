"""A run that is replayed under its own recipe is the same run, bit for bit, whatever route its old logits took."""

import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from oldlogits.cli.main import run as command
from oldlogits.run.run import run

from ..runs import events_of, recipe
from .runs import recorded, replayed

pytestmark = pytest.mark.slow

BF16 = {"trainer": {"compute": "bf16", "lr": 1e-2, "warmup_steps": 0}}
STALE = {"engine": {"kv": "stale", "max_num_seqs": 32}, "proximal": {"accept_mixed_kv": True}}
TERMS = {
    "kl_coefficient": 0.05,
    "kl_estimator": "k2",
    "kl_reference_every": 3,
    "entropy_bonus": 0.01,
    "advantage": "token-normalised",
    "clip_by_lag": "inverse-sqrt",
}
IN_REWARD = {"kl_coefficient": 0.5, "kl_in": "reward", "advantage": "batch-normalised"}
RECIPES = {
    "snapshot": {},
    "terms": {"objective": TERMS, "trainer": {"lr": 1e-2, "warmup_steps": 0, "lr_by_staleness": "inverse"}},
    "terms, adapters": {"objective": TERMS, "model": {"lora_rank": 4, "lora_alpha": 8.0}},
    "terms, processes": {"objective": TERMS, "runtime": {"type": "local"}},
    "terms, bf16": {"objective": TERMS, **BF16},
    "reference in the reward": {"objective": IN_REWARD, "engine": {"precision": "int8", "max_num_seqs": 32}},
    "reference beside a source without versions": {"objective": {"kl_coefficient": 0.05}, "variant": "decoupled_async"},
    "reference beside a scorer": {"objective": {"kl_coefficient": 0.05}, "proximal": {"source": "dedicated"}},
    "eager": {"proximal": {"source": "eager"}},
    "interruption": {"proximal": {"source": "interruption"}},
    "dedicated": {"proximal": {"source": "dedicated"}},
    "async": {"variant": "decoupled_async"},
    "average": {"variant": "ppo_ewma_train_infer", "proximal": {"decay": "auto"}},
    "audited": {
        "variant": "ppo_ewma_train_infer",
        "proximal": {"decay": "audited", "reset": "audited"},
        "audit": {"share": 0.5},
    },
    "aged": {"variant": "aged_train_infer"},
    "balance": {"variant": "mis_balance"},
    "rescore": {"variant": "rescore_train_infer", "engine": {"precision": "int8", "max_num_seqs": 32}},
    "interpolated": {"variant": "loglinear_prox"},
    "truncated": {"variant": "ppo_clip_train_infer", "objective": {"clip": "truncated"}},
    "kept": {"objective": {"loss_aggregation": "token-mean-kept"}, "band": 1.1},
    "measured band": {"band": "auto", "engine": {"precision": "int8", "max_num_seqs": 32}},
    "bf16": BF16,
    "same-shape": {**BF16, "proximal": {"scoring": "same-shape"}},
    "stale": STALE,
    "tempered": {"sampling": {"temperature": 0.7}},
    "adapters": {"model": {"lora_rank": 4, "lora_alpha": 8.0}, "trainer": {"lr": 3e-2, "warmup_steps": 0}},
    "processes": {"runtime": {"type": "local"}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recorded_value_and_the_weights_are_repeated(tiny_folder, tmp_path, name):
    run_folder = recorded(tiny_folder, tmp_path / "run", **RECIPES[name])
    found = replayed(run_folder, tmp_path / "replay")
    assert found["is_same"]
    assert not found["changes"]
    assert [one["num_unlike"] for one in found["updates"]] == [0] * 4
    assert found["updates"][-1]["checkpoint_unlike"] == 0.0, "the weights in the end are those of the run"
    for one, event in zip(found["updates"], events_of(run_folder, "update"), strict=True):
        assert one["loss"] == event.metrics["loss/value"]
        assert one["gradient_norm"] == event.metrics["grad/norm"]
        assert one["num_tokens"] == sum(event.staleness_counts.values())
    for version in range(1, 5):
        tables = [pq.read_table(folder / f"tokens/v{version:06d}.parquet") for folder in (run_folder, tmp_path / "replay")]
        assert tables[0].equals(tables[1])


def test_a_replay_starts_at_a_checkpoint_and_ends_where_it_is_told(tiny_folder, tmp_path):
    run_folder = recorded(tiny_folder, tmp_path / "run")
    found = replayed(run_folder, tmp_path / "replay", "--start-at", "2", "--num-updates", "1")
    assert [(one["version"], one["num_unlike"]) for one in found["updates"]] == [(3, 0)]
    assert found["is_same"]
    assert math.isnan(float(found["updates"][0]["checkpoint_unlike"]))


def test_a_run_that_is_not_repeated_says_so_and_fails(tiny_folder, tmp_path, capsys):
    run_folder = recorded(tiny_folder, tmp_path / "run")
    path = run_folder / "tokens/v000002.parquet"
    table = pq.read_table(path)
    column = table.column("logp_theta").to_numpy().copy()
    column[3] -= 0.25
    at = table.schema.get_field_index("logp_theta")
    pq.write_table(table.set_column(at, table.schema.field(at), [column]), path)
    assert command(["replay", str(run_folder), "--out", str(tmp_path / "replay")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "did NOT give the recorded values again: 1 tokens differ, from version 2 on, THETA by up to 2.50e-01 nats" in said
    assert "round otherwise" in said
    model = str(run_folder / "checkpoints/v000004/model")
    assert command(["replay", str(run_folder), "--out", str(tmp_path / "other"), "--model.path", model]) == 1
    assert "from the first batch on: the model is not the recorded one" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_was_resumed_is_repeated_from_its_start(tiny_folder, tmp_path):
    config = recipe(tiny_folder, record={"checkpoint_every": 1})
    run(replace(config, num_updates=3), tmp_path / "run")
    assert run(config, tmp_path / "run", resume=True).summary.ended == "done"
    found = replayed(tmp_path / "run", tmp_path / "replay")
    assert found["is_same"]
    assert [one["version"] for one in found["updates"]] == [1, 2, 3, 4]


AGENT = """
import json, os, sys, urllib.request
row = json.load(sys.stdin)

def ask(messages):
    body = json.dumps({"messages": messages}).encode()
    headers = {"content-type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]

first = [{"role": "user", "content": f"w{row['start']}"}]
said = ask(first)
other = ask([{"role": "user", "content": "w1 w2"}])
ask([*first, said, {"role": "user", "content": "w3 w4"}])
words = ((said["content"] or "") + " " + (other["content"] or "")).split()
print(json.dumps({"reward": sum(word in {f"w{i}" for i in range(10)} for word in words) / max(len(words), 1)}))
"""


def test_the_branches_of_agent_programs_are_trained_as_they_were(tiny_folder, tmp_path):
    (tmp_path / "agent.py").write_text(AGENT)
    sections = {"rollout": {"group_size": 2, "prompts_per_update": 2}, "runtime": {"type": "local"}, "num_updates": 2}
    run_folder = recorded(tiny_folder, tmp_path / "run", env={"command": ["python", str(tmp_path / "agent.py")]}, **sections)
    found = replayed(run_folder, tmp_path / "replay")
    names = pq.read_table(run_folder / "tokens/v000001.parquet").column("trajectory").to_pylist()
    assert any("#1" in name for name in names)
    assert found["is_same"]
    other = replayed(run_folder, tmp_path / "other", "--trainer.minibatches-per-update", "1")
    assert not any(one["num_unlike"] for one in other["updates"])


def test_experts_that_the_trainer_chooses_are_chosen_again(tiny_moe_folder, tmp_path):
    run_folder = recorded(tiny_moe_folder, tmp_path / "run", num_updates=2)
    assert replayed(run_folder, tmp_path / "replay")["is_same"]
