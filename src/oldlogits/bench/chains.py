"""Models that make versions: a random one shaped like a small Llama, and any model folder under real AdamW steps.

gradient -> AdamW on fp32 masters -> a cast to bf16 is the next version
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import oldlogits
from oldlogits.models.load import load_model, load_tokenizer, named_weights

BETAS: Final = (0.9, 0.999)
WEIGHT_STD: Final = 0.02
UPDATE_STD: Final = math.sqrt((1 - BETAS[0]) / (1 + BETAS[0]))
"""Standard deviation of an update in units of the learning rate: that of the averaged gradients, v being 1."""
NUM_SEQUENCES: Final = 2
LENGTH: Final = 128
"""How many sequences a batch of real text has, and how many tokens each."""

_HEAD: Final = 64
_MAX_VOCABULARY: Final = 49152
_LONG_AGO: Final = 1_000_000.0
"""Steps that the optimizer believes to have taken: its bias corrections are 1."""


def llama_shapes(num_params: int) -> dict[str, torch.Size]:
    """Names and shapes of a Llama of about so many parameters, at least 100,000, its head tied to the embedding.

    Between 24 and 128 million the width stays 576, and there are fewer layers: the tensors have the same sizes.

    Example:
        128,000,000: width 576, 28 layers, a vocabulary of 49,152: 127.4 million.
    """
    root = math.sqrt(num_params)
    heads = max(1, min(9, round(root / 540)), round(root / 1280))
    hidden, kv_heads = _HEAD * heads, max(1, heads // 3)
    vocabulary, mlp = min(_MAX_VOCABULARY, num_params // (4 * hidden)), 8 * hidden // 3
    per_layer = hidden * (2 * hidden + 2 * _HEAD * kv_heads + 3 * mlp + 2)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=max(1, round((num_params - vocabulary * hidden) / per_layer)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_HEAD,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}


class SyntheticModel:
    """Random fp32 masters in one flat buffer, whose gradients are normal and new in every step.

    The moments begin where a long run of such gradients has them, so the first step is like every other: an update of
    m / sqrt(v), normal, of mean absolute value 0.18 and correlated 0.9 with the one before. With gradient and moments it
    takes four times the masters' bytes.

    Args:
        num_params: About how many parameters it has; see `llama_shapes`.
        lr: The learning rate of AdamW, without weight decay.
        seed: The seed of weights and gradients: learning rates are compared on the same gradients.
        device: The device that holds everything.
    """

    def __init__(self, *, num_params: int, lr: float, seed: int = 0, device: str = "cpu") -> None:
        shapes = llama_shapes(num_params)
        self._generator = torch.Generator(device).manual_seed(seed)
        sizes = [shape.numel() for shape in shapes.values()]
        flat = self._normal(torch.empty(sum(sizes), device=device)).mul_(WEIGHT_STD)
        self._flat, parts = Parameter(flat), torch.split(flat, sizes)
        self._masters = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        self._optimizer = torch.optim.AdamW([self._flat], lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
        self._optimizer.state[self._flat] = {
            "step": torch.tensor(_LONG_AGO, device=device),
            "exp_avg": self._normal(torch.empty_like(flat)).mul_(UPDATE_STD),
            "exp_avg_sq": torch.ones_like(flat),
        }

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Return float32 weights by name: views of one buffer, which `step` changes."""
        return self._masters

    def step(self) -> None:
        """Take one AdamW step on new gradients."""
        self._flat.grad = self._normal(torch.empty_like(self._flat) if self._flat.grad is None else self._flat.grad)
        self._optimizer.step()

    def _normal(self, empty: Tensor) -> Tensor:
        return empty.normal_(generator=self._generator)


class RealModel:
    """The model of a folder with fp32 masters under a bf16 forward, trained on next tokens; some 20 bytes a parameter.

    The masters begin at bf16 values and the moments at zero, as in any run on a published bf16 checkpoint. AdamW has no weight
    decay, warm-up or clipping.
    """

    def __init__(self, folder: Path, *, lr: float) -> None:
        self._model = load_model(folder).to(torch.bfloat16)
        self._masters = {name: Parameter(weight.to(torch.float32)) for name, weight in named_weights(self._model).items()}
        self._batches = batches(load_tokenizer(folder))
        self._optimizer = torch.optim.AdamW(self._masters.values(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True)

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Return float32 weights by Hugging Face name, a tied head once; `step` changes them."""
        return {name: master.data for name, master in self._masters.items()}

    def step(self) -> None:
        """Take one AdamW step on the next batch."""
        ids = next(self._batches)
        torch.autograd.backward(self._model(input_ids=ids, labels=ids, use_cache=False).loss)
        for name, parameter in self._model.named_parameters():
            assert parameter.grad is not None
            self._masters[name].grad = parameter.grad.to(torch.float32)
            parameter.grad = None
        self._optimizer.step()
        for name, parameter in self._model.named_parameters():
            parameter.data.copy_(self._masters[name].data)


def batches(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tensor]:
    """Yield int64 batches [sequence, token] from random places of this package's source; the same ones every time."""
    files = sorted(Path(oldlogits.__file__).parent.rglob("*.py"))
    ids = torch.tensor(tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files))["input_ids"])
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(ids) - LENGTH, (NUM_SEQUENCES, 1), generator=generator)
        yield ids[starts + torch.arange(LENGTH)]
