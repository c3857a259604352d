"""The tasks of a run: rows of a file, or rows that the environment class makes."""

from __future__ import annotations

import codecs
import inspect
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

from oldlogits.core.environment import Environment, FiniteRowSource, Row, RowSource, Split
from oldlogits.core.errors import ConfigError, EnvironmentShapeError, reading
from oldlogits.envs.delegate import BY
from oldlogits.envs.rows import row_misfit

ROWS_PER_SEED = 1_000_000
"""Training rows that a class makes are numbered from seed * ROWS_PER_SEED, so that runs of other seeds see others."""
_FINEST = 1000
"""The finest share of a weight that is told apart."""
_LONGEST = 200
"""Characters of a row that an error quotes."""


class TaskDataset:
    """Training rows in an order that depends on the seed, and held-out rows that are the same for every seed.

    Args:
        environment_class: The class that plays the rows; it makes them as well where no file is named.
        seed: The run's seed.
        train_data: A JSONL file of training rows.
        eval_data: A JSONL file of held-out rows.
        needs_heldout: Whether the run evaluates, so that held-out rows must be there.
        any_row: Whether rows of a file need not fit `reset`: an agent program plays them.

    Raises:
        ConfigError: There are no rows, or a file holds something else than JSON objects that fit `reset`.
        EnvironmentShapeError: The first row that the class makes does not fit its `reset`.
    """

    def __init__(
        self,
        environment_class: type[Environment],
        *,
        seed: int,
        train_data: str = "",
        eval_data: str = "",
        needs_heldout: bool = True,
        any_row: bool = False,
    ) -> None:
        self._seed, self._class = seed, environment_class
        self._files: dict[Split, list[Row]] = {}
        self._order: tuple[int, list[int]] = (-1, [])  # of the file's rows, in one pass
        files: tuple[tuple[Split, str], ...] = (("train", train_data), ("heldout", eval_data))
        for split, name in files:
            if name:
                self._files[split] = _read(Path(name), None if any_row else environment_class)
            elif isinstance(environment_class, FiniteRowSource) and environment_class.rows[split]:
                self._files[split] = environment_class.rows[split]
            elif split == "train" or needs_heldout:
                self._require_own_rows(split)
                self._own(split, seed * ROWS_PER_SEED if split == "train" else 0)

    def train(self, index: int) -> Row:
        """Training row `index`, from 0; rows of a file are shuffled anew in every pass."""
        if "train" not in self._files:
            return self._own("train", self._seed * ROWS_PER_SEED + index)
        rows = self._files["train"]
        epoch, place = divmod(index, len(rows))
        if self._order[0] != epoch:
            self._order = (epoch, random.Random(f"{self._seed}/{epoch}").sample(range(len(rows)), len(rows)))
        return rows[self._order[1][place]]

    def heldout(self, num: int) -> list[Row]:
        """The first `num` held-out rows; fewer where a file holds fewer: a row that is played twice is no second task."""
        rows = self._files.get("heldout")
        return rows[:num] if rows else [self._own("heldout", i) for i in range(num)]

    def environments_of(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The environment of a mixture that plays each row; empty where there is only one."""
        return ()

    def _own(self, split: Split, index: int) -> Row:
        try:
            row = cast(type[RowSource], self._class).make_row(split, index)
        except NotImplementedError as error:  # of a base class: there is none
            raise self._no_rows(split) from error
        except Exception as error:  # the user's code: what it raises is told as such
            raise EnvironmentShapeError(
                f"{self._class.__name__}.make_row('{split}', {index}) raised",
                got=f"{type(error).__name__}: {error}",
                allowed="a row for every index >= 0: training begins at seed * 1,000,000 and has no end",
                fix="take the index modulo the number of tasks",
            ) from error
        if misfit := row_misfit(self._class, row):
            raise EnvironmentShapeError(
                f"{self._class.__name__}.make_row('{split}', {index}) does not fit reset",
                got=f"{misfit}: {repr(row)[:_LONGEST]}",
                allowed=f"a dict of the arguments of reset{_takes(self._class)}",
                fix="return what reset takes, or correct its parameters",
            )
        return row

    def _require_own_rows(self, split: Split) -> None:
        if not hasattr(self._class, "make_row"):
            raise self._no_rows(split)

    def _no_rows(self, split: Split) -> ConfigError:
        key = "env.train_data" if split == "train" else "env.eval_data"
        return ConfigError(
            f"{self._class.__name__} makes no rows and the recipe names none",
            got=f"{key} = ''",
            allowed=f"{key} = FILE.jsonl, or a static method make_row(split, index) -> dict",
            fix=f"write a JSONL file of reset(**row) arguments and set {key}"
            + (", or eval.num_episodes = 0 and eval.every = 0" if split == "heldout" else ""),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows:
    """The rows of one environment of a mixture, and its weight."""

    rows: TaskDataset
    weight: float


class MixtureDataset(TaskDataset):
    """Rows of several environments, each with the key that says which one plays it.

    Rows come in blocks in which every environment has as many as its weight says, in an order that depends on the seed; each
    environment's own rows follow each other as if it were alone.

    Args:
        parts: The rows of each environment, by its name.
        seed: The run's seed.
    """

    def __init__(self, parts: Mapping[str, MixedRows], *, seed: int) -> None:
        self._parts, self._seed = parts, seed
        shares = [Fraction(part.weight).limit_denominator(_FINEST) or Fraction(1, _FINEST) for part in parts.values()]
        whole = math.lcm(*(share.denominator for share in shares))
        counts = [int(share * whole) for share in shares]
        common = math.gcd(*counts)
        self._counts = {name: count // common for name, count in zip(parts, counts, strict=True)}
        places = sorted(((i + 0.5) / count, name) for name, count in self._counts.items() for i in range(count))
        self._block = [name for _, name in places]  # evenly spread

    def train(self, index: int) -> Row:
        """Training row `index`, from 0."""
        block, place = divmod(index, len(self._block))
        order = random.Random(f"mixture {self._seed}/{block}").sample(self._block, len(self._block))
        name = order[place]
        return self._marked(name, self._parts[name].rows.train(block * self._counts[name] + order[:place].count(name)))

    def heldout(self, num: int) -> list[Row]:
        """The first `num` held-out rows, spread by weight; those of an environment that has fewer are left out."""
        order = [self._block[i % len(self._block)] for i in range(num)]
        rows = {name: iter(part.rows.heldout(order.count(name))) for name, part in self._parts.items()}
        found = ((name, next(rows[name], None)) for name in order)
        return [self._marked(name, row) for name, row in found if row is not None]

    def environments_of(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The environment that plays each row."""
        return tuple(str(row[BY]) for row in rows)

    def _marked(self, name: str, row: Row) -> Row:
        if BY in row:
            raise ConfigError(
                f"a row of the mixture has the key {BY}, which says who plays it",
                got=f"{name}: {repr(row)[:_LONGEST]}",
                allowed=f"rows without the key {BY}",
                fix="rename it, in the rows and in reset",
            )
        return {BY: name, **row}


def _takes(environment_class: type[Environment]) -> str:
    return str(inspect.signature(environment_class.reset))


def _read(path: Path, environment_class: type[Environment] | None) -> list[Row]:
    """The rows of a file. A line ends at a newline and nowhere else: JSON may hold U+2028 and its like as they are."""
    allowed, fix = "a JSONL file in UTF-8: one object of the arguments of reset a line", "correct it"
    rows: list[Row] = []
    with reading(ConfigError, "a file of rows cannot be read", got=str(path), allowed=allowed, fix="name a file that is there"):
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        with reading(ConfigError, "a row is no JSON", got=f"{path}:{number}", allowed=allowed, fix=fix):
            row = json.loads(line.decode("utf-8"))
        if not isinstance(row, dict):
            got = f"{path}:{number}: {line.decode()[:_LONGEST]}"
            raise ConfigError("a row is no object", got=got, allowed=allowed, fix=fix)
        if environment_class is not None and (misfit := row_misfit(environment_class, row)):
            raise ConfigError(
                f"a row does not fit {environment_class.__name__}.reset",
                got=f"{path}:{number}: {misfit}",
                allowed=f"the arguments of reset{_takes(environment_class)}",
                fix="correct the row, or name another env.target",
            )
        rows.append(row)
    if not rows:
        raise ConfigError("a file of rows is empty", got=str(path), allowed="at least one row", fix="add rows")
    return rows
