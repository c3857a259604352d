"""``oldlogits train RECIPE``: train an agent."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from oldlogits.backends.torchrun.launch import launched
from oldlogits.cli.main import FAILED, INTERRUPTED, print_error
from oldlogits.cli.table import wrapped
from oldlogits.config.guard import cautions
from oldlogits.config.load import load_config
from oldlogits.config.objective.presets import chosen_differently, find_preset
from oldlogits.config.programs import rows_in_words
from oldlogits.config.reader import as_written, fields_by_key
from oldlogits.config.schema import RunConfig
from oldlogits.config.shipped import shipped_recipes
from oldlogits.core.environment import Environment, is_model_folder
from oldlogits.core.errors import AbsentCheckoutError, ConfigError
from oldlogits.core.policies import find_variant
from oldlogits.record.folder import RunFolder
from oldlogits.record.live.conclusion import print_summary
from oldlogits.run.seconds import Assumptions, predict
from oldlogits.run.tasks import load_tasks

if TYPE_CHECKING:
    from oldlogits.run.run import RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Train an agent from RECIPE, a TOML file. With --resume it is the run's own config.toml unless given.

    Any recipe key is overridden by its dotted name, for example
    `--variant decoupled_async --proximal.source arrival --trainer.lr 3e-4`. `oldlogits show recipe` lists all keys.
    """

    out: Path | None = None
    """The run folder: absent or empty. Default: runs/RECIPE-DATE-TIME."""
    resume: Path | None = None
    """Go on with this run folder from its latest checkpoint; trajectories in flight restart."""
    dry_run: bool = False
    """Print the resolved recipe, what it costs in bytes, and with --assume.trainer-gpus the seconds of an update, and stop. Of
    the model folder its config.json is enough."""
    assume: Assumptions = field(default_factory=Assumptions)
    """With --dry-run: what the seconds are predicted from."""


def command(arguments: Sequence[str], prog: str = "oldlogits train RECIPE") -> int:
    """Parse, check, train, and say what came out; a rank of torchrun but the first follows the first one's trainer."""
    launch = launched()
    if launch is None:
        return _train(arguments, prog)

    from oldlogits.backends.torchrun.dispatch import follow
    from oldlogits.backends.torchrun.rendezvous import Rendezvous

    if launch.rank:
        follow(launch)
    board = Rendezvous(launch)
    try:
        return _train(arguments, prog)
    finally:
        board.end()


def _train(arguments: Sequence[str], prog: str) -> int:
    named = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    words = list(arguments[named is not None :])
    options, overrides = tyro.cli(TrainOptions, prog=prog, args=words, return_unknown_args=True)
    recipe = _recipe(named, options)
    config = load_config(recipe, overrides, needs_model=not options.dry_run)
    environment_class, absent = _check_tasks(config, may_be_absent=options.dry_run)
    if options.dry_run:
        from oldlogits.run.run import check_extras

        check_extras(config)
        return _dry_run(config, options.assume, environment_class, absent)
    out = options.resume or options.out or Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    print(f"run folder: {out}", flush=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from oldlogits.run.run import run

    with _without_echo_of_control_keys():
        result = run(config, out, resume=options.resume is not None, follow=True)
    return _conclude(result, RunFolder(path=out))


def _check_tasks(config: RunConfig, *, may_be_absent: bool) -> tuple[type[Environment] | None, list[str]]:
    """Refuse a wrong environment before torch is imported; returns it, and what could not be checked."""
    try:
        with chdir(Path()):  # back to where it was, wherever the module of an environment went
            return load_tasks(config)[0], []
    except AbsentCheckoutError as error:
        if not may_be_absent:
            raise
        return None, [f"environment      not checked: {error.got} names no checkout here"]


def _conclude(result: RunResult, folder: RunFolder) -> int:
    """Say what came out and how to go on; returns the exit status."""
    print_summary(result.summary, folder.path)
    if result.summary.ended == "done":
        return 0
    if result.error is not None:
        print_error(result.error)
    checkpoint = folder.latest_checkpoint()
    if checkpoint is not None:
        print(f"go on from the last checkpoint, {checkpoint.name}: oldlogits train --resume {folder.path}", file=sys.stderr)
    else:
        print("there is no checkpoint yet: start again, with another --out; record.checkpoint_every sets when", file=sys.stderr)
    return INTERRUPTED if result.error is None else FAILED


@contextmanager
def _without_echo_of_control_keys() -> Iterator[None]:
    """Keep the terminal from writing ^C into the live view; elsewhere nothing is done."""
    if not sys.stdin.isatty():
        yield
        return
    import termios  # Unix alone has it

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = [*before[:3], before[3] & ~termios.ECHOCTL, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def _recipe(named: Path | None, options: TrainOptions) -> Path:
    if options.resume is not None and options.out is not None:
        raise ConfigError(
            "--resume names the run folder itself", got="--resume and --out", allowed="one of them", fix="leave out --out"
        )
    if named is not None:
        return named
    if options.resume is not None:
        return options.resume / "config.toml"
    raise ConfigError(
        "the first word names no recipe",
        got="no recipe",
        allowed=f"a TOML file, or one that comes with oldlogits: {', '.join(shipped_recipes())}",
        fix="oldlogits train desk",
    )


def _dry_run(
    config: RunConfig, assumed: Assumptions, environment_class: type[Environment] | None, absent: Sequence[str]
) -> int:
    """Print the resolved recipe, where its rows come from, and its cost."""
    import tomli_w

    from oldlogits.run.chat import chat_cautions, chat_format
    from oldlogits.run.cost import estimate

    print(tomli_w.dumps(dataclasses.asdict(config)))
    variant, cost = find_variant(config.variant), estimate(config)
    lines = [f"{config.variant}: r_d = {variant.r_d}, r_s = {variant.r_s}, total ratio {variant.total}"]
    lines += _preset_in_words(config)
    known = [*cautions(config)]
    if environment_class is not None and config.env.is_program and (Path(config.model.path) / "tokenizer.json").is_file():
        known += chat_cautions(config, chat_format(config, Path(config.model.path), environment_class))
    lines += [f"warning: {caution.message}" for caution in known]
    lines += [*absent, f"rows             {rows_in_words(config.env)}"]
    lines += cost.lines(assumed.trainer_gpus) if cost is not None else _unknown(config)
    if cost is not None and assumed.trainer_gpus:
        lines += predict(config, cost, assumed).lines(config, assumed)
    for line in lines:
        print("\n".join(wrapped(line, indent="# ", later="#     ")))
    return 0


def _preset_in_words(config: RunConfig) -> list[str]:
    """What a recipe's preset stands for, and which of its keys the recipe sets otherwise."""
    if not config.objective.preset:
        return []
    preset, values = find_preset(config.objective.preset), {key: attrgetter(key)(config) for key in fields_by_key(RunConfig)}
    other = chosen_differently(config.objective.preset, values)
    lines = [f"preset {config.objective.preset}: {preset.source}"]
    for key, value in preset.keys.items():
        told = f"  {key} = {as_written(value)}"
        lines.append(told + (f", but the recipe says {as_written(other[key])}" if key in other else ""))
    return lines + ([f"  left out: {preset.leaves_out}"] if preset.leaves_out else [])


def _unknown(config: RunConfig) -> list[str]:
    folder = config.model.path
    if not is_model_folder(folder):
        return [f"bytes            unknown before {folder} has made the model, when the run begins"]
    return [
        f"bytes            unknown: there is no {folder}/config.json",
        "                 put the model's config.json there (its weights are not needed), or pass --model.path FOLDER",
    ]
