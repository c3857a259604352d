"""What a turn costs the controller: its CPU seconds by length of the context, and those of an episode of the order desk.

    python -m benchmarks.turn [--rounds 5] [--contexts 4000 8000 16000 32000] [--episodes 200]

An engine process that answers at once stands behind the pipe, so that the turn itself is what is measured: rendering, encoding,
requests, answers, environment code in threads, journal. All threads of the controller count, and no other process does.

- turn: one episode grows to every context in turn and plays short turns there; the median turn of each round counts.
- episode: groups of the order desk, played by its oracle, with environment code in threads, beside the same inline.

The first goal: a turn at 32,000 tokens costs at most twice one at 4,000. The exit status is 1 where it is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final
from unittest.mock import patch

from oldlogits.core.engine import EngineSpec, Generation, KVMode, PauseMode, Sampling, Span, trajectory_of
from oldlogits.core.engine_stats import EngineStats
from oldlogits.core.environment import Environment, Row
from oldlogits.engines.embedded import process
from oldlogits.engines.embedded.slots import Request
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.asked import EnvironmentRunner
from oldlogits.rollout.environment_runner import ThreadRunner, run_inline
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.journal.records import Admitted
from oldlogits.rollout.turn_latency import TurnLatency
from oldlogits.rollout.turns import Agent, Failure, TurnLimits, run_episode
from oldlogits.rpc.child import Inbox
from order_desk.environment import OrderDesk
from order_desk.starting_models import TinySize
from order_desk.tiny import save_tiny, tiny_model
from order_desk.warm_start import desk_tokenizer

CONTEXTS: Final = (4000, 8000, 16000, 32000)
TURNS: Final = 40
"""Short turns at each context."""
MEMBERS: Final = 8
ROOM: Final = 2000
"""Tokens above the longest context that an episode may have."""
GOAL: Final = 2.0


class AtOnce:
    """A core of the engine that answers a request in the step after it came: a call, or what the oracle of the desk says."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec, self._tokenizer = spec, desk_tokenizer()
        self._chat = ChatFormat(self._tokenizer)
        self._oracles: dict[str, Callable[[str], str]] = {}
        self._waiting: list[tuple[str, Sequence[int]]] = []
        self._look = tuple(self._chat.turn_ids("<call> status </call>"))
        self.stats = EngineStats()

    @property
    def idle(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting

    def add(self, request_id: str, prompt_ids: Sequence[int], *_: object) -> Sequence[int]:
        """Take a request."""
        self._waiting.append((request_id, prompt_ids))
        return ()

    def queue(self, request: Request) -> None:
        """Take a request that is made already."""
        self.add(request.id, request.tokens)

    def step(self) -> list[tuple[str, Generation]]:
        """Answer all requests."""
        waiting, self._waiting = self._waiting, []
        return [(name, self._answer(name, prompt)) for name, prompt in waiting]

    def _answer(self, name: str, prompt: Sequence[int]) -> Generation:
        ids = self._look if name.startswith("r") else self._oracle(trajectory_of(name), prompt)
        spans = (Span(version=0, start=0, end=len(ids)),)
        return Generation(output_ids=ids, logprobs=(-0.5,) * len(ids), spans=spans, finish_reason="stop")

    def _oracle(self, trajectory: str, prompt: Sequence[int]) -> tuple[int, ...]:
        """What the oracle says to the last message."""
        if trajectory not in self._oracles:
            self._oracles[trajectory] = OrderDesk.make_oracle()
        text = self._tokenizer.decode(list(prompt)).rpartition(" <end>")[0]
        message = max((text.rpartition(role)[2] for role in ("<user> ", "<tool> ")), key=lambda part: -len(part))
        return tuple(self._chat.turn_ids(self._oracles[trajectory](message)))

    def abort(self, request_id: str) -> None:
        """Never asked."""

    def pause(self, mode: PauseMode, kv: KVMode) -> list[tuple[str, Generation]]:
        """Never asked."""
        return []

    def partials(self) -> dict[str, Generation]:
        """Never asked."""
        return {}

    def resume(self) -> None:
        """Never asked."""

    def grown(self, known: Mapping[str, int]) -> dict[str, Generation]:
        """What running turns have sampled: none runs for long."""
        return {}


def serve(inbox: Inbox, spec: EngineSpec) -> None:
    """Be the engine process."""
    process._Server(inbox, AtOnce(spec)).run()  # type: ignore[arg-type]


class Reader:
    """An episode that grows to each of some contexts and plays short turns there; `spent_s`: the CPU seconds of each turn."""

    contexts: Sequence[int] = CONTEXTS
    spent_s: Mapping[int, list[float]] = {}

    def __init__(self) -> None:
        """Begin with the first context."""
        self._at, self._num, self._since = 0, 0, 0.0

    def reset(self) -> str:
        """Read as many words as the first context has."""
        return "order " * (self.contexts[0] - 60)

    def status(self) -> str:
        """Look: a short answer, or a long one to the next context."""
        now = time.process_time()
        if self._num:
            self.spent_s[self.contexts[self._at]].append(now - self._since)
        self._since, self._num = now, self._num + 1
        if self._num <= TURNS or self._at + 1 == len(self.contexts):
            return "it is pending"
        before, self._at = self.contexts[self._at], self._at + 1
        self._num = 0
        return "order " * (self.contexts[self._at] - before - 12 * TURNS)

    def get_reward(self) -> float:
        """Return nothing."""
        return 0.0


@contextlib.contextmanager
def engine_of(folder: Path, max_context: int) -> Iterator[process.EngineProcess]:
    """An engine process that answers at once."""
    tokenizer = desk_tokenizer()
    size = TinySize(hidden=16, layers=1, heads=1, kv_heads=1, mlp=16, max_context=max_context)
    save_tiny(folder, tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, 0), tokenizer)
    with patch.object(process, "_serve", serve):
        engine = process.EngineProcess(EngineSpec(model_path=str(folder), max_context=max_context))
    try:
        yield engine
    finally:
        engine.close()


def agent_of(engine: process.EngineProcess, cls: type, journal: Journal, run: EnvironmentRunner, max_tokens: int) -> Agent:
    """An agent whose episodes are followed as those of a run are."""
    latency = TurnLatency()

    def report(id: str, segments: Sequence[object]) -> None:
        latency.grew(id, segments)  # type: ignore[arg-type]
        journal.grew(id, segments)  # type: ignore[arg-type]

    return Agent(
        engine=engine,
        chat=ChatFormat(desk_tokenizer(), tool_schemas(cls), system_prompt_of(cls)),
        parser=PlainParser(),
        limits=TurnLimits(max_turns=10_000, max_tokens_per_turn=64, max_tokens=max_tokens),
        sampling=Sampling(max_tokens=64),
        run_environment=run,
        report=report,
    )


async def turns(
    engine: process.EngineProcess, journal: Journal, contexts: Sequence[int], rounds: int
) -> dict[int, list[float]]:
    """CPU milliseconds of the median turn of each round, by context."""
    found: dict[int, list[float]] = {context: [] for context in contexts}
    limit = contexts[-1] + TURNS * 12
    for number in range(rounds):
        Reader.contexts, Reader.spent_s = contexts, {context: [] for context in contexts}
        journal.note(Admitted(group=(group := f"r{number:06d}"), row=0, version=0, size=1))
        run = ThreadRunner(timeout_s=60.0, latency_s=0.0, seed=0)
        agent = agent_of(engine, Reader, journal, run, limit)
        outcome = await run_episode(agent, Reader, {}, id=f"{group}.0", group_id=group)
        assert not isinstance(outcome, Failure), outcome
        for context, spent_s in Reader.spent_s.items():
            found[context].append(1e3 * median(spent_s[:TURNS]))
    return found


async def episodes(engine: process.EngineProcess, journal: Journal, run: EnvironmentRunner, name: str, num: int) -> float:
    """CPU milliseconds of an episode of the desk."""
    agent = agent_of(engine, OrderDesk, journal, run, 256)
    rows: list[Row] = [dict(OrderDesk.make_row("heldout", index)) for index in range(num // MEMBERS)]  # type: ignore[arg-type]

    async def group(index: int) -> None:
        played: type[Environment] = OrderDesk
        id = f"{name}{index:04d}"
        journal.note(Admitted(group=id, row=index, version=0, size=MEMBERS))
        plays = (run_episode(agent, played, rows[index], id=f"{id}.{member}", group_id=id) for member in range(MEMBERS))
        for outcome in await asyncio.gather(*plays):
            assert not isinstance(outcome, Failure), outcome
            assert outcome.reward == 1.0, "the oracle never errs"

    started = time.process_time()
    await asyncio.gather(*map(group, range(len(rows))))
    return 1e3 * (time.process_time() - started) / (len(rows) * MEMBERS)


async def measure(folder: Path, contexts: Sequence[int], rounds: int, num_episodes: int) -> bool:
    """Print both tables; returns whether the goal is reached."""
    journal = Journal(folder / "journal")
    journal.begin(0)
    with engine_of(folder, contexts[-1] + ROOM) as engine:
        await engine.ready()
        found = await turns(engine, journal, contexts, rounds)
        threads: list[float] = []
        inline: list[float] = []
        for number in range(rounds):
            run = ThreadRunner(timeout_s=60.0, latency_s=0.0, seed=0)
            threads.append(await episodes(engine, journal, run, f"t{number:02d}", num_episodes))
            inline.append(await episodes(engine, journal, run_inline, f"i{number:02d}", num_episodes))
    journal.close()
    first, last = contexts[0], contexts[-1]
    print(f"{'context':>10} {'ms a turn':>10} {'/ ' + str(first):>8}")
    for context, spent in found.items():
        times = median(own / of for own, of in zip(spent, found[first], strict=True))
        print(f"{context:>10,} {median(spent):>10.2f} {times:>8.2f}")
    ratio = median(own / of for own, of in zip(found[last], found[first], strict=True))
    print(f"a turn at {last:,} tokens costs {ratio:.2f} times one at {first:,}; the goal is {GOAL:g}")
    overhead = median(own / of for own, of in zip(threads, inline, strict=True))
    print(f"an episode of the desk: {median(threads):.2f} ms, {overhead:.2f} times as much as inline ({median(inline):.2f} ms)")
    return ratio <= GOAL


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--episodes", type=int, default=200)
    options = parser.parse_args()
    if min(b - a for a, b in zip([0, *options.contexts], options.contexts, strict=False)) < 20 * TURNS:
        parser.error(f"contexts ascend, by {20 * TURNS} tokens at least")
    with tempfile.TemporaryDirectory() as folder:
        reached = asyncio.run(measure(Path(folder), options.contexts, options.rounds, options.episodes))
    raise SystemExit(0 if reached else 1)


if __name__ == "__main__":
    main()
