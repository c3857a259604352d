"""Evaluates a model on the held-out rows of a recipe: an engine and environments, and no trainer.

model folder --> engine <-- turns --> environment or agent program --> outcome --> episodes.jsonl, transcripts.txt
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, chdir
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

import tomli_w

from oldlogits.config.programs import rows_in_words
from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import ENGINES, RolloutEngine
from oldlogits.core.environment import Environment, Row
from oldlogits.core.errors import ConfigError, writing
from oldlogits.core.trajectory import Sampled, Segment
from oldlogits.core.weights import FullWeights
from oldlogits.envs.delegate import BY
from oldlogits.models.forward import DTYPES
from oldlogits.models.load import load_model, named_weights
from oldlogits.record.bus import Event
from oldlogits.record.episodes import EpisodeSegment
from oldlogits.record.evaluation import EvaluatedEpisode, EvaluationSummary, Figures, failures_of, subsets_of
from oldlogits.record.events import ConversationRewritten, Warned
from oldlogits.record.folder import RunFolder, write_atomic
from oldlogits.record.jsonl import LineFile
from oldlogits.record.summary import gateway_counts
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.heldout import evaluate
from oldlogits.rollout.player import Outcome, Player, Watch
from oldlogits.rollout.turns import Failure
from oldlogits.rollout.watches import FailureWatch
from oldlogits.run.chat import chat_cautions, chat_format
from oldlogits.run.players import open_player
from oldlogits.run.run import check_task, own_error
from oldlogits.run.specs import engine_spec, server_options
from oldlogits.run.start import anchored, prepare_model
from oldlogits.run.tasks import load_tasks

_LONGEST_SUBSET = 40


class Evaluation:
    """One evaluation: `play` it, and `conclude`, also where it was cut off.

    Args:
        config: A checked recipe whose model is evaluated.
        out: The folder to write to; absent or empty.
        repeats: How often each row is played.
        greedy: Whether the likeliest tokens are taken instead of sampling at temperature 1.
        subset: The field of rows by which results are told apart; empty: none, or who plays a row of a mixture.
        note: Told what happens.
        seen: Told of every episode, and how many there are to be.

    Raises:
        ConfigError: The environment, the rows or the model do not fit.
        RunFolderError: The folder is not empty.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        repeats: int,
        greedy: bool,
        subset: str,
        note: Callable[[str], None],
        seen: Callable[[EvaluatedEpisode, int], None],
    ) -> None:
        self._out, self._repeats = out.absolute(), repeats
        self._subset = subset or (BY if config.env.mixture else "")
        self._mode: Literal["sampled", "greedy"] = "greedy" if greedy else "sampled"
        self._note, self._seen = note, seen
        env = config.env
        self._config = anchored(dataclasses.replace(config, env=dataclasses.replace(env, train_data=env.eval_data)))
        with chdir(Path()):
            self._environment_class: type[Environment] = check_task(self._config)
            self._rows = load_tasks(self._config)[1].heldout(config.eval.num_episodes)
        if not self._rows:
            got, fix = "eval.num_episodes = 0", "add --eval.num-episodes 256"
            raise ConfigError("there is nothing to evaluate", got=got, allowed="at least 1 held-out row", fix=fix)
        self._subsets = [self._subset_of(row) for row in self._rows]
        self._tasks = [_digest(row) for row in self._rows]
        self._episodes: list[EvaluatedEpisode] = []
        self._player: Player | None = None
        self._rewritten: list[ConversationRewritten] = []
        self._started = time.perf_counter()
        RunFolder(path=out).check_free(resume=False)
        with writing(self._out):
            self._out.mkdir(parents=True, exist_ok=True)
        write_atomic(self._out / "config.toml", tomli_w.dumps(dataclasses.asdict(config)))

    def play(self) -> None:
        """Play all episodes; each is written as it ends.

        Raises:
            OldLogitsError: The engine failed, or too many episodes did.
        """
        with chdir(Path()), ExitStack() as files:  # back to where it was, wherever environment code went
            episodes = files.enter_context(LineFile(self._out / "episodes.jsonl"))
            with writing(self._out):
                transcripts = files.enter_context((self._out / "transcripts.txt").open("w", encoding="utf-8", errors="replace"))
            try:
                asyncio.run(self._play(episodes, transcripts))
            except ExceptionGroup as group:
                raise own_error(group) or group from group

    def conclude(self) -> EvaluationSummary:
        """Write and return what came of the episodes that have ended."""
        episodes, success_at = self._episodes, self._config.eval.success_at
        summary = EvaluationSummary(
            model=self._config.model.path,
            target=self._config.env.program or " ".join(self._config.env.command) or self._config.env.target,
            mode=self._mode,
            success_at=success_at,
            num_rows=len(self._rows),
            repeats=self._repeats,
            num_episodes=self._repeats * len(self._rows),
            all=Figures.of(episodes, success_at, self._repeats),
            subset=self._subset,
            subsets=subsets_of(episodes, success_at, self._repeats),
            failures=failures_of(episodes),
            seconds_s=time.perf_counter() - self._started,
            gateway=gateway_counts([self._player.metrics()] if self._player else [], self._rewritten),
        )
        summary.write(self._out)
        return summary

    def emit(self, event: Event) -> None:
        """Tell a warning, and count conversations that a program has rewritten."""
        if isinstance(event, Warned):
            self._note(f"warning: {event.message}")
        elif isinstance(event, ConversationRewritten):
            self._rewritten.append(event)

    async def _play(self, episodes: LineFile, transcripts: TextIO) -> None:
        if self._config.env.is_program:
            self._note(f"rows: {rows_in_words(self._config.env, only_heldout=True)}")
        config, folder = self._config, prepare_model(self._config, self._environment_class, self._note).model
        chat = chat_format(config, folder, self._environment_class)
        for caution in chat_cautions(config, chat):
            self._note(f"warning: {caution.message}")
        decode = partial(chat.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        def tell(outcome: Outcome) -> None:
            if isinstance(outcome, Failure) and outcome.begins_again:
                return
            episode = self._episode(outcome, decode)
            self._episodes.append(episode)
            episodes.append(dataclasses.asdict(episode))
            with writing(self._out):
                transcripts.write(episode.transcript())
            self._seen(episode, self._repeats * len(self._rows))
            watch.count(outcome if isinstance(outcome, Failure) else None, 0)

        run = ThreadRunner(timeout_s=config.env.timeout_s, latency_s=config.env.latency_s, seed=config.seed)
        async with (
            open_engine(config, folder, self._out / "servers") as engine,
            open_player(config, engine, run, chat, self._environment_class, self._out / "program.log") as player,
        ):
            watch = FailureWatch(self, "episodes of the evaluation", config.rollout.max_failed_share, player.remedy)
            told = player.watched(Watch(tell=lambda made: self.emit(made(0))))
            self._player = told.evaluating(0.0 if self._mode == "greedy" else 1.0)
            await evaluate(
                self._player,
                self._rows * self._repeats,
                name="eval",
                num_running=config.eval.max_concurrent,
                tell=tell,
            )

    def _episode(self, outcome: Outcome, decode: Callable[[Sequence[int]], str]) -> EvaluatedEpisode:
        """An outcome as it is written."""
        failure = outcome if isinstance(outcome, Failure) else None
        branches = () if isinstance(outcome, Failure) else outcome
        id = failure.id if failure else branches[0].episode_id
        repeat, row = divmod(int(id.rpartition(".")[2]), len(self._rows))
        return EvaluatedEpisode(
            id=id,
            row=row,
            repeat=repeat,
            subset=self._subsets[row],
            task=self._tasks[row],
            reward=branches[0].reward if branches else None,
            failure=failure.reason if failure else "",
            stop_reason=branches[0].stop_reason if branches else "",
            num_turns=sum(branch.num_turns for branch in branches),
            branches=tuple(tuple(_segment(segment, decode) for segment in branch.segments) for branch in branches),
        )

    def _subset_of(self, row: Row) -> str:
        if not self._subset:
            return ""
        if self._subset not in row:
            fix = "name one of them, or leave --subset out"
            raise ConfigError("a row lacks the field of --subset", got=self._subset, allowed=", ".join(row), fix=fix)
        value = row[self._subset]
        return (value if isinstance(value, str) else json.dumps(value))[:_LONGEST_SUBSET] or "(empty)"


@asynccontextmanager
async def open_engine(config: RunConfig, folder: Path, messages: Path) -> AsyncIterator[RolloutEngine]:
    """Open the engine of a recipe over a model folder, without a trainer that gives it weights.

    Args:
        config: The recipe.
        folder: The model folder.
        messages: The folder for messages of servers that are started.
    """
    kind = ENGINES.find(config.engine.type)()
    async with kind.open(engine_spec(config, folder, seed=config.seed), server_options(config, messages)) as opened:
        await opened.ready()
        engine = opened.engine
        async with asyncio.TaskGroup() as beside:
            watching = beside.create_task(opened.supervise()) if opened.supervise is not None else None
            if kind.has_servers:  # which sample only with weights whose label they were given
                dtype = DTYPES[config.model.forward_dtype]
                weights = {name: tensor.to(dtype) for name, tensor in named_weights(load_model(folder)).items()}
                await engine.pause("keep", "recompute")
                await engine.update_weights(FullWeights(tensors=weights), 0)
                await engine.resume()
            yield engine
            if watching is not None:
                watching.cancel()


def _segment(segment: Segment, decode: Callable[[Sequence[int]], str]) -> EpisodeSegment:
    text, num = decode(tuple(segment.token_ids)), len(segment.token_ids)
    if not isinstance(segment, Sampled):
        return EpisodeSegment(kind="context", text=text, num_tokens=num)
    return EpisodeSegment(kind="sampled", text=text, num_tokens=num, version=segment.version, logp_mu=tuple(segment.logp_mu))


def _digest(row: Row) -> str:
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=8).hexdigest()
