"""The model that a word of the command line names, and the recipe that it plays by."""

import shutil
from dataclasses import asdict

import pytest

from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.record.folder import RunFolder
from oldlogits.run.checkpoint import NamedModel

from ..runs import recipe, write_recipe


@pytest.fixture
def run(tiny_folder, tmp_path):
    """A run with the checkpoints 2 and 10, whose recipe began with a warm start and trained adapters."""
    folder = RunFolder.create(tmp_path / "run")
    config = recipe(tiny_folder, env={"parser": "hermes"}, model={"lora_rank": 2})
    folder.write_config(asdict(config))
    for version in (2, 10):
        partial = folder.begin_checkpoint(version)
        shutil.copytree(tiny_folder, partial / "model", dirs_exist_ok=True)
        folder.name_checkpoint(partial)
    return folder.path


def test_a_run_is_its_newest_checkpoint_and_a_checkpoint_and_its_model_are_themselves(run):
    words = (run, run / "checkpoints/v000010", run / "checkpoints/v000002", run / "checkpoints/v000002/model")
    found = [NamedModel.find(str(word)) for word in words]
    versions = ["v000010", "v000010", "v000002", "v000002"]
    assert [one.path for one in found] == [str(run / "checkpoints" / version / "model") for version in versions]
    assert {one.run for one in found} == {run}
    assert {one.recipe.env.parser for one in found} == {"hermes"}


def test_a_model_folder_and_a_starting_model_are_of_no_run(tiny_folder):
    assert NamedModel.find(str(tiny_folder)) == NamedModel(path=str(tiny_folder))
    assert NamedModel.find("tiny") == NamedModel(path="tiny")
    with pytest.raises(ConfigError, match="there is no recipe"):
        NamedModel.find("tiny").load_recipe(None, ())


def test_a_checkpoint_is_taken_as_it_is_without_a_warm_start_or_adapters(run, tiny_folder, tmp_path):
    written = write_recipe(tmp_path / "recipe.toml", recipe(tiny_folder, model={"lora_rank": 2}))
    config = NamedModel.find(str(run)).load_recipe(written, ["--env.max-turns", "3"])
    assert config.model.path == str(run / "checkpoints/v000010/model")
    assert (config.model.warm_start_steps, config.model.lora_rank, config.env.max_turns) == (0, 0, 3)
    own = NamedModel.find(str(run)).load_recipe(None, ())
    assert (own.env.parser, own.model) == ("hermes", config.model)


def test_what_names_no_model_is_refused(tmp_path, tiny_folder):
    with pytest.raises(ModelFolderError, match="no folder"):
        NamedModel.find(str(tmp_path / "gone"))
    empty = RunFolder.create(tmp_path / "run")
    empty.write_config(asdict(recipe(tiny_folder)))
    with pytest.raises(ConfigError, match="the run has no checkpoint yet"):
        NamedModel.find(str(empty.path))
