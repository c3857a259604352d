"""The starting models "tiny" and "tiny-moe": their sizes, and what a run must know before they are made. Imports no torch."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from oldlogits.core.environment import ModelOrder
from oldlogits.core.errors import ConfigError
from order_desk.environment import OrderDesk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySize:
    """The size of the embedded model.

    Args:
        hidden: Width of the residual stream.
        layers: Decoder layers.
        heads: Query heads; `hidden / heads` is the head size.
        kv_heads: Key and value heads.
        mlp: Width of the gated MLP.
        max_context: The most positions.
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 160
    max_context: int = 512

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide."""
        if min(astuple(self)) < 1 or self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ConfigError(
                "the sizes of the tiny model do not fit",
                got=str(self),
                allowed="positive, hidden a multiple of 2 * heads, heads a multiple of kv_heads",
                fix="correct the sizes",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyMoeSize(TinySize):
    """The size of an embedded mixture of experts; `mlp` is the width of each expert.

    Args:
        experts: Gated MLPs of each layer; the likeliest one serves a token, times its probability.
    """

    experts: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStarted:
    """A tiny model that is trained on demonstrations of the desk before the run.

    Args:
        size: The size of the model.
    """

    size: TinySize

    def __call__(self, order: ModelOrder) -> Path:
        """Return the folder of the trained model, which is made now unless it is in the cache."""
        from order_desk.warm_start import tiny_spec, warm_start

        spec = tiny_spec(order, self.size)
        return warm_start(spec, lambda step, loss: order.progress(step, spec.steps, loss), cache=order.cache)

    @property
    def only_environment(self) -> type:
        """The desk: every word of the model is one that is said there."""
        return OrderDesk

    def architecture(self) -> PreTrainedConfig:
        """Return the Hugging Face config of the model."""
        from order_desk.tiny import tiny_config
        from order_desk.warm_start import desk_tokenizer

        tokenizer = desk_tokenizer()
        return tiny_config(self.size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)


tiny: Final = WarmStarted(size=TinySize())
tiny_moe: Final = WarmStarted(size=TinyMoeSize())
