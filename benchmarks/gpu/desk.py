"""A run on the order desk from recipe to report: engine and trainer in processes of their own, on one device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import tomli_w
import torch

from benchmarks.gpu.rows import Row, Rows
from oldlogits.cli.main import run
from order_desk.environment import OrderDesk

PROBE_GOAL = 1e-4
"""What the probe allows two fp32 forwards of the same weights to differ by, in nats."""


class CoinDesk(OrderDesk):
    """The order desk whose reward is a coin: a model with random weights solves nothing, and no reward is no gradient."""

    def __init__(self) -> None:
        """Open an empty desk."""
        super().__init__()
        self._sum = 0

    def reply(self, message: str) -> str | None:
        """Hear the agent out, then answer as ever."""
        self._sum += sum(map(ord, message))
        return super().reply(message)

    def get_reward(self) -> float:
        """Heads or tails, by what the agent wrote: the same words are rewarded alike."""
        return float(self._sum % 2)


def measure_desk(
    label: str, folder: Path, device: torch.device, out: Path, rows: Rows, *, is_random: bool, compute: str
) -> None:
    """Train a model for some updates on the desk."""
    recipe = out.with_suffix(".toml")
    recipe.write_text(tomli_w.dumps(_recipe(folder, device, is_random=is_random, compute=compute)), encoding="utf-8")
    status = run(["train", str(recipe), "--out", str(out)])
    found = out / "summary.json"
    summary = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    if status or summary.get("ended") != "done":
        rows.add(Row(name=f"run on the desk, {label}", value=None, note=f"exit status {status}: see the output above"))
        raise SystemExit(status or 1)
    exact, tokens = summary["provenance"].get("exact", 0), sum(summary["provenance"].values())
    what = f"{summary['num_trajectories']} episodes, {summary['num_multi_version_trajectories']} of several versions"
    rows.add(Row(name=f"run on the desk, {label}", value=summary["num_updates"], unit="updates", note=what))
    rows.add(Row(name="tokens with exact old log-probs", value=100 * exact / max(1, tokens), unit="%", note=f"of {tokens:,}"))
    rows.add(Row(name="largest lag-0 error", value=summary["consistency_lag0_max_abs_error"], unit="nats"))
    most = PROBE_GOAL if compute == "fp32" else None
    rows.add(Row(name="largest difference of the probe", value=summary["probe_max_abs_error"], unit="nats", most=most))
    seconds = summary["train_wall_s"]
    rows.add(Row(name="trained tokens, the whole run", value=tokens / seconds, unit="tokens/s", note=f"in {seconds:.0f} s"))


def _recipe(folder: Path, device: torch.device, *, is_random: bool, compute: str) -> Mapping[str, object]:
    on_gpu = device.type == "cuda"
    arithmetic = {"compute": compute}
    return {
        "num_updates": 6 if on_gpu else 2,
        "max_staleness": 2,
        "model": {"path": str(folder), "warm_start_steps": 0, "forward_dtype": "bf16"},
        "env": {
            "target": "benchmarks.gpu.desk:CoinDesk" if is_random else "desk",
            "parser": "hermes",
            "max_episode_tokens": 2048 if on_gpu else 1536,
            "max_tokens_per_turn": 48 if on_gpu else 16,
            "max_turns": 4 if on_gpu else 2,
        },
        "engine": {"device": device.type, "max_num_seqs": 64 if on_gpu else 8},
        "rollout": {
            "prompts_per_update": 8 if on_gpu else 2,
            "group_size": 8 if on_gpu else 2,
            "max_running_groups": 16 if on_gpu else 4,
        },
        "trainer": {
            "device": device.type,
            "lr": 1e-5,
            "warmup_steps": 1,
            "minibatches_per_update": 1,
            "micro_batch_tokens": 16_384 if on_gpu else 4096,
            "head_chunk_tokens": 1024,
            "activation_checkpointing": True,
            **arithmetic,
        },
        "eval": {"num_episodes": 0, "num_calibration": 0},
        "record": {"checkpoint_every": 0, "tokens_every": 0, "transcripts_every": 0},
    }
