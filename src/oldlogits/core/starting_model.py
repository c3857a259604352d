"""The seam of starting models: what makes the Hugging Face folder that a run starts from.

`model.path` is a folder, a built-in name of `MODELS`, or "package.module:function". A function is enough; an object that is
called may say more about its model (`DescribedModel`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol, runtime_checkable

from oldlogits.core.registry import Registry

Progress = Callable[[int, int, float], None]
"""A function that is called after every training step with the steps done, all steps, and the loss in nats per token."""

_IMPORT_PATH: Final = re.compile(r"[\w.]+:[\w.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOrder:
    """What is known of a run before its model folder exists.

    Args:
        steps: Supervised steps before the run (`model.warm_start_steps`); "auto" leaves the number to the maker.
        parser: Name of the tool-call parser that will read the model's turns.
        folder: The model folder to begin with; empty where the maker begins with a model of its own.
        cache: The folder for folders that are kept from run to run.
        note: Called with a line of text before a part of the work that takes time.
    """

    seed: int
    steps: int | Literal["auto"]
    environment: type
    parser: str
    folder: str = ""
    cache: Path
    progress: Progress = lambda step, num_steps, loss: None
    note: Callable[[str], None] = lambda said: None


class StartingModel(Protocol):
    """Makes a model folder."""

    def __call__(self, order: ModelOrder) -> Path:
        """Make the folder, or find it in the cache; return its path."""


@runtime_checkable
class DescribedModel(Protocol):
    """A starting model that says before it is made which environment it fits and how large it will be."""

    @property
    def only_environment(self) -> type:
        """The environment class whose words the model knows; it can play this class and its subclasses."""

    def architecture(self) -> object:
        """Return the Hugging Face config of the model, for the estimate of bytes."""


MODELS: Final[Registry[StartingModel]] = Registry(
    "starting model",
    key="model.path",
    builtin={
        "tiny": "order_desk.starting_models:tiny",
        "tiny-moe": "order_desk.starting_models:tiny_moe",
        "smollm2": "order_desk.smollm2:smollm2",
    },
)
"""The starting models that `model.path` names."""


def is_model_folder(path: str) -> bool:
    """Return whether `model.path` names a folder, and not something that makes one."""
    return path not in MODELS.names and not _IMPORT_PATH.fullmatch(path)
