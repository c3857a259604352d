"""Old logits for a trainer that has a loop of its own: each sampled token is scored at the version that it is tagged with.

    versions [token], mask --> the distinct ones, newest first --> weights of each --> one forward pass --> its own tokens

Two things can make the forward pass: a second module that reads the store's resident copy (`StoredModel`), or the trainer's own
module, which is lent the weights of a stored version (`LiveVersions`) and then computes in its own layout and precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from oldlogits.batch.sequences import pack
from oldlogits.core.errors import ConfigError, LayoutError, NonFiniteError, TrajectoryError
from oldlogits.core.objective.shapes import Bool, Float, Int
from oldlogits.core.scoring import ScoringSpan
from oldlogits.core.weights import PolicyVersion
from oldlogits.models.load import named_weights
from oldlogits.models.scorer import score_tokens
from oldlogits.versions import PatchStore


class HeldVersions(Protocol):
    """What holds weights of several versions: a `PatchStore`, or a folder."""

    def checkout(self, version: PolicyVersion) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Give the weights of a version by name, for reading inside the block.

        Raises:
            VersionEvictedError: The version is not held.
        """

    def retain(self, oldest_needed: PolicyVersion) -> list[PolicyVersion]:
        """Drop what is older, where it is this that drops versions, and return the dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedTokens:
    """One sequence, and the versions that sampled tokens of it.

    Args:
        token_ids: int64 [token].
        versions: int64 [token]; -1 where nothing was sampled.
        mask: bool [token]; the tokens to score, the first one not among them.
    """

    token_ids: NDArray[np.int64]
    versions: NDArray[np.int64]
    mask: NDArray[np.bool_]

    def __post_init__(self) -> None:
        held = {"token_ids": (self.token_ids, "iu"), "versions": (self.versions, "iu"), "mask": (self.mask, "b")}
        for name, (values, kinds) in held.items():
            is_array = isinstance(values, np.ndarray)
            if not is_array or values.ndim != 1 or values.dtype.kind not in kinds:
                raise TrajectoryError(
                    f"a sequence has no such {name}",
                    got=f"{values.dtype} {values.shape}" if is_array else type(values).__name__,
                    allowed="NumPy arrays [token]: integers, and bools for the mask",
                    fix="pass np.asarray(token_ids, np.int64), np.asarray(versions, np.int64), np.asarray(mask, bool)",
                )
        lengths = len(self.token_ids), len(self.versions), len(self.mask)
        if len(set(lengths)) > 1:
            raise lengths_differ("token_ids, versions and mask", lengths)
        if len(self.mask) and self.mask[0]:
            raise TrajectoryError(
                "the first token of a sequence cannot be scored",
                got="a mask that begins with True",
                allowed="a prompt of at least one token",
                fix="align the mask with the tokens: entry i is token i's, not its successor's",
            )


def lengths_differ(what: str, got: object) -> TrajectoryError:
    """Make the error for values of one sequence that are not as many as its tokens."""
    fix = "give one value a token; where an engine returned fewer log-probs than tokens, drop that rollout"
    return TrajectoryError(f"{what} have different lengths", got=str(got), allowed="one length", fix=fix)


def score_tagged(
    versions: Int[Tensor, "*batch"], mask: Bool[Tensor, "*batch"], score_at: Callable[[PolicyVersion], Float[Tensor, "*batch"]]
) -> Float[Tensor, "*batch"]:
    """Score each token of a mask at its own version: one call for each distinct version, newest first.

    In a process group all ranks make this call, and each of them scores every version that any of them has tokens of, so that
    the forward passes of a sharded model meet.

    Args:
        versions: The version that sampled each token; outside of the mask it is not looked at.
        mask: The tokens to score.
        score_at: Gives natural-log probs of all tokens at a version; of these only the version's own are taken.

    Returns:
        float32, 0 outside of the mask.

    Raises:
        TrajectoryError: Shapes differ, or a token of the mask has no version.
        NonFiniteError: A log-prob is NaN or infinite.
        VersionEvictedError: By `score_at`, where a version is gone.
    """
    needed: set[PolicyVersion] = set(versions[mask].tolist()) if versions.shape == mask.shape else set()
    problem = None
    if versions.shape != mask.shape:
        problem = lengths_differ("versions and mask", f"{tuple(versions.shape)} and {tuple(mask.shape)}")
    elif min(needed, default=0) < 0:
        problem = TrajectoryError(
            "sampled tokens have no version",
            got=f"{int((versions[mask] < 0).sum())} of {int(mask.sum())} tokens of the mask tagged below 0",
            allowed="the version that sampled it, from 0, for each of them",
            fix="record the version of every turn, or take these tokens out of the mask",
        )
    out = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    for version in sorted(_of_all_ranks(needed, problem), reverse=True):
        values = score_at(version).detach()
        if values.shape != mask.shape:
            raise lengths_differ("log-probs and mask", f"{tuple(values.shape)} and {tuple(mask.shape)}")
        out = torch.where(mask & (versions == version), values.to(out), out)
    if not out.isfinite().all():
        raise NonFiniteError(
            "old logits are not finite",
            got=f"{int((~out.isfinite()).sum())} of {int(mask.sum())} tokens",
            allowed="finite log-probs",
            fix="look for NaN in the weights of these versions, or for tokens beyond the vocabulary",
        )
    return out


def _of_all_ranks(needed: set[PolicyVersion], problem: TrajectoryError | None) -> set[PolicyVersion]:
    """Unite the versions of all ranks; where one of them has a problem, raise it on all of them."""
    found: list[tuple[set[PolicyVersion], TrajectoryError | None]] = [(needed, problem)]
    if dist.is_available() and dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, (needed, problem))
    for _, one in found:
        if one is not None:
            raise one
    return set().union(*(versions for versions, _ in found))


class StoredModel:
    """A second module that reads held versions, and scores whole sequences with them.

    Args:
        model: Its parameters become views of the versions that are checked out; those that no version has stay as they are,
            and every version has the same ones.
        held: The versions.
        temperature: Logits are divided by this, as when tokens were sampled.
        micro_batch_tokens: The largest padded size of one forward pass, in tokens.

    Raises:
        ConfigError: The temperature is one that no token is sampled at.
    """

    def __init__(
        self, model: PreTrainedModel, held: HeldVersions, *, temperature: float = 1.0, micro_batch_tokens: int = 16_384
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ConfigError(
                "no token is sampled at this temperature",
                got=f"temperature={temperature}",
                allowed="a finite number above 0",
                fix="pass the temperature of training rollouts",
            )
        self._model, self.held = model.eval().requires_grad_(False), held
        self._temperature, self._budget = temperature, micro_batch_tokens
        self._names: set[str] = set()

    def score(self, sequences: Sequence[TaggedTokens]) -> list[NDArray[np.float32]]:
        """Score the tokens in each sequence's mask at their own versions; float32 [token], 0 outside of it.

        Raises:
            TrajectoryError: A token of a mask has no version, or a token is none of the model's.
            VersionEvictedError: A version is not held.
            LayoutError: A version holds tensors that are not the model's.
            NonFiniteError: A log-prob is not finite.
        """
        if not sequences:
            return []
        size = self._model.get_input_embeddings().weight.shape[0]
        token_ids = np.concatenate([one.token_ids for one in sequences])
        if len(beyond := token_ids[(token_ids < 0) | (token_ids >= size)]):
            raise TrajectoryError(
                "sequences hold tokens that the model does not have",
                got=f"token {beyond[0]}, and {len(beyond) - 1} more",
                allowed=f"0 to {size - 1}",
                fix="give the model that is trained, and the token ids of its tokenizer",
            )
        starts = np.cumsum([0, *(len(one.token_ids) for one in sequences)])
        versions = torch.from_numpy(np.concatenate([one.versions for one in sequences]).astype(np.int64))
        mask = torch.from_numpy(np.concatenate([one.mask for one in sequences]).astype(bool))

        def score_at(version: PolicyVersion) -> Tensor:
            spans, places = [], []
            for one, start in zip(sequences, starts[:-1], strict=True):
                positions = np.flatnonzero(one.mask & (one.versions == version))
                if len(positions):
                    ids = one.token_ids[: positions[-1] + 1].astype(np.int64)
                    heat = np.full(len(positions), self._temperature, np.float32)
                    spans.append(ScoringSpan(trajectory_id="", token_ids=ids, positions=positions, temperature=heat))
                    places.append(positions + start)
            out = torch.zeros(mask.shape)
            with self.held.checkout(version) as weights:
                self._point_at(weights)
                packed, tokens = pack(spans)
                values = score_tokens(self._model, packed, tokens, micro_batch_tokens=self._budget, head_chunk_tokens=1024)
            out[torch.from_numpy(np.concatenate(places))] = torch.from_numpy(values)
            return out

        old = score_tagged(versions, mask, score_at).numpy()
        return np.split(old, starts[1:-1])

    def _point_at(self, weights: Mapping[str, Tensor]) -> None:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))  # a file may hold tied weights twice
        unknown = sorted(weights.keys() - parameters.keys())
        other = [n for n in weights.keys() & parameters.keys() if weights[n].shape != parameters[n].shape]
        if unknown or other:
            raise LayoutError(
                "a version does not fit the model that is to score with it",
                got=", ".join((unknown or other)[:3]),
                allowed="tensors of the names and shapes of the model's parameters",
                fix="give the model that is trained, without wrappers",
            )
        self._names = self._names or set(weights)
        if apart := sorted(self._names ^ weights.keys()):
            raise LayoutError(
                "two versions are not of the same tensors: the model would keep some of another version",
                got=", ".join(apart[:3]) + " in one of them alone",
                allowed="the same names in every version",
                fix="let the trainer write whole versions, and give each training run a model of its own",
            )
        for name, weight in weights.items():
            parameters[name].data = weight


class LiveVersions:
    """The versions of a module that is trained, lent back to it: its own forward pass then scores at a stored version.

    A rank of a sharded module keeps the versions of its own shards. Lending takes one more copy of them while it lasts.

    Args:
        module: The module that is trained; with adapters, these alone are a version.
        store: Takes the versions. None: one in memory, in the dtype of the parameters. For parameters that a forward pass
            casts, such as float32 masters of a bfloat16 model, give `PatchStore(dtype=torch.bfloat16)`: it is the casts
            that tokens are scored with.
    """

    def __init__(self, module: nn.Module, store: PatchStore | None = None) -> None:
        self._module, self.store = module, store or PatchStore()

    def publish(self, version: PolicyVersion) -> None:
        """Keep the weights as they are now; a second call for the newest version checks that they are still these.

        Raises:
            StoreUseError: The version is below the newest, or was published with other weights.
        """
        self.store.publish(version, named_weights(self._module))

    @contextmanager
    def lent(self, version: PolicyVersion) -> Iterator[None]:
        """Let the module hold the weights of a version inside the block, and its own again after it.

        Raises:
            VersionEvictedError: The version is not in the store.
        """
        own = named_weights(self._module)
        with torch.no_grad(), self.store.checkout(version) as weights:
            kept = {name: tensor.clone() for name, tensor in own.items()}
            try:
                for name, tensor in own.items():
                    tensor.copy_(weights[name].view_as(tensor))
                yield
            finally:
                for name, tensor in own.items():
                    tensor.copy_(kept[name])


def tee(
    stream: Iterable[tuple[str, Tensor]], into: dict[str, Tensor], *, device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Pass a stream of named tensors on, and copy each into a dict on its way, cast where it is of a floating-point type."""
    for name, tensor in stream:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        into[name] = tensor.detach().to(device=device, dtype=wanted, copy=True)
        yield name, tensor
