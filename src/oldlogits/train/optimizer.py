"""AdamW over the masters, its learning rate, and what a checkpoint holds of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from oldlogits.core.errors import ConfigError, RunFolderError
from oldlogits.models.load import local
from oldlogits.models.sharding import host_slice_of
from oldlogits.train.checkpoint import of_kind
from oldlogits.train.spec import TrainerSpec

_FP32: Final = ("exp_avg", "exp_avg_sq")
_IN_8_BITS: Final = ("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2")
"""Codes of both moments, the scale of each block of them, and what a code stands for; a small tensor's moments are float32."""


class Optimizer:
    """AdamW over the masters of a model, sharded or whole, and its schedule.

    Moments are float32, or codes of 8 bits; they are where the masters are, or in the host's memory, where a step is then made
    on a copy of the masters.
    """

    def __init__(self, model: nn.Module, spec: TrainerSpec) -> None:
        t = spec.trainer
        self._masters = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._lr, self._share = t.lr, _schedule(spec)
        self._is_8_bit, self._on_host = t.optimizer == "adamw-8bit", t.offload_optimizer
        stepped = list(self._masters.values())
        if self._on_host:
            stepped = [nn.Parameter(_on_host(one)) for one in stepped]
        make = _adamw_8bit(self._masters.values()) if self._is_8_bit else partial(torch.optim.AdamW, fused=True)
        self._stepped = dict(zip(self._masters, stepped, strict=True))
        self.adamw = make(stepped, lr=t.lr, betas=(t.beta1, t.beta2), weight_decay=t.weight_decay)
        self._schedule = LambdaLR(self.adamw, self._share)

    @property
    def num_steps(self) -> int:
        """The number of steps taken so far."""
        return self._schedule.last_epoch

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        lr: float = self.adamw.param_groups[0]["lr"]
        return lr

    def zero_grad(self) -> None:
        """Forget the gradient."""
        for master in self._masters.values():
            master.grad = None

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """Step the masters with so many times the schedule's learning rate, and go on in the schedule."""
        for group in self.adamw.param_groups if lr_scale != 1 else ():
            group["lr"] *= lr_scale  # the schedule sets it anew
        if not self._on_host:
            self.adamw.step()
        else:
            for name, master in self._masters.items():
                self._stepped[name].grad = None if master.grad is None else _on_host(master.grad)
            self.adamw.step()
            for name, master in self._masters.items():
                local(master.data).copy_(self._stepped[name], non_blocking=True)
                self._stepped[name].grad = None
        self._schedule.step()

    def state(self) -> dict[str, Tensor]:
        """Give the moments, by the keys of a checkpoint's state; none before the first step."""
        found = {}
        for name, stepped in self._stepped.items():
            for kind, value in self.adamw.state.get(stepped, {}).items():
                is_slice = self._on_host and kind in _FP32
                found[f"{kind}|{name}"] = host_slice_of(self._masters[name], value) if is_slice else torch.as_tensor(value)
        return found

    def load(self, state: Mapping[str, Tensor], num_steps: int) -> None:
        """Go on after `num_steps` from the masters and the moments of a checkpoint's state, which are used and not copied.

        The recipe's learning rate may be another one.

        Raises:
            RunFolderError: The moments are of another kind than the recipe's.
        """
        kinds = _IN_8_BITS if self._is_8_bit else _FP32
        steps = of_kind("step", state)
        if steps and not of_kind(kinds[0], state):
            raise RunFolderError(
                "the checkpoint's moments are of another optimizer",
                got="moments in float32" if self._is_8_bit else "moments in 8 bits",
                allowed="the optimizer that has written them",
                fix=f"set trainer.optimizer = '{'adamw' if self._is_8_bit else 'adamw-8bit'}'",
            )
        for name, master in self._masters.items():
            stepped = self._stepped[name]
            if self._on_host:
                stepped.data.copy_(local(master.data))
            if name in steps:
                step = int(steps[name]) if self._is_8_bit else steps[name].to(stepped.device)
                moments = {kind: of_kind(kind, state)[name] for kind in kinds if f"{kind}|{name}" in state}
                moments = {kind: _on_host(value) if self._on_host else value for kind, value in moments.items()}
                self.adamw.state[stepped] = {"step": step, **moments}
        self._schedule.last_epoch = num_steps
        for group in self.adamw.param_groups:
            group["lr"] = self._lr * self._share(num_steps)


def _on_host(tensor: Tensor) -> Tensor:
    """Copy this rank's part of a tensor to the host's memory, pinned where it comes from a GPU."""
    own = local(tensor.detach())
    return torch.empty_like(own, device="cpu", pin_memory=own.is_cuda).copy_(own)


def _adamw_8bit(masters: Iterable[Tensor]) -> Callable[..., torch.optim.Optimizer]:
    """Give AdamW with moments in 8 bits. The one place that imports bitsandbytes.

    Raises:
        ConfigError: It is not installed, or several ranks share the model.
    """
    if any(isinstance(one.data, DTensor) for one in masters):
        raise ConfigError(
            "trainer.optimizer = 'adamw-8bit' is for one rank",
            got="a model that several ranks share: their rows would cut through blocks of moments that have one scale",
            allowed="adamw",
            fix="set trainer.optimizer = 'adamw'; trainer.offload_optimizer = true keeps its moments in the host's memory",
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        allowed, fix = "bitsandbytes 0.50 or newer", "pip install 'oldlogits[bitsandbytes]'"
        raise ConfigError("trainer.optimizer needs bitsandbytes", got=str(error), allowed=allowed, fix=fix) from error
    found: Callable[..., torch.optim.Optimizer] = AdamW8bit
    return found


def _schedule(spec: TrainerSpec) -> Callable[[int], float]:
    """Give the learning rate as a share of `trainer.lr`, by optimizer steps done: linear warm-up times linear decay."""
    t = spec.trainer
    total = spec.num_updates * t.minibatches_per_update

    def share(done: int) -> float:
        decay = 1 - (1 - t.min_lr_ratio) * min(1.0, done / max(1, total - 1))
        return min(1.0, (done + 1) / (t.warmup_steps + 1)) * decay

    return share
