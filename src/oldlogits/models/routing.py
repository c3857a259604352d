"""Routing replay: the trainer's routers choose the experts that the engine chose.

    follow(model, micro) -> forward -> router: scores = f(logits, ...)      as the family computes them, with gradient
                                               top-k of the scores          <- here: the recorded choice instead
                                               weights of the chosen ones   as the family computes them, with gradient

What is replaced is the one call of top-k in a router's forward: everything before and after it is the family's own code. A
family whose router does not choose by one top-k is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Final, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from oldlogits.batch.pad import MicroBatch
from oldlogits.core.errors import ConfigError, TrajectoryError
from oldlogits.core.trajectory import RoutingMode
from oldlogits.models.forward import under
from oldlogits.models.ranks import ALONE, Ranks

_OFF: Final = "set model.routing = 'off', which leaves the choice to each of the two"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """How often the routers of a model would have chosen otherwise than the engine did, over what was read since the last look.

    Args:
        num_choices: Experts that the engine chose: tokens times layers with experts times experts of a token.
        num_other_choices: Those of them that the router does not choose.
        num_tokens: Tokens read; one that is read by several forward passes counts in each.
        num_other_tokens: Those of them for which the router chooses otherwise in some layer.
    """

    num_choices: int = 0
    num_other_choices: int = 0
    num_tokens: int = 0
    num_other_tokens: int = 0

    def metrics(self, name: str) -> dict[str, float]:
        """The shares that differ, under names that begin with `name`; nothing where nothing was compared."""
        if not self.num_tokens:
            return {}
        choices, tokens = self.num_other_choices / self.num_choices, self.num_other_tokens / self.num_tokens
        return {f"{name}_other_choices": choices, f"{name}_other_tokens": tokens}


@dataclass(slots=True, kw_only=True, eq=False)
class _Routers:
    """What the routers of one model follow: the choices of the next forward pass, which its backward pass may need again.

    Args:
        replays: Whether they choose the same; else they are only compared.
        num_experts: The experts of each layer that has some, by its number.
        choices: int64 [token of the forward, layer, choice]; None: the routers are free.
        is_read: bool [token of the forward]; False for padding.
        differs: bool [token of the forward]; whether some layer so far chooses otherwise.
        compared: The layers that were compared in this forward, so that a recomputation is not counted again.
    """

    replays: bool
    num_experts: dict[int, int]
    choices: Tensor | None = None
    is_read: Tensor | None = None
    differs: Tensor | None = None
    compared: set[int] = field(default_factory=set)
    counts: Tensor | None = None  # int64 [4], in the order of `RoutingCounts`

    def follow(self, micro: MicroBatch) -> None:
        """Take the choices for a forward pass."""
        self._close()
        if micro.routing is None or micro.is_read is None:
            self.choices = self.is_read = None
            return
        self.choices = micro.routing.flatten(0, 1).long()
        self.is_read = micro.is_read.flatten()
        largest = dict(enumerate(self.choices.amax(dim=(0, 2)).tolist()))
        if any(largest.get(layer, num) >= num for layer, num in self.num_experts.items()):
            allowed = ", ".join(f"below {num} in layer {layer}" for layer, num in self.num_experts.items())
            raise _foreign(f"experts up to {', '.join(map(str, largest.values()))} in {len(largest)} layers", allowed)

    def choose(self, layer: int, scores: Tensor, own: Tensor) -> Tensor:
        """Compare a router's own choice with the recorded one, and return the one that counts; int64 [token, choice]."""
        if self.choices is None:
            return own
        recorded = self.choices[:, layer]
        if recorded.shape != own.shape:
            raise _foreign(f"{recorded.shape[1]} experts for each of {len(recorded)} tokens", f"{own.shape[1]} for {len(own)}")
        if layer not in self.compared:
            self._compare(layer, recorded, own)
        return recorded if self.replays else own

    def take(self) -> Tensor:
        """Give the counts, int64 [4], and begin anew."""
        self._close()
        counts, self.counts = self.counts, None
        return torch.zeros(4, dtype=torch.int64) if counts is None else counts.cpu()

    def _compare(self, layer: int, recorded: Tensor, own: Tensor) -> None:
        assert self.is_read is not None, "it comes with the choices"
        other = ~(recorded[:, :, None] == own[:, None, :]).any(-1) & self.is_read[:, None]
        self.compared.add(layer)
        self._count(0, self.is_read.sum() * own.shape[1], other.sum())
        self.differs = other.any(-1) if self.differs is None else self.differs | other.any(-1)

    def _close(self) -> None:
        """Count the tokens of the forward before, of which all layers are known now."""
        if self.differs is not None and self.is_read is not None:
            self._count(2, self.is_read.sum(), self.differs.sum())
        self.differs = None
        self.compared.clear()

    def _count(self, first: int, num: Tensor, num_other: Tensor) -> None:
        """Add to two of the counts, on the model's device."""
        if self.counts is None:
            self.counts = torch.zeros(4, dtype=torch.int64, device=num.device)
        self.counts[first] += num
        self.counts[first + 1] += num_other


def _foreign(got: str, allowed: str) -> TrajectoryError:
    fix = "let engine and trainer read the same model folder"
    return TrajectoryError("the routing is not that of this model", got=got, allowed=allowed, fix=fix)


_ROUTERS: Final[WeakKeyDictionary[nn.Module, _Routers]] = WeakKeyDictionary()


class _TopK(TorchFunctionMode):
    """Puts another choice in the place of the top-k that a router takes: `choose` is given the scores and the router's own."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return found
        scores, own = args[0], cast(tuple[Tensor, Tensor], found)[1]
        assert isinstance(scores, Tensor), "what a router takes the top-k of"
        chosen = self._choose(scores, own)
        return found if chosen is own else torch.return_types.topk((scores.gather(-1, chosen), chosen))


def routers_of(model: nn.Module) -> dict[int, nn.Module]:
    """Find the routers of a model by the number of their layer: each stands beside the experts that it chooses among."""
    found = {}
    for name, _ in model.named_modules():
        if name.endswith(".experts"):
            parent = model.get_submodule(name.rpartition(".")[0])
            beside = [child for kind, child in parent.named_children() if kind in ("gate", "router")]
            layer = re.search(r"\.layers\.(\d+)\.", name)
            if beside and layer:
                found[int(layer[1])] = beside[0]
    return found


def routers_to_follow(model: PreTrainedModel, mode: RoutingMode) -> dict[int, nn.Module]:
    """Find the routers of a model, which may be one without storage, that are to follow the engine's; none with "off".

    Raises:
        ConfigError: The model has none.
    """
    found = {} if mode == "off" else routers_of(model)
    if not found and mode != "off":
        raise ConfigError(
            "the model has no routers that could follow the engine's",
            got=f"a {type(model).__name__}, model.routing = '{mode}'",
            allowed="a mixture of experts, each layer's with a router beside them",
            fix=_OFF,
        )
    return found


def follow_engine(model: PreTrainedModel, mode: RoutingMode) -> None:
    """Let the routers of a model follow or be compared with recorded routing from now on, before it is sharded; or do nothing.

    Copies of the model must be made before.

    Raises:
        ConfigError: The model chooses no experts, or not in a way that can be replaced.
    """
    if not (found := routers_to_follow(model, mode)):
        return
    num_experts = {layer: check_router(router, type(model).__name__) for layer, router in found.items()}
    routers = _ROUTERS[model] = _Routers(replays=mode == "replayed", num_experts=num_experts)
    for layer, router in found.items():
        router.forward = under(partial(_TopK, partial(routers.choose, layer)), router.forward)


def follow(model: nn.Module, micro: MicroBatch) -> None:
    """Let the routers of a model follow the routing of a micro-batch, on the model's device, until the next one."""
    if model in _ROUTERS:
        _ROUTERS[model].follow(micro)


def take_counts(model: nn.Module, ranks: Ranks = ALONE) -> RoutingCounts:
    """Tell how often the model's routers, on all ranks, have differed from the engine's since the last time.

    What a rank computes as padding counts again. Nothing is told where routers do not follow.
    """
    if model not in _ROUTERS:
        return RoutingCounts()
    choices, other_choices, tokens, other_tokens = ranks.sum(_ROUTERS[model].take()).tolist()
    return RoutingCounts(num_choices=choices, num_other_choices=other_choices, num_tokens=tokens, num_other_tokens=other_tokens)


def check_router(router: nn.Module, family: str) -> int:
    """Return the number of experts that a router chooses among, if replacing its choice replays it.

    It is tried on random states: its one top-k must be over all experts, and with the experts of another state it must return
    these, in weights that depend on nothing but the state and them.

    Raises:
        ConfigError: It chooses in another way.
    """
    weight = next((p for p in router.parameters() if p.dim() == 2), None)
    why = "no matrix of experts"
    if weight is not None:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(8, weight.shape[1], generator=generator)
        why = _why_not(router, weight, states)
        if not why:
            return len(weight)
    raise ConfigError(
        f"the routing of {family} cannot be replayed",
        got=f"a router {type(router).__name__} with {why}",
        allowed="a router that takes one top-k over its experts and returns the chosen ones, as Qwen3-MoE's and Mixtral's do",
        fix=_OFF,
    )


@torch.no_grad()
def _why_not(router: nn.Module, weight: Tensor, states: Tensor) -> str:
    """Say what keeps a router's choice from being replaced; nothing: nothing does."""
    if len(signature(router.forward).parameters) != 1:
        return "more arguments than the states of tokens"
    states = states.to(weight.device, weight.dtype)
    seen: list[tuple[Tensor, Tensor]] = []  # what every top-k was taken of, and its choice

    def note(scores: Tensor, own: Tensor) -> Tensor:
        seen.append((scores, own))
        return own

    with _TopK(note):
        router(states)
    if len(seen) != 1:
        return f"{len(seen)} calls of top-k"
    scores, choice = seen[0]
    if scores.shape != (len(states), len(weight)):
        return f"a top-k over {tuple(scores.shape)} scores of {len(states)} tokens and {len(weight)} experts"
    other = (choice + 1) % len(weight)
    with _TopK(lambda scores, own: other):
        replayed = _tensors(router(states))
    with _TopK(lambda scores, own: other.flip(-1)):
        flipped = _tensors(router(states))
    chosen = [(a, b) for a, b in zip(replayed, flipped, strict=True) if a.dtype == torch.int64]
    if not any(a.shape == other.shape and torch.equal(a, other) and torch.equal(b, other.flip(-1)) for a, b in chosen):
        return "a choice that it does not return"
    weights = [(a, b) for a, b in zip(replayed, flipped, strict=True) if a.shape == other.shape and a.is_floating_point()]
    if not any(torch.allclose(a, b.flip(-1), atol=1e-6) for a, b in weights):
        return "weights that depend on the order of the choice"
    return ""


def _tensors(found: object) -> list[Tensor]:
    return [one for one in found if isinstance(one, Tensor)] if isinstance(found, tuple) else []
