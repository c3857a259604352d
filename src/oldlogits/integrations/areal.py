"""AReaL: a proximal policy that is the old one. Every token is scored at the version in its trajectory's `versions`.

    class ExactActor(ExactProxLogp, areal.engine.FSDPPPOActor): ...      areal.engine.FSDPPPOActor = ExactActor

AReaL's own decoupled loss then has ``behave_imp_weight = old / mu = r_d`` and ``importance_weight = theta / old = r_s``. Its
`compute_logp` gives entry i the log-prob of token i + 1, while `versions` and `loss_mask` belong to token i until
`compute_advantages` rolls them: they are rolled here as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from oldlogits.core.errors import ConfigError, TrajectoryError
from oldlogits.core.weights import PolicyVersion
from oldlogits.sources.tagged import LiveVersions, score_tagged
from oldlogits.versions import PatchStore

if TYPE_CHECKING:
    from areal.api.cli_args import PPOActorConfig

    class _Actor:
        config: PPOActorConfig
        model: nn.Module

        def get_version(self) -> int:
            raise NotImplementedError

        def compute_logp(self, data: list[dict[str, Tensor]]) -> list[Tensor] | None:
            raise NotImplementedError

else:
    _Actor = object


class ExactProxLogp(_Actor):
    """Goes before an actor of AReaL's among the bases of a class, for `actor.prox_logp_method = "recompute"`.

    A rank keeps the versions of its own shards. `compute_logp` is called once a step before the update, with the weights that
    rollouts of this version were sampled with: it is there that a version is kept. A reference model, which has no optimizer,
    computes what it always does.

    Attributes:
        max_staleness: Versions are kept for as many steps; AReaL's `rollout.max_head_offpolicyness`, or more.
        forward_dtype: What a forward pass casts the parameters to; None: nothing is cast.
    """

    max_staleness: int = 8
    forward_dtype: torch.dtype | None = None
    _versions: LiveVersions | None = None

    @torch.no_grad()
    def compute_logp(self, data: list[dict[str, Tensor]]) -> list[Tensor] | None:
        """Score the tokens of trajectories at their own versions, in AReaL's layout.

        Raises:
            ConfigError: The settings ask for another proximal policy.
            TrajectoryError: A trajectory has no versions, or a sampled token has none.
            VersionEvictedError: A version is older than what is kept.
            NonFiniteError: A log-prob is not finite.
        """
        if self.config.optimizer is None:
            return super().compute_logp(data)
        _check_settings(self.config.use_decoupled_loss, str(self.config.prox_logp_method))
        if self._versions is None:
            self._versions = LiveVersions(self.model, PatchStore(dtype=self.forward_dtype))
        now = self.get_version()
        self._versions.publish(now)
        self._versions.store.retain(max(0, now - self.max_staleness))
        tags = [_next_tokens(one) for one in data]
        shapes = [tuple(versions.shape) for versions, _ in tags]
        live, versions_of = self._versions, torch.cat([versions.flatten() for versions, _ in tags])

        def score_at(version: PolicyVersion) -> Tensor:
            if version == now:
                return _flat(super(ExactProxLogp, self).compute_logp(data), shapes)
            with live.lent(version):
                return _flat(super(ExactProxLogp, self).compute_logp(data), shapes)

        old = score_tagged(versions_of, torch.cat([mask.flatten() for _, mask in tags]), score_at)
        sizes = [versions.numel() for versions, _ in tags]
        return [part.view(shape) for part, shape in zip(torch.split(old, sizes), shapes, strict=True)]


def _next_tokens(trajectory: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give versions and mask of the token that each entry of AReaL's log-probs is of."""
    if "versions" not in trajectory:
        raise TrajectoryError(
            "a trajectory has no versions",
            got=", ".join(sorted(trajectory)),
            allowed="input_ids, loss_mask, logprobs and versions, as AReaL's workflows return them",
            fix="let the workflow return response.output_versions, with -1 for the prompt",
        )
    return trajectory["versions"].roll(-1, dims=-1), trajectory["loss_mask"].bool().roll(-1, dims=-1)


def _flat(logps: Sequence[Tensor] | None, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    found = [tuple(one.shape) for one in logps or ()]
    if logps is None or found != list(shapes):
        raise TrajectoryError(
            "AReaL's log-probs do not fit the trajectories",
            got=", ".join(map(str, found)) or "none",
            allowed=", ".join(map(str, shapes)),
            fix="use an actor whose compute_logp returns one tensor a trajectory",
        )
    return torch.cat([one.flatten() for one in logps])


def _check_settings(is_decoupled: bool, method: str) -> None:
    if not is_decoupled or method not in ("recompute", "metrics"):
        raise ConfigError(
            "these settings of AReaL ask for no proximal policy, or for an interpolation",
            got=f"use_decoupled_loss={is_decoupled}, prox_logp_method={method!r}",
            allowed='use_decoupled_loss=true, prox_logp_method="recompute"',
            fix="set both in the section actor",
        )
