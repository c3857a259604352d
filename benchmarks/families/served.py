"""What the engines sample of a folder, and how far it is from the trainer; vLLM does so in a short training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow.parquet as pq
import tomli_w

from benchmarks.families.chats import Chat
from benchmarks.families.checks import MAX_CONTEXT, plain_logps
from oldlogits.batch.collate import collate
from oldlogits.cli.main import run as command
from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.core.trajectory import Context, Sampled, Trajectory, TrajectoryGroup
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.record.event_log import read_events
from oldlogits.record.events import Probed

PROMPT: Final = tuple(range(3, 43))


class Ranked:
    """Say something; whoever says it later in a group has the greater reward, so that every update moves the weights."""

    system_prompt = "be kind"

    @staticmethod
    def make_row(split: str, index: int) -> dict[str, int]:
        """Give a number."""
        return {"number": index % 10}

    def reset(self, number: int) -> str:
        """Begin."""
        return f"say {number}"

    def look(self, word: str) -> str:
        """Look a word up."""
        return word

    def get_reward(self) -> float:
        """Give none of its own."""
        return 0.0

    @staticmethod
    def get_group_rewards(*, row: object, messages: Sequence[object], rewards: Sequence[float]) -> list[float]:
        """Rank the episodes."""
        return [float(rank) for rank in range(len(rewards))]


def embedded_error(folder: Path) -> float:
    """Sample with the embedded engine; return the largest error of the log-probs that it gave, in nats.

    Raises:
        ModelFolderError: It does not compute this model.
    """
    engine = EngineCore(EngineSpec(model_path=str(folder), max_num_seqs=2, max_context=MAX_CONTEXT))
    engine.add("one/0", PROMPT, Sampling(max_tokens=MAX_CONTEXT - len(PROMPT)))
    done = dict(engine.step())
    while not engine.idle:
        done |= engine.step()
    sampled = done["one/0"]
    segments = (
        Context(token_ids=PROMPT),
        Sampled(token_ids=sampled.output_ids, logp_mu=sampled.logprobs, version=0),
    )
    one = Trajectory(id="one", group_id="one", segments=segments, reward=0.0, stop_reason="done")
    batch = collate([TrajectoryGroup(id="one", trajectories=(one,))], [0.0], num_steps=1)
    return float(abs(plain_logps(folder, batch) - batch.logp_mu[batch.loss_mask]).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmRun:
    """What a short run over vLLM shows.

    Args:
        probes: The largest errors of the probe in nats, by version.
        largest: The largest |log r_d| of the sampled tokens.
        moved: The largest |log r_s|: how far the updates moved tokens.
        num_tokens: Trained tokens.
    """

    probes: tuple[float, ...]
    largest: float
    moved: float
    num_tokens: int


def train_on_vllm(folder: Path, chat: Chat, python: str, out: Path, *, precision: str = "fp32") -> VllmRun:
    """Train a folder for three updates on one vLLM server, which `python` has installed.

    Raises:
        RuntimeError: The run failed; its messages are on standard error.
    """
    table = {
        "num_updates": 3,
        "max_staleness": 1,
        "model": {"path": str(folder), "chat_tools": chat.tools_in, "chat_template_kwargs": chat.kwargs},
        "env": {"target": f"{__name__}:Ranked", "max_episode_tokens": 1024, "max_tokens_per_turn": 24, "max_turns": 1},
        "engine": {"type": "vllm", "python": python, "precision": precision, "max_num_seqs": 8, "flags": ["--enforce-eager"]},
        "rollout": {"group_size": 4, "prompts_per_update": 2, "max_running_groups": 3},
        "trainer": {"lr": 1e-2, "warmup_steps": 0, "minibatches_per_update": 1},
        "runtime": {"type": "local"},
        "eval": {"num_episodes": 0, "every": 0},
    }
    recipe = out.with_suffix(".toml")
    recipe.write_text(tomli_w.dumps(table), encoding="utf-8")
    if command(["train", str(recipe), "--out", str(out)]):
        raise RuntimeError(f"the run of {folder} failed")
    probes = [event.max_abs_error for event in read_events(out / "events.jsonl") if isinstance(event, Probed)]
    tables = [pq.read_table(path) for path in (out / "tokens").glob("*.parquet")]
    log_r_d, log_r_s = ([abs(x) for table in tables for x in table[name].to_pylist()] for name in ("log_r_d", "log_r_s"))
    return VllmRun(probes=tuple(probes), largest=max(log_r_d), moved=max(log_r_s), num_tokens=len(log_r_d))
