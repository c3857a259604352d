"""Replay: recorded batches are trained again, under the recorded recipe and, beside it, under another one.

recorded batch --> under the recorded recipe: OLD, THETA, masks --compared with--> what the run recorded, checkpoints
'-OLD--> under another recipe                         --compared with--> the recorded recipe: active set, gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.batch.token_table import TokenTable
from oldlogits.core.environment import is_model_folder
from oldlogits.core.errors import ReplayError, writing
from oldlogits.core.policies import OLD, find_variant
from oldlogits.loop.probe import PROBE_TOKENS
from oldlogits.models.checksums import damage_of
from oldlogits.record.folder import RunFolder
from oldlogits.record.tables import write_tokens
from oldlogits.replay.batches import RecordedBatch
from oldlogits.replay.figures import UpdateFigures, WeightsApart, change, unlike, weights_apart
from oldlogits.replay.recipes import Recipes, recipes_of_run, recipes_of_table
from oldlogits.replay.replayer import Replayer, Start
from oldlogits.replay.run_batches import check_run_tables, last_update, run_batches
from oldlogits.replay.summary import ReplaySummary
from oldlogits.replay.table_batches import table_batches, with_trainer_version
from oldlogits.run.chat import chat_format
from oldlogits.run.checkpoint import NamedModel
from oldlogits.run.start import anchored, prepare_model
from oldlogits.run.tasks import environment_of
from oldlogits.train.step import UpdateResult

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Recorded batches, and what training from them begins with.

    Args:
        path: The run folder, or the file of a neutral table.
        is_run: Whether it is a run folder.
        recipes: The recorded recipe, and the one of the replay.
        start: What it starts from.
        batches: The batches in their order, read when they are asked for.
        oldest: The version of the oldest token of each batch, and of all that follow it.
        first: The version that the first batch entered training at.
        checkpoints: The checkpoints of a run by version, whose weights are compared.
    """

    path: Path
    is_run: bool
    recipes: Recipes
    start: Start
    batches: Iterable[RecordedBatch]
    oldest: Sequence[int]
    first: int
    checkpoints: Mapping[int, Path]


def open_run(path: Path, overrides: Sequence[str], *, start_at: int, note: Note) -> Record:
    """Open a run folder, and refuse what a replay of it lacks before anything is trained.

    Raises:
        ConfigError: An override does not fit a replay, or the recipe cannot be run as written.
        ReplayError: Token tables or the checkpoint are missing or damaged.
        ModelFolderError: The run's model is not there.
    """
    folder = RunFolder(path=path)
    recipes = recipes_of_run(folder, overrides)
    recorded, last = last_update(folder), recipes.num_updates
    last = recorded if last is None else start_at + last
    if not start_at < last <= recorded:
        raise ReplayError(
            "the run has not recorded these updates",
            got=f"versions {start_at} to {last}",
            allowed=f"from 0 to {recorded}",
            fix="choose --start-at and --num-updates within the run",
        )
    oldest = check_run_tables(folder, start_at, last)
    return Record(
        path=path,
        is_run=True,
        recipes=recipes,
        start=_start_of_run(folder, recipes, start_at, note),
        batches=run_batches(folder, start_at, last, recipes.recorded.trainer.minibatches_per_update),
        oldest=list(accumulate(reversed(oldest), min))[::-1],
        first=start_at,
        checkpoints={version: one for version, one in folder.all_checkpoints().items() if version > start_at},
    )


def open_table(table: TokenTable, path: Path, overrides: Sequence[str], *, note: Note) -> Record:
    """Open a neutral token table, read from the file `path`, and refuse what a replay lacks before anything is trained.

    Raises:
        ConfigError: The recipe cannot be run as written.
        ReplayError: The table lacks what an update reads, or no model is named.
    """
    dated = with_trainer_version(table)
    if dated is not table:
        note("no trainer_version: one update, taken to begin with the newest version of its tokens")
    batches = table_batches(dated, str(path))
    staleness = max(int((one.version - one.batch.version[one.batch.loss_mask]).max()) for one in batches)
    longest = max(int(one.batch.lengths.max()) for one in batches)
    sizes = {"num_updates": len(batches), "max_staleness": max(staleness, 1), "longest": max(longest, 2)}
    recipes = recipes_of_table(overrides, **sizes)
    if recipes.num_updates is not None and not 1 <= recipes.num_updates <= len(batches):
        raise ReplayError(
            "the table does not hold these updates",
            got=f"--num-updates {recipes.num_updates}",
            allowed=f"1 to {len(batches)}, one for each trainer_version",
            fix="choose --num-updates within the table",
        )
    config = recipes.replayed
    model = NamedModel.find(config.model.path).path
    if not is_model_folder(model):
        raise ReplayError(
            "a token table does not say which model sampled its tokens",
            got=f"model.path = '{model}'",
            allowed="a model folder with the weights of the first trainer_version",
            fix="pass --model.path FOLDER",
        )
    if OLD in find_variant(config.variant).needs and any("logp_old" not in one.columns for one in batches):
        raise ReplayError(
            f"variant '{config.variant}' needs log-probs of OLD, and the table has no column logp_old",
            got=str(path),
            allowed="logp_old of every trained token, or a variant that needs none",
            fix="write the trainer's own log-probs at the version that sampled each token, or pass --variant decoupled_async",
        )
    batches = [one.in_steps(config.trainer.minibatches_per_update) for one in batches[: recipes.num_updates]]
    probe = tuple(batches[0].batch.token_ids[: batches[0].batch.lengths[0]][:PROBE_TOKENS].tolist())
    return Record(
        path=path,
        is_run=False,
        recipes=recipes,
        start=Start(model=Path(model), checkpoint=None, probe_ids=probe),
        batches=batches,
        oldest=list(accumulate(reversed([one.oldest for one in batches]), min))[::-1],
        first=batches[0].version,
        checkpoints={},
    )


async def replay(record: Record, told: Callable[[UpdateFigures], None], tokens: Path | None = None) -> ReplaySummary:
    """Train the batches of a record again.

    Args:
        record: What `open_run` or `open_table` has opened.
        told: Is told the figures of each update.
        tokens: A folder for the token tables of the replay; None: there are none.

    Raises:
        ReplayError: A batch is damaged, or its tokens are none of the model's.
        NonFiniteError: A loss or gradient is not finite.
    """
    recorded, replayed = record.recipes.recorded, record.recipes.replayed
    has_other = bool(record.recipes.changes)
    needs_old = has_other and OLD in find_variant(replayed.variant).needs
    asks_old = needs_old and OLD not in find_variant(recorded.variant).needs
    own = Replayer(recorded, record.start, is_own=record.is_run, scores_old=asks_old)
    other = Replayer(replayed, record.start, is_own=False) if has_other else None
    own.begin(record.first)
    began: list[Tensor] = []
    if other is not None:
        began = [weight.detach().clone() for weight in own.weights]
        other.begin(record.first)
        for one in (own, other):
            one.follow_gradient()
    updates: list[UpdateFigures] = []
    for batch, oldest in zip(record.batches, record.oldest, strict=True):
        old = await own.old(batch) if asks_old else None
        result = await own.train(batch, _recorded_old(batch), oldest)
        compared = None
        if other is not None:
            old = old if old is not None else np.asarray(result.table["logp_proximal"], np.float32)
            steps = replayed.trainer.minibatches_per_update
            dealt = batch if steps == recorded.trainer.minibatches_per_update else batch.in_steps(steps)
            compared = await other.train(dealt, old if needs_old else None, oldest)
        updates.append(_figures(record, batch, own, result, other, compared))
        told(updates[-1])
        if tokens is not None:
            with writing(tokens):
                tokens.mkdir(parents=True, exist_ok=True)
            write_tokens(tokens, batch.version + 1, (compared or result).table)
    return _summary(record, updates, weights_apart(began, own.weights, other.weights) if other is not None else None)


def _figures(
    record: Record,
    batch: RecordedBatch,
    own: Replayer,
    result: UpdateResult,
    other: Replayer | None,
    compared: UpdateResult | None,
) -> UpdateFigures:
    num_unlike, largest = unlike(batch.columns, result.table)
    checkpoint = record.checkpoints.get(batch.version + 1)
    changed = None
    if other is not None and compared is not None:
        changed = change(result, compared, (own.gradient, other.gradient))
    return UpdateFigures(
        version=batch.version + 1,
        num_tokens=len(result.table["token_id"]),
        loss=result.metrics["loss/value"],
        gradient_norm=result.metrics["grad/norm"],
        num_active=int(np.asarray(result.table["active_mask"]).sum()),
        num_unlike=num_unlike,
        logp_unlike_max=largest,
        checkpoint_unlike=math.nan if checkpoint is None else own.differs_from(checkpoint),
        change=changed,
    )


def _summary(record: Record, updates: Sequence[UpdateFigures], weights: WeightsApart | None) -> ReplaySummary:
    config = record.recipes.replayed
    return ReplaySummary(
        record=str(record.path),
        is_run=record.is_run,
        model=str(record.start.model),
        recipe={"variant": config.variant, "source": config.proximal.source, "band": config.band},
        changes=record.recipes.changes,
        start=record.first,
        updates=updates,
        weights=weights,
    )


def _recorded_old(batch: RecordedBatch) -> NDArray[np.float32] | None:
    """Give the OLD that a record holds: of a neutral table its own column, of a run that of the loss."""
    values = batch.columns.get("logp_old", batch.columns.get("logp_proximal"))
    return None if values is None else np.array(values, np.float32)


def _start_of_run(folder: RunFolder, recipes: Recipes, version: int, note: Note) -> Start:
    """Find what a run had at a version: its model at the start, or a checkpoint.

    Raises:
        ReplayError: There is no checkpoint of the version, or files of it are damaged.
    """
    config, checkpoints = anchored(recipes.recorded), folder.all_checkpoints()
    checkpoint = checkpoints.get(version)
    if version and checkpoint is None:
        raise ReplayError(
            f"the run has no checkpoint of version {version}",
            got=f"checkpoints of {', '.join(map(str, checkpoints)) or 'no version'}",
            allowed="0, or the version of a checkpoint",
            fix="choose one of these with --start-at",
        )
    if checkpoint is not None and (wrong := damage_of(checkpoint)):
        raise ReplayError(
            f"checkpoint {checkpoint.name} is not what was written",
            got=f"{checkpoint}: " + ", ".join(wrong),
            allowed="the files of its checksums, bit for bit",
            fix="restore it from a copy, or start at another version with --start-at",
        )
    environment = environment_of(config.env)
    from_folder = checkpoint is not None and not config.model.lora_rank  # adapters are restored on top of their base
    model = checkpoint / "model" if from_folder and checkpoint is not None else prepare_model(config, environment, note).model
    probe = chat_format(config, model, environment).prompt_ids("hello")[-PROBE_TOKENS:]  # the run's own
    return Start(model=model, checkpoint=checkpoint, probe_ids=tuple(probe))
