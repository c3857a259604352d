"""`oldlogits train`, `show` and `report` on real runs, and a user's own environment and model."""

import json
import textwrap
import tomllib
from dataclasses import asdict

import pytest
import tomli_w
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from oldlogits.cli.main import run
from oldlogits.config.load import config_from_table, load_config
from oldlogits.models.load import load_model

from ..runs import check_accounting, children, events_of, recipe, summary_of, tokens_of, write_recipe

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{%- if tools and loop.first %}{%- for tool in tools %}{{ '\n' + (tool | tojson) }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)

SHOP = '''
"""A shop, written by somebody else."""
import time

class Shop:
    """Sell tea."""

    system_prompt = "Sell tea."

    def reset(self, wish, trouble=""):
        if trouble == "raises":
            raise RuntimeError("no such tea")
        if trouble == "hangs":
            time.sleep(3600)
        self._said = ""
        return f"I want {wish}"

    def reply(self, message):
        self._said += message
        return None

    def get_reward(self):
        return sum(letter in "aeiou" for letter in self._said) / max(len(self._said), 1)

    async def stock(self, tea: str, grams: int = 100) -> dict:
        """How much tea there is."""
        return {tea: grams}
'''


@pytest.fixture(scope="module")
def lockstep_run(tiny_folder, tmp_path_factory):
    """A run of two updates. Read it only."""
    root = tmp_path_factory.mktemp("train")
    config = recipe(tiny_folder, num_updates=2, eval={"num_episodes": 4})
    assert run(["train", str(write_recipe(root / "r.toml", config)), "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def llama(tmp_path):
    """A Llama folder with bytes for tokens and a ChatML template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special[1:2]
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=False, **size
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_an_environment_and_a_model_of_ones_own_train_and_trouble_ends_only_its_episodes(llama, tmp_path, monkeypatch, capfd):
    (tmp_path / "my_shop.py").write_text(textwrap.dedent(SHOP))
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {"wish": "green tea"},
        {"wish": "none", "trouble": "raises"},
        {"wish": "black tea"},
        {"wish": "x", "trouble": "hangs"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text('{"wish": "white tea"}\n')
    (tmp_path / "mine.toml").write_text(
        f"""
        num_updates = 2
        max_staleness = 1
        model.path = "{llama}"
        env = {{ target = "my_shop:Shop", parser = "hermes", train_data = "{tmp_path}/rows.jsonl",
                 eval_data = "{tmp_path}/heldout.jsonl", max_episode_tokens = 400, timeout_s = 0.3 }}
        rollout = {{ group_size = 4, prompts_per_update = 2 }}
        eval.num_episodes = 4
        runtime.type = "local"
    """.replace("\n                 ", " ")
    )
    assert run(["train", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run")]) == 0
    summary = summary_of(tmp_path / "run")
    assert summary["num_updates"] == 2
    assert summary["log_r_d_max_abs"] <= 1e-4
    assert set(summary["provenance"]) == {"exact"}
    assert summary["success_after"]["num_episodes"] == 1, "the file holds one held-out row"
    account = check_accounting(tmp_path / "run")
    assert account["trained"] == 2 * 2 * 4
    failed = events_of(tmp_path / "run", "trajectory_failed")
    assert account["failed"] == len(failed) >= 4
    assert {event.reason for event in failed} <= {"reset: RuntimeError: no such tea", "reset: timed out after 0.3 s"}
    assert len(tokens_of(tmp_path / "run", "log_r_d")["log_r_d"]) > 16
    assert children() == []
    assert capfd.readouterr().err == "", "nothing of Hugging Face or torch on the screen"


def test_a_dry_run_prints_a_recipe_that_loads_to_the_same_config_and_its_bytes(tiny_folder, tmp_path, capsys):
    config = recipe(tiny_folder, band=float("inf"), objective={"dual_clip": float("inf")})
    path = write_recipe(tmp_path / "r.toml", config)
    assert run(["train", str(path), "--dry-run", "--trainer.lr", "3e-4", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "resolved.toml").write_text(shown)
    resolved = load_config(tmp_path / "resolved.toml")
    assert resolved == load_config(path, ["--trainer.lr", "3e-4"]) != config
    said = [line for line in shown.splitlines() if line.startswith("# ")]
    assert said[0] == "# decoupled_exact: r_d = old/mu, r_s = theta/old, total ratio theta/mu"
    assert said[1].startswith("# warning: no mask: band = inf")
    num_parameters = sum(p.numel() for p in load_model(tiny_folder).parameters())
    assert f"# parameters       {num_parameters:,}" in said
    mib = 4 * num_parameters / 2**20
    assert f"# version store    {(2 + 2) * mib:,.1f} MiB, at most {(2 + 2) * mib:,.1f} MiB: one copy, and patches" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_config_in_a_run_folder_is_the_resolved_recipe(lockstep_run, tiny_folder):
    recorded = tomllib.loads((lockstep_run / "config.toml").read_text())
    assert config_from_table(recorded) == recipe(tiny_folder, num_updates=2, eval={"num_episodes": 4})
    assert config_from_table(tomllib.loads(tomli_w.dumps(asdict(config_from_table(recorded))))) == config_from_table(recorded)


@pytest.mark.slow
def test_show_prints_a_runs_summary_and_the_tables(lockstep_run, capsys):
    assert run(["show", str(lockstep_run)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "decoupled_exact, 2 updates" in shown
    assert "24 trajectories" in shown
    assert "100.0% exact" in shown
    assert run(["show", "variants"]) == 0
    assert "decoupled_exact" in capsys.readouterr().out
    assert run(["show", "recipe"]) == 0
    assert "trainer.lr" in capsys.readouterr().out
    assert run(["show", str(lockstep_run / "tokens")]) == 2
    assert "this folder has no summary" in capsys.readouterr().err


def test_a_report_is_written_again_from_the_recorded_files(lockstep_run, tmp_path, capsys):
    report = lockstep_run / "report.html"
    before = report.read_bytes()
    report.unlink()
    assert run(["report", str(lockstep_run)]) == 0
    assert str(report) in capsys.readouterr().out.replace("\n", "")
    assert report.read_bytes() == before
    assert run(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
