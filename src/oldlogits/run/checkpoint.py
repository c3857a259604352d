"""The model that a word of the command line names: a model folder, a run, one of its checkpoints, or a starting model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table, load_config, read_toml
from oldlogits.config.model_folder import check_model_folder
from oldlogits.config.schema import RunConfig
from oldlogits.core.environment import MODELS, is_model_folder
from oldlogits.core.errors import ConfigError
from oldlogits.models.checksums import check_model_sums
from oldlogits.record.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model, and what is known of it.

    Args:
        path: A model folder, or the name of a starting model.
        run: The run folder that it is of; None: it is of none.
    """

    path: str
    run: Path | None = None

    @classmethod
    def find(cls, word: str) -> Self:
        """Find it: a run folder means its newest checkpoint.

        Raises:
            ConfigError: The run has no checkpoint, or there is no starting model of that name.
            ModelFolderError: A model folder is missing, incomplete or damaged.
        """
        folder = Path(word)
        run = RunFolder(path=folder)
        if run.config.is_file():
            checkpoint = run.latest_checkpoint()
            if checkpoint is None:
                allowed, fix = "a run with a checkpoint, or a model folder", "let the run end, or set record.checkpoint_every"
                raise ConfigError("the run has no checkpoint yet", got=word, allowed=allowed, fix=fix)
            folder = checkpoint
        if (folder / "model" / "config.json").is_file():
            folder /= "model"
        elif not is_model_folder(word):
            MODELS.find(word)
            return cls(path=word)
        check_model_folder(folder, fix=f"name a run, a model folder, or a starting model ({', '.join(MODELS.names)})")
        check_model_sums(folder)
        home = folder.resolve().parents[2:3]  # of RUN/checkpoints/v000040/model
        return cls(path=str(folder), run=home[0] if home and RunFolder(path=home[0]).config.is_file() else None)

    @property
    def recipe(self) -> RunConfig | None:
        """The recipe of its run."""
        return config_from_table(read_toml(self.run / "config.toml")) if self.run is not None else None

    def load_recipe(self, recipe: Path | None, overrides: Sequence[str]) -> RunConfig:
        """Read a recipe, or that of the model's run, whose model is this one as it is.

        Raises:
            ConfigError: There is none, or it cannot be run as written.
        """
        if recipe is None and self.run is None:
            allowed = "a TOML file; a model that is of a run has its own"
            raise ConfigError("there is no recipe", got=self.path, allowed=allowed, fix="name one: recipes/desk.toml")
        read = recipe if recipe is not None else (self.run or Path()) / "config.toml"
        config = self.put_into(load_config(read, overrides, needs_model=False))
        check(config)
        return config

    def put_into(self, recipe: RunConfig) -> RunConfig:
        """Return a recipe with this model: a folder is taken as it is, without a warm start or adapters."""
        model = replace(recipe.model, path=self.path)
        if is_model_folder(self.path):
            model = replace(model, warm_start_steps=0, lora_rank=0)
        return replace(recipe, model=model)
