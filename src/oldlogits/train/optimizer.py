"""AdamW over the masters, its learning rate, and what a checkpoint holds of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from oldlogits.train.checkpoint import of_kind
from oldlogits.train.spec import TrainerSpec

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over the masters of a model, sharded or whole, and its schedule."""

    def __init__(self, model: nn.Module, spec: TrainerSpec) -> None:
        t = spec.trainer
        self._names = [name for name, _ in model.named_parameters()]
        self._lr, self._share = t.lr, _schedule(spec)
        self.adamw = torch.optim.AdamW(
            model.parameters(), lr=t.lr, betas=(t.beta1, t.beta2), weight_decay=t.weight_decay, fused=True
        )
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
        self.adamw.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Step the masters, and go on in the schedule."""
        self.adamw.step()
        self._schedule.step()

    def state(self) -> dict[str, Tensor]:
        """Give the moments, by the keys of a checkpoint's state; none before the first step."""
        moments = self.adamw.state_dict()["state"]
        return {f"{kind}|{self._names[i]}": value for i, entry in moments.items() for kind, value in entry.items()}

    def load(self, state: Mapping[str, Tensor], num_steps: int) -> None:
        """Go on after `num_steps` from the moments of a checkpoint's state, which are used and not copied.

        The recipe's learning rate may be another one.
        """
        index = {name: i for i, name in enumerate(self._names)}
        moments: dict[int, dict[str, Tensor]] = {}
        for kind in _MOMENTS:
            for name, value in of_kind(kind, state).items():
                moments.setdefault(index[name], {})[kind] = value
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": moments, "param_groups": groups})
        self._schedule.last_epoch = num_steps
        for group in self.adamw.param_groups:
            group["lr"] = self._lr * self._share(num_steps)


def _schedule(spec: TrainerSpec) -> Callable[[int], float]:
    """Give the learning rate as a share of `trainer.lr`, by optimizer steps done: linear warm-up times linear decay."""
    t = spec.trainer
    total = spec.num_updates * t.minibatches_per_update

    def share(done: int) -> float:
        decay = 1 - (1 - t.min_lr_ratio) * min(1.0, done / max(1, total - 1))
        return min(1.0, (done + 1) / (t.warmup_steps + 1)) * decay

    return share
