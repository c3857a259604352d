"""An environment of one turn, and a small model that knows its words: replace both by your own."""

from pathlib import Path

from oldlogits.core.environment import ModelOrder
from order_desk.starting_models import TinySize
from order_desk.tiny import save_tiny, tiny_model, tiny_tokenizer

WORDS = ["hot", "cold", "up", "down", "big", "small", "left", "right", "say", "the", "opposite", "of"]


class Opposites:
    """The model is told a word and has to say its opposite."""

    system_prompt = "say the opposite"

    def reset(self, *, word: str, answer: str) -> str:
        """Begin an episode with a row of rows.jsonl; what is returned is the user's message."""
        self.answer, self.said = answer, ""
        return word

    def reply(self, message: str) -> None:
        """Hear what the model says; None ends the episode."""
        self.said = message

    def get_reward(self) -> float:
        """1 if the first word is right."""
        return float(self.said.split()[:1] == [self.answer])


def model(order: ModelOrder) -> Path:
    """A fresh model of some 90,000 parameters; instead of it, model.path may be the folder of a Hugging Face model."""
    folder = order.cache / f"opposites-{order.seed}"
    if not folder.is_dir():
        tokenizer = tiny_tokenizer(WORDS)
        weights = tiny_model(TinySize(), len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, order.seed)
        save_tiny(folder, weights, tokenizer)
    return folder
