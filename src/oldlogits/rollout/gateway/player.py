"""Plays the episodes of an agent program: it asks for turns as it likes, and gives a reward at its end."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

from oldlogits.core.environment import Row
from oldlogits.core.weights import PolicyVersion
from oldlogits.engines.chat_api.formats import ChatFormats
from oldlogits.engines.chat_api.wishes import Rules
from oldlogits.record.bus import Event
from oldlogits.record.events import ConversationRewritten, Warned
from oldlogits.rollout.environment_errors import EnvironmentFailed, EnvironmentLost
from oldlogits.rollout.gateway.conversations import Conversations
from oldlogits.rollout.gateway.counts import GatewayCounts
from oldlogits.rollout.gateway.listener import Gateway
from oldlogits.rollout.gateway.programs import Address, Runner
from oldlogits.rollout.player import Outcome, Player, Watch
from oldlogits.rollout.turns import Agent, Failure, Known


def _unknown_words(version: PolicyVersion) -> Event:
    message = (
        "the tokenizer has no tokens for some words of the program: the model reads unknown ones in their place; "
        "set model.path to a model that knows them"
    )
    return Warned(version=version, name="unknown_words", message=message, figures={})


def _noted(message: str, version: PolicyVersion) -> Event:
    return Warned(version=version, name="agent_program", message=message, figures={})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramPlayer(Player):
    """Plays an agent program.

    Args:
        agent: Engine, parser, limits and sampling.
        formats: How conversations are written.
        gateway: Answers what the program asks for.
        program: Runs the program.
        rules: What requests may ask.
    """

    agent: Agent
    formats: ChatFormats
    gateway: Gateway
    program: Runner
    rules: Rules
    watch: Watch = field(default_factory=Watch)
    counts: GatewayCounts = field(default_factory=GatewayCounts)
    goes_on: bool = False
    remedy: ClassVar[str] = (
        "run the program on one row against `oldlogits serve`, raise env.program_timeout_s if it is slow (program.log has what "
        "functions print)"
    )

    async def play(self, row: Row, *, id: str, group_id: str, known: Known | None = None) -> Outcome:
        """Run the program; its requests are answered until it ends.

        Raises:
            OldLogitsError: The engine ended.
        """
        talk = Conversations(id, self.agent, self.formats, self.rules, self.counts, self._tell_rewritten)
        ended_well = False
        try:
            with self.gateway.episode(talk, copy.deepcopy(row)) as address:
                reward = await self._reward(address, talk)
            await talk.close()
            branches = talk.trajectories(group_id, reward)
            if self.counts.unknown_tokens and not self.counts.is_warned:
                self.counts.is_warned = True
                self.watch.tell(_unknown_words)
            if not branches:
                raise EnvironmentFailed("the program asked for no turn: nothing was sampled")
            self.watch.drop(set(talk.ids) - {branch.id for branch in branches})
            ended_well = True
            return branches
        except EnvironmentFailed as failure:
            again, num_tokens = isinstance(failure, EnvironmentLost), talk.num_sampled
            return Failure(id=id, group_id=group_id, reason=str(failure), begins_again=again, num_tokens=num_tokens)
        finally:
            while self.program.notes:
                self.watch.tell(partial(_noted, self.program.notes.pop()))
            if not ended_well:
                await talk.close()
                self.watch.drop(talk.ids)

    def _tell_rewritten(self, trajectory: str, message: int, role: str, num_tokens: int) -> None:
        rewritten = partial(ConversationRewritten, trajectory=trajectory, message=message, role=role, num_tokens=num_tokens)
        self.watch.tell(lambda version: rewritten(version=version))

    async def _reward(self, address: Address, talk: Conversations) -> float:
        """Run the program to its end, or until its turns cannot be sampled."""
        running = asyncio.create_task(self.program.run(address))
        try:
            ends: set[asyncio.Future[float] | asyncio.Future[None]] = {running, talk.failure}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if talk.failure.done():
                talk.failure.result()
            return await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def watched(self, watch: Watch) -> Self:
        """Have the turns reported."""
        return replace(self, watch=watch, agent=replace(self.agent, report=watch.report, withdraw=watch.withdraw))

    def evaluating(self, temperature: float) -> Self:
        """Sample at the temperature, or at that of the requests."""
        agent = replace(self.agent, sampling=replace(self.agent.sampling, temperature=temperature))
        return replace(self, agent=agent, rules=replace(self.rules, honours=True), counts=GatewayCounts())

    def metrics(self) -> Mapping[str, float]:
        """Count what was asked for."""
        return self.counts.take()
