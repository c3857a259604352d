"""Tokens of a trainer with its own loop are scored at the versions that they are tagged with, or not at all."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oldlogits.core.errors import (
    ConfigError,
    LayoutError,
    ModelFolderError,
    NonFiniteError,
    StoreDamagedError,
    StoreUseError,
    TrajectoryError,
    VersionEvictedError,
)
from oldlogits.models.load import named_weights
from oldlogits.models.lora import add_adapters, write_adapters
from oldlogits.sources.tagged import LiveVersions, StoredModel, TaggedTokens, score_tagged, tee
from oldlogits.sources.weight_folders import AdapterFolders, StepFolders
from oldlogits.versions import PatchStore

from ..several_versions import SeveralVersions
from ..waiting import HUNG_S


@pytest.fixture(scope="module")
def several(tiny_folder):
    return SeveralVersions(tiny_folder)


def sequence(seed, length, versions):
    """A prompt of three tokens, then turns at these versions with a read token before each."""
    draw = np.random.default_rng(seed)
    tags = np.full(length, -1)
    for place, version in zip(np.array_split(np.arange(3, length), len(versions)), versions, strict=True):
        tags[place[1:]] = version
    return TaggedTokens(token_ids=draw.integers(3, 20, length), versions=tags, mask=tags >= 0)


def test_each_token_is_scored_at_its_own_version(several):
    sequences = [sequence(0, 30, [0, 2, 3]), sequence(1, 17, [1]), sequence(2, 25, [3, 1])]
    found = StoredModel(several.blank(), several.store(), temperature=0.7).score(sequences)
    for one, values in zip(sequences, found, strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, several.old(one.token_ids, one.versions, 0.7), atol=1e-5)
        assert not values[~one.mask].any()


def test_the_snippet_of_the_documents_scores_a_sequence(several):
    page = Path(__file__).parents[2] / "docs" / "sources.md"
    [snippet] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    one = sequence(0, 20, [0])
    names = {"PatchStore": PatchStore, "StoredModel": StoredModel, "TaggedTokens": TaggedTokens, "version": 0}
    names |= {"model": several.models[0], "second_model": several.blank()}
    names |= {"ids": one.token_ids, "versions": one.versions, "mask": one.mask}
    exec(snippet, names)
    np.testing.assert_allclose(names["old"], several.old(one.token_ids, one.versions), atol=1e-5)


def test_a_token_outside_of_the_mask_needs_no_version_that_is_held(several):
    one = sequence(0, 30, [0, 2])
    mask = one.mask & (one.versions == 2)
    store = several.store()
    store.retain(2)
    values = StoredModel(several.blank(), store).score(
        [TaggedTokens(token_ids=one.token_ids, versions=one.versions, mask=mask)]
    )
    np.testing.assert_allclose(values[0][mask], several.direct(2, one.token_ids)[mask], atol=1e-5)


def test_a_version_that_is_gone_is_an_error_that_names_it(several):
    store = several.store()
    store.retain(2)
    with pytest.raises(VersionEvictedError, match="version 1"):
        StoredModel(several.blank(), store).score([sequence(0, 20, [1, 3])])


def test_a_token_without_a_version_is_an_error_that_counts_it(several):
    one = sequence(0, 20, [1])
    tags = one.versions.copy()
    tags[-2:] = -1
    with pytest.raises(TrajectoryError, match="2 of 16 tokens"):
        StoredModel(several.blank(), several.store()).score(
            [TaggedTokens(token_ids=one.token_ids, versions=tags, mask=one.mask)]
        )


def test_lengths_that_differ_and_a_mask_on_the_first_token_are_errors():
    ids = np.arange(4)
    with pytest.raises(TrajectoryError, match=r"\(4, 3, 4\)"):
        TaggedTokens(token_ids=ids, versions=ids[:3], mask=ids > 0)
    with pytest.raises(TrajectoryError, match="first token"):
        TaggedTokens(token_ids=ids, versions=ids, mask=ids >= 0)
    ones = torch.ones(3, dtype=torch.int64)
    with pytest.raises(TrajectoryError, match="different lengths"):
        score_tagged(ones, ones.bool(), lambda version: torch.zeros(2))


@pytest.mark.parametrize("name", ["token_ids", "versions", "mask"])
@pytest.mark.parametrize("wrong", [list, torch.from_numpy, lambda array: array + 0.5, lambda array: array[None]])
def test_what_is_no_array_of_whole_numbers_or_flags_is_an_error_that_names_it(name, wrong):
    given = {"token_ids": np.arange(3, 7), "versions": np.ones(4, np.int64), "mask": np.arange(4) > 0}
    with pytest.raises(TrajectoryError, match=f"no such {name}"):
        TaggedTokens(**given | {name: wrong(given[name])})


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_that_the_model_does_not_have_is_an_error_that_names_it(several, token):
    one = sequence(0, 20, [1])
    ids = np.where(np.arange(20) == 5, token, one.token_ids)
    with pytest.raises(TrajectoryError, match=f"token {token}, and 0 more"):
        StoredModel(several.blank(), several.store()).score([replace(one, token_ids=ids)])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_no_token_is_sampled_at_is_refused(several, temperature):
    with pytest.raises(ConfigError, match=f"temperature={temperature}"):
        StoredModel(several.blank(), several.store(), temperature=temperature)


def test_a_log_prob_that_is_no_number_is_an_error():
    ones = torch.ones(2, dtype=torch.int64)
    with pytest.raises(NonFiniteError, match="1 of 2"):
        score_tagged(ones, ones.bool(), lambda version: torch.tensor([-1.0, torch.nan]))


def test_versions_are_asked_for_once_each_and_newest_first():
    asked = []
    versions, mask = torch.tensor([4, 1, 4, 7, -1]), torch.tensor([True, True, True, True, False])

    def score_at(version):
        asked.append(version)
        return torch.full((5,), -float(version))

    assert score_tagged(versions, mask, score_at).tolist() == [-4, -1, -4, -7, 0]
    assert asked == [7, 4, 1]


def test_a_version_of_another_model_is_refused(several):
    store = several.store(1)
    store2 = type(store)()
    store2.publish(0, {"model.other": torch.zeros(2)})
    with pytest.raises(LayoutError, match=r"model\.other"):
        StoredModel(several.blank(), store2).score([sequence(0, 12, [0])])


def test_a_module_that_is_lent_a_version_has_its_own_weights_again_whatever_happens(several):
    module = several.blank()
    live = LiveVersions(module)
    for version in range(3):
        module.load_state_dict(several.models[version].state_dict())
        live.publish(version)
    module.load_state_dict(several.models[3].state_dict())  # in the middle of an update
    ids = sequence(0, 12, [0]).token_ids
    with live.lent(1):
        found = module(torch.from_numpy(ids)[None]).logits
    assert torch.equal(found, several.models[1](torch.from_numpy(ids)[None]).logits)
    with pytest.raises(ZeroDivisionError), live.lent(0):
        raise ZeroDivisionError
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, several.weights(3)[name])


def test_the_same_version_with_other_weights_is_refused(several):
    module = several.blank()
    live = LiveVersions(module)
    live.publish(0)
    live.publish(0)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    with pytest.raises(StoreUseError, match="published already"):
        live.publish(0)


def test_a_stream_passes_through_and_is_copied():
    source = {"a": torch.ones(2), "b": torch.arange(2)}
    into: dict[str, torch.Tensor] = {}
    out = dict(tee(source.items(), into, device=torch.device("cpu"), dtype=torch.bfloat16))
    source["a"].zero_()
    assert out["a"] is source["a"]
    assert into["a"].tolist() == [1, 1]
    assert into["a"].dtype == torch.bfloat16
    assert into["b"].dtype == torch.int64


def write_step(folder, step, weights, *, marker=True):
    place = folder / f"step_{step}"
    place.mkdir(parents=True)
    save_file({name: tensor.detach().clone() for name, tensor in weights.items()}, place / "model.safetensors")
    if marker:
        (place / "STABLE").touch()
    return place


def test_a_step_is_there_once_its_marker_is(tmp_path):
    steps = StepFolders(tmp_path, prefix="step_", marker="STABLE")
    assert steps.versions == ()
    write_step(tmp_path, 3, {"a": torch.ones(1)})
    write_step(tmp_path, 10, {"a": torch.ones(1)}, marker=False)
    for name in ("step_04", "step_x", "other_5", "step_-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "STABLE").touch()
    assert steps.versions == (3,)
    assert steps.read(3)["a"].tolist() == [1]
    with pytest.raises(VersionEvictedError, match="version 10"):
        steps.read(10)


def test_what_is_no_plain_file_of_finite_tensors_is_refused(tmp_path):
    steps = StepFolders(tmp_path, prefix="step_", marker="STABLE")
    (write_step(tmp_path, 1, {"a": torch.ones(1)}) / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(StoreDamagedError, match="cannot be read"):
        steps.read(1)
    write_step(tmp_path, 2, {"a": torch.tensor([torch.nan])})
    with pytest.raises(ModelFolderError, match="NaN"):
        steps.read(2)
    place = write_step(tmp_path, 3, {"a": torch.ones(1)})
    (place / "more.safetensors").symlink_to(tmp_path / "step_2" / "model.safetensors")
    with pytest.raises(StoreDamagedError, match="a link"):
        steps.read(3)
    place = write_step(tmp_path, 4, {"a": torch.ones(1)})
    save_file({"a": torch.ones(1)}, place / "other.safetensors")
    with pytest.raises(StoreDamagedError, match="a second time"):
        steps.read(4)
    (write_step(tmp_path, 5, {"a": torch.ones(1)}) / "model.safetensors").unlink()
    with pytest.raises(StoreDamagedError, match="no tensor"):
        steps.read(5)
    (tmp_path / "step_6").symlink_to(tmp_path / "step_3")
    assert steps.versions == (1, 2, 3, 4, 5)


def test_adapters_on_disk_score_as_the_model_that_has_them(tmp_path, several):
    sizes, models = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}, {}
    for version in (1, 2):
        models[version] = copy.deepcopy(several.models[0])
        add_adapters(models[version], **sizes)
        draw = torch.Generator().manual_seed(version)
        for weight in named_weights(models[version]).values():
            weight.normal_(0, 0.1, generator=draw)
        write_adapters(tmp_path / f"policy-v{version}", named_weights(models[version]), **sizes, base="somewhere")
    scoring = copy.deepcopy(several.models[0])
    add_adapters(scoring, **sizes)
    one = sequence(0, 24, [1, 2])
    held = AdapterFolders(StepFolders(tmp_path, prefix="policy-v"))
    values = StoredModel(scoring, held).score([one])[0]
    ids = torch.from_numpy(one.token_ids)
    for version, model in models.items():
        with torch.no_grad():
            wanted = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
        place = np.flatnonzero(one.versions == version)
        np.testing.assert_allclose(values[place], wanted[place - 1], atol=1e-5)
    with pytest.raises(VersionEvictedError, match="version 9"), held.checkout(9):
        pass


RANKS = """
import sys, torch, torch.distributed as dist
from oldlogits.core.errors import TrajectoryError
from oldlogits.sources.tagged import score_tagged
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
asked = []
def score_at(version):
    total = torch.tensor([float(version)])
    dist.all_reduce(total)  # a sharded forward pass: all ranks or none
    asked.append(version)
    return torch.full((2,), total.item())
own = torch.tensor([[5, 3], [3, 4]][rank])
print(score_tagged(own, torch.ones(2, dtype=torch.bool), score_at).tolist(), asked)
try:
    score_tagged(torch.tensor([[5, 3], [3, -1]][rank]), torch.ones(2, dtype=torch.bool), score_at)
except TrajectoryError as error:
    print(error.got, len(asked))
"""


@pytest.mark.slow
def test_ranks_score_every_version_that_one_of_them_has_and_fail_together(tmp_path):
    commands = [[sys.executable, "-c", RANKS, str(rank), str(tmp_path / "meet")] for rank in range(2)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    first, second = (process.communicate(timeout=HUNG_S)[0].splitlines() for process in started)
    assert first[0] == "[10.0, 6.0] [5, 4, 3]"
    assert second[0] == "[6.0, 8.0] [5, 4, 3]"
    assert first[1] == second[1] == "1 of 2 tokens of the mask tagged below 0 3"


def test_a_version_without_some_tensors_is_refused_and_never_keeps_those_of_another_one(several, tmp_path):
    weights = dict(named_weights(several.blank()))
    name = sorted(weights)[0]
    for version, held in enumerate((weights, {key: tensor for key, tensor in weights.items() if key != name})):
        (tmp_path / f"step_{version}").mkdir()
        save_file({key: tensor.clone() for key, tensor in held.items()}, tmp_path / f"step_{version}" / "model.safetensors")
    scorer = StoredModel(several.blank(), AdapterFolders(StepFolders(tmp_path, prefix="step_")))
    with pytest.raises(LayoutError, match=f"(?s)two versions are not of the same tensors.*{name}"):
        scorer.score([sequence(0, 30, [0, 1])])


def test_a_folder_that_lacks_a_shard_of_its_index_is_refused(several, tmp_path):
    weights = dict(named_weights(several.blank()))
    names = sorted(weights)
    (tmp_path / "step_0").mkdir()
    index = {"weight_map": {name: f"model-0000{1 + (name == names[0])}-of-00002.safetensors" for name in names}}
    (tmp_path / "step_0" / "model.safetensors.index.json").write_text(json.dumps(index))
    part = {name: weights[name].clone() for name in names[1:]}
    save_file(part, tmp_path / "step_0" / "model-00001-of-00002.safetensors")
    with pytest.raises(StoreDamagedError, match=names[0]):
        StepFolders(tmp_path, prefix="step_").read(0)
    save_file({names[0]: weights[names[0]].clone()}, tmp_path / "step_0" / "model-00002-of-00002.safetensors")
    assert set(StepFolders(tmp_path, prefix="step_").read(0)) == set(names)
    (tmp_path / "step_0" / "model.safetensors.index.json").write_text("{")
    with pytest.raises(StoreDamagedError, match="index"):
        StepFolders(tmp_path, prefix="step_").read(0)
