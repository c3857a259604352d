"""The shipped recipes of runs are recipes that can be run, and their dry runs say what they cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oldlogits.cli.main import run
from oldlogits.config.load import known_keys, load_config
from oldlogits.core.environment import is_model_folder
from oldlogits.run.cost import estimate

RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = sorted(path.name for path in RECIPES.glob("*.toml") if not path.name.startswith("study"))
GIB = 2**30

QWEN3_4B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
}

with_servers = pytest.mark.skipif("engine.urls" not in known_keys(), reason="the recipe samples on servers")


@pytest.fixture
def at(tmp_path, monkeypatch):
    """A folder to stand in, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param(n, marks=with_servers if "gpu" in n else ()) for n in RUNS])
def test_a_dry_run_of_every_recipe_works_without_its_model_and_says_what_is_unknown(name, at, capsys):
    assert run(["train", str(RECIPES / name), "--dry-run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    config = load_config(RECIPES / name, needs_model=False)
    if not is_model_folder(config.model.path):
        assert any(line.startswith("# version store") for line in said)
    else:
        assert f"# bytes            unknown: there is no {config.model.path}/config.json" in said


@pytest.mark.parametrize("name", ["smollm2-desk.toml"])
def test_a_run_without_its_model_is_refused(name, at, capsys):
    assert run(["train", str(RECIPES / name), "--out", "run"]) == 2
    assert "model.path is no folder" in capsys.readouterr().err


@with_servers
def test_qwen3_4b_fits_two_gpus_of_80_gib_beside_its_servers(at, capsys):
    config = load_config(RECIPES / "qwen3-4b-gpu.toml", needs_model=False)
    folder = at / config.model.path
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(QWEN3_4B))
    cost = estimate(config)
    assert cost.shape.num_parameters == 4_022_468_096  # 4.0 B, embeddings included
    assert cost.optimizer_bytes == 8 * 4_022_468_096
    assert cost.version_bytes == 2 * 4_022_468_096
    assert cost.expected_store_bytes < 1.08 * cost.version_bytes
    assert cost.sync_bytes < 0.02 * cost.version_bytes
    assert cost.cache_bytes == 0  # vLLM's own
    assert cost.rank_bytes(2) < 0.85 * 80 * GIB < cost.rank_bytes(1)  # the rest is workspace and fragmentation
    assert run(["train", str(RECIPES / "qwen3-4b-gpu.toml"), "--dry-run"]) == 0
    assert "# parameters       4,022,468,096" in capsys.readouterr().out


PAPER = sorted(path.name for path in (RECIPES / "paper").glob("*.toml"))
ROWS = (
    "--variant decoupled_exact",
    "--proximal.source dedicated",
    "--proximal.source interruption",
    "--proximal.source eager",
    "--variant decoupled_async",
    "--variant linear_prox",
    "--variant loglinear_prox",
    "--variant ppo_ewma_train_infer --proximal.reset paper",
    "--variant ppo_ewma --proximal.reset paper",
    "--variant ppo_clip_train_infer",
    "--variant aged_train_infer",
    "--variant rescore_train_infer",
    "--variant mis_balance",
)
"""The rows of docs/paper.md."""


def command_of(recipe: str) -> list[str]:
    """The command of a dry run that a recipe's header gives, after the recipe."""
    lines = (RECIPES / "paper" / recipe).read_text().split("--dry-run", 1)[1].split("\n# The paper")[0]
    return ["--dry-run", *lines.replace("\\\n#", " ").split()]


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_runs_say_their_bytes_and_seconds_without_model_and_checkout(name, monkeypatch, capsys):
    monkeypatch.chdir(RECIPES.parent)
    for row in ROWS if name == "qwen3-4b-tau2.toml" else ROWS[:1]:
        assert run(["train", f"recipes/paper/{name}", *command_of(name), *row.split()]) == 0
        said = capsys.readouterr().out
        assert "# an update" in said
        assert "# assumed" in said
        assert "# environment      not checked" in said


@pytest.mark.parametrize("name, ranks, gigabytes", [("qwen3-4b-tau2.toml", 4, 80), ("qwen3-30b-a3b-vitabench.toml", 6, 141)])
def test_the_trainer_of_the_papers_runs_fits_its_gpus(name, ranks, gigabytes, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    model = "recipes/paper/Qwen3-4B" if "4b" in name else "recipes/paper/Qwen3-30B-A3B"
    cost = estimate(load_config(RECIPES / "paper" / name, ["--model.path", model], needs_model=False))
    assert cost.rank_bytes(ranks) < 0.95 * gigabytes * 1e9


def test_the_rows_of_the_papers_table_are_in_its_page():
    page = (RECIPES.parent / "docs" / "paper.md").read_text()
    assert [row for row in ROWS if f"`{row}`" not in page] == []


def test_a_run_without_its_checkout_is_refused(at, capsys):
    recipe = str(RECIPES / "paper" / "qwen3-4b-tau2.toml")
    assert run(["train", recipe, "--model.path", str(RECIPES / "paper" / "Qwen3-4B"), "--out", "run"]) == 2
    assert not (at / "run").exists()
