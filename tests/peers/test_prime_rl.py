"""prime-rl's loss interface and broadcasts. Its package is not on the index: its types are written down from its documentation,
but for the graph of a trace, which is verifiers' own."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from verifiers.v1.graph import MessageNode
from verifiers.v1.trace import Branch
from verifiers.v1.types import AssistantMessage, UserMessage

from oldlogits.core.errors import LayoutError, MissingLogprobError, StoreDamagedError, TrajectoryError, VersionEvictedError
from oldlogits.integrations.prime_rl import OldScorer, exact_loss

from .conftest import BAND

pytestmark = pytest.mark.peers


@dataclass
class Inputs:
    """The fields that prime-rl documents for `LossInputs`."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@pytest.fixture
def broadcasts(tmp_path, several):
    """The folder in which a trainer broadcasts, so far with versions 0 and 1."""
    for version in range(2):
        broadcast(tmp_path, several, version)
    return tmp_path


def broadcast(folder, several, version, *, is_whole=True):
    """Two files, as a trainer of several ranks writes them, then the marker."""
    place = folder / f"step_{version}"
    place.mkdir()
    items = [(name, weight.detach().clone()) for name, weight in several.weights(version).items()]
    for part in range(2):
        save_file(dict(items[part::2]), place / f"model-{part}.safetensors", metadata={"format": "pt"})
    if is_whole:
        (place / "STABLE").touch()


def branch(seed=0):
    """Token ids, mask and versions of a branch: a prompt, a turn at version 0, a tool's answer, a turn at versions 0 and 2."""
    tags = np.array([-1] * 4 + [0] * 6 + [-1] * 3 + [0] * 2 + [2] * 6)
    return np.random.default_rng(seed).integers(3, 20, len(tags)), tags >= 0, tags


def test_old_follows_the_broadcasts_at_each_tokens_version(broadcasts, several):
    scorer = OldScorer(broadcasts, several.blank())
    assert scorer.follow() == [0, 1]
    broadcast(broadcasts, several, 2, is_whole=False)
    assert scorer.follow() == []
    (broadcasts / "step_2" / "STABLE").touch()
    assert scorer.follow() == [2]
    ids, mask, tags = branch()
    found = scorer.score(ids.tolist(), mask.tolist(), tags.tolist())
    np.testing.assert_allclose(found, several.old(ids, tags), atol=1e-5)


def test_the_values_fit_the_nodes_of_a_trace(broadcasts, several):
    """prime-rl projects branch-aligned values onto `reference_logprobs`: those of the sampled tokens of each node, in order."""
    broadcast(broadcasts, several, 2)
    scorer = OldScorer(broadcasts, several.blank())
    scorer.follow()
    ids, mask, tags = branch()
    values = scorer.score(ids.tolist(), mask.tolist(), tags.tolist())
    nodes, start = [], 0
    for length, sampled in ((4, False), (6, True), (3, False), (8, True)):
        place = slice(start, start + length)
        said = AssistantMessage(content="w1") if sampled else UserMessage(content="w1")
        node = MessageNode(message=said, token_ids=ids[place].tolist(), mask=mask[place].tolist(), sampled=sampled)
        node.reference_logprobs = values[place] if sampled else None
        nodes.append(node)
        start += length
    branch_of = Branch(index=0, nodes=nodes)
    assert branch_of.token_ids == ids.tolist()
    np.testing.assert_allclose(branch_of.reference_logprobs, several.old(ids, tags), atol=1e-5)


def batch(several, noise):
    ids, mask, tags = branch(3)
    old, theta = (torch.from_numpy(v).float() for v in (several.old(ids, tags), several.direct(3, ids)))
    mu, keep = old + noise(old.shape, 1), torch.from_numpy(mask)
    advantages = torch.from_numpy(np.where(np.arange(len(ids)) % 3, 1.0, -0.8)).float()
    return mu, old, theta.requires_grad_(), advantages, keep


def test_the_loss_is_the_objective_summed_over_a_sample(several, noise, objective):
    mu, old, theta, advantages, mask = batch(several, noise)
    out = exact_loss(Inputs(theta, mu, old, advantages, mask), band=BAND)
    scale = int(mask.sum())  # prime-rl divides the sums of all samples by the number of their tokens
    wanted = objective(mu, old, theta, advantages, mask)
    assert (out.loss / scale).item() == pytest.approx(wanted.item(), abs=1e-6)
    (theirs,), (ours,) = (torch.autograd.grad(one, theta) for one in (out.loss / scale, wanted))
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-5)
    assert all(metric.dim() == 0 for metric in out.metrics.values())
    weighted = exact_loss(Inputs(theta, mu, old, advantages, mask, torch.full_like(mu, 0.5)), band=BAND)
    assert weighted.loss.item() == pytest.approx(0.5 * out.loss.item(), abs=1e-6)


def test_old_logits_that_are_not_there_are_an_error_and_never_the_zeros_of_packing(several, noise):
    mu, old, theta, advantages, mask = batch(several, noise)
    one_message = torch.where(torch.arange(len(old)) < 12, old, 0.0)
    for absent in (None, torch.zeros_like(old), one_message):
        with pytest.raises(MissingLogprobError, match="no old logits"):
            exact_loss(Inputs(theta, mu, absent, advantages, mask))
    with pytest.raises(TrajectoryError, match="different lengths"):
        exact_loss(Inputs(theta, mu[:-1], old, advantages, mask))


def test_a_version_that_was_dropped_or_never_taken_and_a_missing_tag_are_errors(broadcasts, several):
    scorer = OldScorer(broadcasts, several.blank())
    scorer.follow()
    ids, mask, tags = (one.tolist() for one in branch())
    with pytest.raises(VersionEvictedError, match="version 2"):
        scorer.score(ids, mask, tags)
    with pytest.raises(TrajectoryError, match="14 tokens"):
        scorer.score(ids, mask, [-1] * len(tags))
    with pytest.raises(TrajectoryError, match="different lengths"):
        scorer.score(ids, mask, tags[:-1])


def test_what_is_not_a_trainers_broadcast_is_refused_at_the_door(broadcasts, several):
    scorer = OldScorer(broadcasts, several.blank())
    scorer.follow()
    (broadcasts / "step_2").mkdir()
    (broadcasts / "step_2" / "model.safetensors").write_bytes(b"no tensors")
    (broadcasts / "step_2" / "STABLE").touch()
    with pytest.raises(StoreDamagedError, match="step_2"):
        scorer.follow()
    save_file({"model.other": torch.zeros(1)}, broadcasts / "step_2" / "model.safetensors")
    with pytest.raises(LayoutError):
        scorer.follow()
    assert scorer.store.versions == (0, 1)
