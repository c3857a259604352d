"""The sections of a recipe that say what is played: environment or program, sampling, groups, evaluation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from oldlogits.config.mixture import MixturePart
from oldlogits.config.ranges import Auto, Bytes, Count, Few, NotNegative, Positive, Tokens
from oldlogits.core.environment import ADAPTERS, McpServer
from oldlogits.core.parser import PARSERS


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """The environment and the turns with it."""

    target: str = "desk"
    """desk, desk_long, desk_slow, or "package.module:Class"."""
    adapter: Annotated[str, ADAPTERS] = "class"
    """What makes an environment of the target: class (the target is one), trl (it is what environment_factory of TRL's
    GRPOTrainer takes), tau2 or vitabench ("FOLDER:DOMAIN" of a checkout), mcp (see env.mcp), or "package.module:Name"."""
    mcp: tuple[McpServer, ...] = ()
    """MCP servers whose tools the model is offered, such as [{command = ["python", "server.py"]}] or [{url = "http://..."}]:
    the environment, in place of the target; env.reward says what is worth what."""
    reward: str = ""
    """A function "package.module:function" whose reward of an episode is added to that of the class; empty: none is."""
    group_reward: str = ""
    """A function "package.module:function" that makes the rewards of a whole group of their own; empty: that of the class."""
    mixture: tuple[MixturePart, ...] = ()
    """Several environments in one run, in place of target, adapter, train_data and eval_data: a table [[env.mixture]] each."""
    program: str = ""
    """"package.module:function": an agent program that plays the episodes in the place of the target, as
    `function(base_url, api_key, row)`, which returns a reward; it talks to the run as to any chat-completions server. The
    target then only supplies the rows where no file does, and what a starting model knows."""
    command: tuple[str, ...] = ()
    """The same as a command in any language, such as ["python", "agent.py"]: it finds the run by OPENAI_BASE_URL,
    OPENAI_API_KEY, ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY, the row on standard input, and prints {"reward": ...} last."""
    verifiers: str = ""
    """An installed environment of `verifiers` (0.4 and later), by its id: its tasks are the rows where no file is named, and it
    plays the episodes and gives the rewards, in place of the target."""
    verifiers_args: str = ""
    """env.verifiers: fields of its config as JSON text, such as '{"taskset": {"split": "train"}}'; "select" says which tasks
    are trained, "eval" has "taskset" and "select" of held-out ones (empty: every fifth task)."""
    program_timeout_s: Annotated[float, Gt(0)] = 600.0
    """env.program, env.command, env.verifiers: seconds that an episode may take."""
    program_memory_bytes: Bytes = 0
    """env.command: address space of each process of an episode; 0: without a limit."""
    program_processes: Few = 1
    """env.program, env.verifiers: processes that share the episodes. Clients of Python take milliseconds of a core for every
    request, all in one process; what the program shares among its episodes, each process has for itself."""
    unmet_wishes: Literal["override", "refuse"] = "override"
    """env.program, env.command, env.verifiers: what becomes of parameters of a request that training cannot honour, such as
    another temperature, a grammar or n > 1. override: the run's own count, and it is shown how often. refuse: an error says
    why."""
    train_data: str = ""
    """A JSONL file of tasks for training, one `reset(**row)` a line; empty: the class makes its own rows."""
    eval_data: str = ""
    """A JSONL file of tasks for evaluation."""
    parser: Annotated[str, PARSERS] = "plain"
    """How the model writes tool calls."""
    max_turns: Positive = 16
    """Assistant turns per episode."""
    max_tokens_per_turn: Tokens = 32
    """Sampled tokens per assistant turn."""
    max_episode_tokens: Annotated[int, Ge(2), Le(2**31 - 1)] = 256
    """Tokens per episode, its prompt and all answers of tools included."""
    timeout_s: Annotated[float, Gt(0)] = 20.0
    """Seconds that one call of environment code may take: the constructor, reset, a tool call, a reply, the reward. Of an agent
    program it bounds how long a turn is read; see env.program_timeout_s."""
    tool_errors: Literal["declared", "answer", "fail"] = "declared"
    """What a tool's exception does. declared: one that the class names in `tool_errors` is an answer to the agent, with its
    message; any other one ends the episode as failed. answer: every one is an answer. fail: every one ends the episode."""
    latency_s: NotNegative = 0.0
    """Mean seconds of a simulated, exponentially distributed tool latency (runtime local); 0: none."""

    @property
    def is_program(self) -> bool:
        """Whether an agent program plays the episodes."""
        return bool(self.program or self.command or self.verifiers)

    @property
    def words(self) -> tuple[str, str]:
        """The target and the adapter that make the environment: the keys of these names, or env.mcp or env.verifiers."""
        if self.verifiers:
            told = {"id": self.verifiers, "args": self.verifiers_args, "max_turns": self.max_turns}
            return json.dumps(told), "verifiers"
        if not self.mcp:
            return self.target, self.adapter
        return json.dumps([asdict(server) for server in self.mcp]), "mcp"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """The distribution that training rollouts are sampled from; reshaping it is refused."""

    temperature: Annotated[float, Ge(0.001), Le(1000)] = 1.0
    """Logits are divided by it."""
    top_p: float = 1.0
    """Must be 1 in training: below, mu has another support than the trained policy."""
    top_k: int = 0
    """Must be 0 in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Groups of episodes."""

    group_size: Annotated[int, Ge(1), Le(10_000)] = 8
    """Episodes of one task, compared with each other; 1, with a rollout.min_group_size of 1, needs objective.advantage =
    "batch-baseline"."""
    prompts_per_update: Positive = 16
    """Tasks of a batch, each with a group of episodes: what the trainer consumes between two published versions."""
    max_running_groups: Positive | Auto = "auto"
    """Groups sampled at the same time; auto: as many as the staleness bound admits."""
    filter_uniform: bool = False
    """Leave out groups whose rewards are all equal (no advantage); they are counted as filtered."""
    max_filtered_batches: Positive = 64
    """Groups left out since the last update, in batches, at which the run stops; it warns at an eighth of them."""
    min_group_size: Annotated[int, Ge(1)] = 2
    """Members that a group is trained with although others failed; with fewer it is left out. rollout.group_size: a group
    with a failure is left out."""
    max_replays: Count = 0
    """How often a failed episode is played again, in the same group."""
    max_failed_share: Annotated[float, Gt(0), Le(1)] = 0.5
    """The run stops when more than this share of 256 episodes was failed by the environment, the last ones of training, or of
    an evaluation; it warns above 5%. 1: never."""

    @property
    def running_limit(self) -> int:
        """The most groups sampled at the same time; 0 where the staleness bound alone limits them."""
        return 0 if self.max_running_groups == "auto" else self.max_running_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation: sampled (T = 1) and greedy, before and after, and points in between; and the calibration."""

    num_episodes: Count = 1024
    """Episodes before and after training, each sampled and greedy; 0: no evaluation."""
    every: Count = 0
    """Updates between evaluation points during training; 0: none. The last update is one if num_episodes = 0."""
    num_episodes_during: Count = 128
    """Sampled episodes of each such point."""
    overlap: bool = False
    """Whether training goes on meanwhile: such a point is sampled by its version and by those made while it is played, as the
    record says. Needs a runtime in real time, and record.keep_best = false."""
    success_at: Annotated[float, Ge(-1e15), Le(1e15)] = 1.0
    """The reward from which an episode counts as a success; every evaluation gives the mean reward beside the success rate."""
    num_calibration: Count = 32
    """Trajectories of the first batch on which the engine's own noise is measured, before the first step; 0: none."""
    max_concurrent: Positive = 256
    """Episodes evaluated at the same time."""
