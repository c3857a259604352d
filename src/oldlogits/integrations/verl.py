"""verl (V1, separate async): `old_log_probs` of each token at the version that sampled it, over patches instead of CPU copies.

    client    each piece of a rollout (verl aborts and resumes it at a weight update) --> [start, end, global_steps]
    worker    publish_version --> PatchStore of its own shards --> lend_version, return_version
    trainer   _compute_old_log_prob: verl's own forward pass once for each distinct version of the batch

    trainer.v1.trainer_mode: separate_async_exact; algorithm.rollout_correction.bypass_mode: false

With ``rollout_is: token`` and ``rollout_is_threshold: "0.667_1.5"`` verl's correction then weighs and masks by the true r_d.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakValueDictionary

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor, nn
from transfer_queue import KVBatchMeta
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import trainer_separate_async
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from oldlogits.core.errors import ConfigError, TrajectoryError
from oldlogits.core.weights import PolicyVersion
from oldlogits.sources.tagged import LiveVersions, score_tagged

SPANS = "version_spans"
"""The field of `extra_fields` that lists (first token, end, version) of each piece, counted from the prompt's first token."""


class Spans(list[tuple[int, int, PolicyVersion]]):
    """The pieces of one rollout; its turns add to the same list."""


class _Pieces(LLMServerClient):  # type: ignore[misc]
    """Stands between verl's resuming client and the one that asks a server, and sees every piece."""

    _rollouts: WeakValueDictionary[str, Spans] | None = None

    def spans_of(self, request_id: str) -> Spans:
        """Give the list of a rollout: the same one as long as somebody holds it."""
        if self._rollouts is None:
            self._rollouts = WeakValueDictionary()
        return self._rollouts.setdefault(request_id, Spans())

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_rollouts"}  # it goes to agent loops unused

    async def generate(self, request_id: str, *, prompt_ids: list[int], **asked: Any) -> Any:
        output = await super().generate(request_id, prompt_ids=prompt_ids, **asked)
        spans, version = self.spans_of(request_id), output.extra_fields.get("global_steps")
        if output.token_ids:
            if version is None:
                raise TrajectoryError(
                    "a server does not say which version sampled its tokens",
                    got="no global_steps",
                    allowed="the global step of the weights, with every answer",
                    fix="use a rollout backend of verl that sets global_steps: vllm, sglang",
                )
            spans.append((len(prompt_ids), len(prompt_ids) + len(output.token_ids), int(version)))
        return output


class SpanClient(FullyAsyncLLMServerClient, _Pieces):  # type: ignore[misc]
    """verl's client for partial rollouts, which keeps the version of every piece instead of the first and the last one's."""

    async def generate(self, request_id: str, **asked: Any) -> Any:
        """Sample, with as many pieces as weight updates make of it; see verl."""
        held = self.spans_of(request_id)
        output = await super().generate(request_id, **asked)
        output.extra_fields[SPANS] = held  # an agent loop keeps those of its first turn: later ones add to this list
        return output


def versions_of(spans: Sequence[tuple[int, int, int]], prompt_len: int, mask: Tensor) -> Tensor:
    """Give the version of each response token, int64 [response]; -1 where no piece has sampled it.

    Raises:
        TrajectoryError: Pieces overlap, or a token of the mask belongs to none.
    """
    versions = torch.full(mask.shape, -1, dtype=torch.int64)
    for start, end, version in spans:
        place = versions[max(0, start - prompt_len) : max(0, end - prompt_len)]
        if start < prompt_len or (place >= 0).any():
            raise TrajectoryError(
                "the pieces of a rollout contradict each other",
                got=f"tokens {start} to {end} at version {version}, with a prompt of {prompt_len} tokens",
                allowed="pieces behind the prompt, none over another",
                fix="use an agent loop that appends to its tokens, and does not rewrite them",
            )
        place[:] = version
    if bool((mask.bool() & (versions < 0)).any()):
        raise TrajectoryError(
            "sampled tokens belong to no piece whose version is known",
            got=f"{int((mask.bool() & (versions < 0)).sum())} of {int(mask.sum())} tokens of a response; {len(spans)} pieces",
            allowed=f"the spans of every turn in extra_fields[{SPANS!r}]",
            fix="let agent loops ask through the client of this trainer, and keep one request_id for a rollout",
        )
    return versions


class ExactActorWorker(DetachActorWorker):  # type: ignore[misc]
    """verl's detached actor, which keeps versions of its shards as patches.

    Attributes:
        forward_dtype: What a forward pass casts the parameters to; None: nothing is cast.
    """

    versions: LiveVersions | None = None
    _lent: ExitStack | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def publish_version(self, version: PolicyVersion, oldest_needed: PolicyVersion) -> None:
        """Keep the weights as they are as a version, and drop those that nobody needs."""
        if self.versions is None:
            module = self.actor.engine.module
            self.versions = LiveVersions(nn.ModuleList(module) if isinstance(module, list) else module)
        self.versions.publish(version)
        self.versions.store.retain(oldest_needed)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def lend_version(self, version: PolicyVersion) -> None:
        """Let the module hold a version until `return_version`."""
        if self.versions is None or self._lent is not None:
            raise ConfigError(
                "a version cannot be lent now",
                got="none was published" if self.versions is None else "another one is lent",
                allowed="publish_version, lend_version, return_version, in this order",
                fix="use ExactOldTrainer, which calls them so",
            )
        stack = ExitStack()
        stack.enter_context(self.versions.lent(version))
        self._lent = stack

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def return_version(self) -> None:
        """Give the module its own weights again."""
        stack, self._lent = self._lent, None
        if stack is not None:
            stack.close()


@register_trainer("separate_async_exact")
class ExactOldTrainer(trainer_separate_async.PPOTrainerSeparateAsync):  # type: ignore[misc]
    """verl's asynchronous trainer with exact old logits.

    Attributes:
        max_staleness: How many global steps a version is kept; at least what the replay buffer lets through.
    """

    max_staleness: int = 8

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRolloutRef, Role.ActorRollout):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = trainer_separate_async.ray.remote(ExactActorWorker)

    def get_llm_client(self) -> Any:
        """Give agent loops a client that keeps spans."""
        return self.standalone_server_manager.get_client(client_cls=SpanClient)

    def on_init_end(self) -> None:
        """Keep the version that the first rollouts are sampled with."""
        self._publish()
        super().on_init_end()

    def on_step_end(self) -> None:
        """Keep the version that is sent to the rollouts now."""
        self._publish()
        super().on_step_end()

    def _publish(self) -> None:
        self.actor_rollout_wg.publish_version(self.global_steps, max(0, self.global_steps - self.max_staleness))

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, float]) -> KVBatchMeta:
        correction = self.config.algorithm.get("rollout_correction", None) or {}
        if correction.get("bypass_mode", False):
            raise ConfigError(
                "verl's bypass mode copies the rollout's log-probs into old_log_probs",
                got="algorithm.rollout_correction.bypass_mode=true",
                allowed="false",
                fix="set it to false, or take trainer_mode=separate_async",
            )
        fields = self._get(batch, ["extra_fields", "prompts", "response_mask"])
        masks = list(fields["response_mask"].unbind())
        extra = [getattr(one, "data", one) for one in fields["extra_fields"].tolist()]
        tags = [
            versions_of(one.get(SPANS, ()) if mask.any() else (), len(prompt), mask)
            for one, prompt, mask in zip(extra, fields["prompts"].unbind(), masks, strict=True)
        ]

        def score_at(version: PolicyVersion) -> Tensor:
            self.actor_rollout_wg.lend_version(version)
            try:
                PPOTrainer._compute_old_log_prob(self, batch, metrics)
            finally:
                self.actor_rollout_wg.return_version()
            return torch.cat(list(self._get(batch, ["old_log_probs"])["old_log_probs"].unbind()))

        old = score_tagged(torch.cat(tags), torch.cat(masks).bool(), score_at)
        rows = torch.nested.as_nested_tensor(list(torch.split(old, [len(mask) for mask in masks])), layout=torch.jagged)
        written = TensorDict({"old_log_probs": rows}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=written)

    def _get(self, batch: KVBatchMeta, fields: list[str]) -> TensorDict:
        return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
