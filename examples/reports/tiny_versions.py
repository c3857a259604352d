"""What the reports share: a tiny model whose weights change, an engine with its weights in bfloat16, and the doctor."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from oldlogits.cli.main import run as command
from oldlogits.models.load import load_model
from order_desk.tiny import TinySize, save_tiny, tiny_model, tiny_tokenizer

NUM_VERSIONS = 4


class TinyVersions:
    """A model at versions 0, 1, ... as an optimizer might have made them, and the engine that samples from each."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer(tuple(f"w{i}" for i in range(40)))
        size = TinySize(hidden=48, layers=2, heads=2, kv_heads=1, mlp=64, max_context=128)
        model = tiny_model(size, len(self.tokenizer), self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            save_tiny(Path(folder), model, self.tokenizer)
            self.models = [load_model(Path(folder))]
        draw = torch.Generator().manual_seed(1)
        for _ in range(1, NUM_VERSIONS):
            model = copy.deepcopy(self.models[-1])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
            self.models.append(model)
        self._engines = [copy.deepcopy(model).to(torch.bfloat16).float() for model in self.models]
        self._draw = torch.Generator().manual_seed(2)

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """The weights of a version by name."""
        return dict(self.models[version].named_parameters())

    def blank(self) -> nn.Module:
        """A copy whose weights are none of the versions'."""
        model = copy.deepcopy(self.models[0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        return model

    @torch.no_grad()
    def sample(self, version: int, contexts: Sequence[Sequence[int]], num: int) -> list[tuple[list[int], list[float]]]:
        """Tokens that the engine at a version samples after each of some contexts of one length, and their log-probs."""
        ids, logps = torch.tensor([list(context) for context in contexts]), []
        for _ in range(num):
            rows = self._engines[version](ids).logits[:, -1].float().log_softmax(-1)
            tokens = torch.multinomial(rows.exp(), 1, generator=self._draw)
            logps.append(rows.gather(1, tokens))
            ids = torch.cat([ids, tokens], 1)
        return list(zip(ids[:, -num:].tolist(), torch.cat(logps, 1).tolist(), strict=True))

    def prompt(self, number: int) -> list[int]:
        """A few tokens."""
        return [3 + number % 7, 11, 4 + number % 5]


def doctor(*words: str | Path) -> int:
    """Run ``oldlogits doctor``, as a shell would."""
    print("$ oldlogits doctor", *(word.name if isinstance(word, Path) else word for word in words))
    return command(["doctor", *map(str, words)])
