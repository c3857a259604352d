"""The real thing: vLLM's CPU build trains the desk agent. `make test-vllm` names the interpreter that has vLLM."""

import os
import signal
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from benchmarks.families.folders import write_folder
from benchmarks.families.served import train_on_vllm
from benchmarks.families.shapes import FAMILIES
from oldlogits.cli.main import run as command

from ..runs import after_updates, check_accounting, events_of, summary_of, tokens_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

PYTHON = os.environ.get("OLDLOGITS_VLLM_PYTHON", "")
RECIPE = Path(__file__).parents[2] / "recipes" / "desk.toml"
NUM_UPDATES = 24

needs_vllm = pytest.mark.skipif(not PYTHON, reason="make test-vllm sets OLDLOGITS_VLLM_PYTHON")


def train(folder, *, flags=(), num_updates=NUM_UPDATES, trainer=None, model=None, **engine):
    """The desk recipe over vLLM in eager mode, smaller; returns the exit status."""
    table = tomllib.loads(RECIPE.read_text())
    table["engine"] |= {"type": "vllm", "python": PYTHON, "max_num_seqs": 64, "flags": ["--enforce-eager", *flags], **engine}
    table["rollout"] |= {"prompts_per_update": 8, "max_running_groups": 12}
    table["eval"] |= {"num_episodes": 0, "every": 0}
    table["trainer"] |= trainer or {}
    table["model"] = model or {}
    table["num_updates"] = num_updates
    (folder / "recipe.toml").write_text(tomli_w.dumps(table))
    return command(["train", str(folder / "recipe.toml"), "--out", str(folder / "run")])


@needs_vllm
def test_the_desk_agent_trains_on_vllm_with_partial_rollouts_and_exact_old_logits(tmp_path, shared_files):
    """Eight-bit weights rounded in the server, a tied head, versions that change in mid-turn."""
    assert train(tmp_path) == 0
    run = tmp_path / "run"
    names = ("log_r_d", "staleness", "trajectory", "version", "trainer_version", "provenance")
    tokens = tokens_of(run, *names)
    assert set(tokens["provenance"]) == {"exact"}
    assert (tokens["trainer_version"] - tokens["staleness"] == tokens["version"]).all()
    assert 1 <= tokens["staleness"].max() <= 4
    spans = [len(set(tokens["version"][tokens["trajectory"] == name])) for name in set(tokens["trajectory"])]
    assert sum(n >= 2 for n in spans) >= NUM_UPDATES, "trajectories go on over updates"
    deviation = np.abs(tokens["log_r_d"])
    assert 1e-3 < deviation.mean() < 0.1, "r_d is real, and small"
    probes = events_of(run, "probe")
    assert [event.version for event in probes] == list(range(NUM_UPDATES + 1))
    assert max(event.max_abs_error for event in probes) <= 1e-4, "the server holds what was published"
    summary = summary_of(run)
    assert summary["num_updates"] == NUM_UPDATES
    assert summary["consistency_lag0_max_abs_error"] <= 1e-5
    assert check_accounting(run)["trained"] == NUM_UPDATES * 8 * 8
    assert not events_of(run, "server_down")
    assert shared_files() == set()
    success = [event.metrics["reward/success"] for event in events_of(run, "update")]
    assert sum(success[-8:]) > sum(success[:8]), "it learns"


@needs_vllm
def test_without_the_repair_the_tied_head_stays_old_and_the_probe_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert train(tmp_path, flags=["--worker-extension-cls", "broken_worker.Extension"], precision="fp32") == 1
    assert "the engine does not hold version 1" in capsys.readouterr().err


@needs_vllm
def test_patches_reach_vllm_also_after_it_was_killed_and_it_keeps_no_memory_of_the_copy(tmp_path):
    """Steps so small that few of the fp32 values change, as in bf16 at the usual learning rates."""
    run, kept = tmp_path / "run", []

    def look_and_kill():
        [group] = groups_of_servers()
        kept.extend(always_mapped(group))
        os.killpg(group, signal.SIGKILL)

    thread = after_updates(run, 3, look_and_kill)
    assert train(tmp_path, num_updates=8, trainer={"lr": 3e-10, "warmup_steps": 0}, precision="fp32") == 0
    thread.join()
    assert kept == []
    [down] = events_of(run, "server_down")
    assert down.num_lost_tokens is not None, "vLLM counts what it samples"
    [up] = events_of(run, "server_up")
    assert "started again" in up.reason
    assert "was given version" in up.reason
    sent = [event.sent for event in events_of(run, "weights_updated")]
    assert sent == ["full"] + ["patch"] * 8
    assert all(0 < event.changed < 0.5 for event in events_of(run, "published")[1:])
    probes = events_of(run, "probe")
    assert [event.version for event in probes] == list(range(9))
    assert max(event.max_abs_error for event in probes) <= 1e-4
    tokens = tokens_of(run, "log_r_d", "provenance")
    assert set(tokens["provenance"]) == {"exact"}
    assert np.abs(tokens["log_r_d"]).max() <= 1e-3, "vLLM and the trainer both compute in fp32"
    assert check_accounting(run)["trained"] == 8 * 8 * 8
    assert not groups_of_servers()


@needs_vllm
def test_vllm_gets_adapters_and_adds_them_to_its_own_folder(tmp_path):
    model = {"lora_rank": 4, "lora_alpha": 8.0}
    assert train(tmp_path, num_updates=3, trainer={"lr": 3e-2, "warmup_steps": 0}, precision="fp32", model=model) == 0
    run = tmp_path / "run"
    probes = events_of(run, "probe")
    assert [event.version for event in probes] == list(range(4))
    assert max(event.max_abs_error for event in probes) <= 1e-4
    tokens = tokens_of(run, "log_r_d", "log_r_s", "provenance")
    assert set(tokens["provenance"]) == {"exact"}
    assert np.abs(tokens["log_r_d"]).max() <= 1e-3, "vLLM and the trainer both compute in fp32"
    assert np.abs(tokens["log_r_s"]).max() > 1e-2, "the adapters do something"
    check_accounting(run)


@needs_vllm
@pytest.mark.parametrize(
    ("name", "precision"), [("Llama 3", "fp32"), ("Mistral", "fp32"), ("Gemma 3", "fp32"), ("Qwen3-MoE", "fp8")]
)
def test_vllm_samples_what_the_trainer_computes_of_a_family_before_and_after_updates(name, precision, tmp_path):
    """Scaled rotary embeddings, sliding windows, scaled embeddings and experts; prompts are longer than the windows."""
    family = FAMILIES[name]
    folder = write_folder(family, tmp_path / "model")
    run = train_on_vllm(folder, family.chat, PYTHON, tmp_path / "run", precision=precision)
    assert len(run.probes) == 4
    assert max(run.probes) <= 1e-4
    assert (run.largest <= 1e-3) is (precision == "fp32"), "where both compute in fp32 only rounding is left"
    assert run.moved >= 1e-2, "tokens of older versions tell the versions apart"
    assert run.num_tokens >= 2 * 8 * 8


def groups_of_servers():
    """The process groups of the servers that this process has started: each is led by its reaper."""
    children = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in children if b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def always_mapped(group, *, seconds=3.0):
    """Processes of a group that map a run's weights whenever one looks: a tensor of theirs still is that memory."""
    mapping, ends = set(processes_of(group)), time.monotonic() + seconds
    while mapping and time.monotonic() < ends:
        mapping = {pid for pid in mapping if "/oldlogits-" in Path(f"/proc/{pid}/maps").read_text()}
        time.sleep(0.05)
    return mapping


def processes_of(group):
    """Process ids: the fifth field of `stat`, the third after the name in brackets, is the group."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        if int(path.read_text().rpartition(")")[2].split()[2]) == group:
            yield int(path.parent.name)
