"""A tiny model that knows the words of the game and nothing else, so that the first run needs no download and no GPU."""

from pathlib import Path

from oldlogits.core.environment import ModelOrder
from oldlogits.models.cache import cached
from order_desk.starting_models import TinySize
from order_desk.tiny import save_tiny, tiny_model, tiny_tokenizer

WORDS = ["guess", "my", "number", "from", "to", "higher", "lower", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


def tiny(order: ModelOrder) -> Path:
    """Return the folder of a model with random weights; `model.path = "FOLDER"` in recipe.toml takes yours instead."""

    def make(folder: Path) -> None:
        tokenizer = tiny_tokenizer(WORDS)
        model = tiny_model(TinySize(), len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, order.seed)
        save_tiny(folder, model, tokenizer)

    return cached(order.cache / f"guess-{order.seed}", make)
