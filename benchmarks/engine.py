"""The embedded engine against transformers: do the log-probs agree, and how many tokens come out of a CPU-second?

    python -m benchmarks.engine [--smoke]

Agreement: the largest |difference| between the engine's log-probs and transformers' forward with the weights of the
version that each token is tagged with; groups share their prompt, and the weights change in mid-flight with
kv = "recompute". Throughput: sampled tokens per CPU-second of process time against transformers' continuous batching of
the same randomly initialised Qwen3, both fp32 on one thread, in interleaved rounds; medians. Where few tokens are sampled
after a long prompt, what is measured is the reading of prompts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.generation import ContinuousBatchingConfig
from transformers.utils import logging

from oldlogits.core.engine import EngineSpec, Generation, Sampling
from oldlogits.engines.embedded.engine import EngineCore

CONTEXT, SMALL, LARGE = 256, 2048, 151_936


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Groups of members that share a prompt, all asked for at once.

    Args:
        prompt: The shortest and the longest prompt, in tokens.
        goal: How many times the tokens of transformers should come out.
        batch: The tokens of one forward pass of transformers; of 512 and 4,096 the faster.
    """

    name: str
    goal: float
    vocab: int = SMALL
    num_groups: int = 64
    members: int = 1
    prompt: tuple[int, int] = (32, 64)
    new_tokens: int = 128
    batch: int = 512

    @property
    def context(self) -> int:
        """The longest sequence."""
        return self.prompt[1] + self.new_tokens

    @property
    def num_sequences(self) -> int:
        """Of all groups."""
        return self.num_groups * self.members

    def prompts(self, seed: int) -> list[list[int]]:
        """One for each sequence."""
        rng = random.Random(seed)
        groups = [[rng.randrange(self.vocab) for _ in range(rng.randint(*self.prompt))] for _ in range(self.num_groups)]
        return [prompt for prompt in groups for _ in range(self.members)]


LONG = (4000, 4000)
FULL = (
    Work(name="vocabulary 2,048", goal=4.4),
    Work(name="vocabulary 151,936", goal=3.0, vocab=LARGE, new_tokens=16),
    Work(name="4 prompts of 4,000", goal=2.0, num_groups=4, prompt=LONG, new_tokens=8),
    Work(name="8 on one of 4,000", goal=4.0, num_groups=1, members=8, prompt=LONG, new_tokens=8),
)
SMOKE = (
    Work(name="vocabulary 2,048", goal=4.4, num_groups=16, new_tokens=16),
    Work(name="vocabulary 151,936", goal=3.0, vocab=LARGE, num_groups=4, new_tokens=4),
    Work(name="8 on one of 400", goal=4.0, num_groups=1, members=8, prompt=(400, 400), new_tokens=4),
)


def make_model(folder: str, vocab: int, context: int) -> Qwen3ForCausalLM:
    """4 M parameters, or 20 M with the large vocabulary."""
    torch.manual_seed(0)
    hidden = 256 if vocab == SMALL else 128
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def run_to_end(core: EngineCore) -> dict[str, Generation]:
    finished: dict[str, Generation] = {}
    while not core.idle:
        finished.update(core.step())
    return finished


@torch.inference_mode()
def largest_difference(model: Qwen3ForCausalLM, prompt: Sequence[int], generation: Generation, version: int) -> float:
    """Over the tokens that are tagged with `version`; the model holds the weights of that version."""
    ids = torch.tensor([*prompt, *generation.output_ids])
    logp = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1).gather(1, ids[1:, None]).squeeze(1)
    difference = (logp[len(prompt) - 1 :] - torch.tensor(generation.logprobs)).abs()
    parts = [difference[span.start : span.end] for span in generation.spans if span.version == version]
    return max((float(part.max()) for part in parts), default=0.0)


def measure_agreement(model: Qwen3ForCausalLM, folder: str, num_groups: int, new_tokens: int) -> float:
    """Groups of 8 that share a prompt; the weights change half-way."""
    core = EngineCore(EngineSpec(model_path=folder, max_num_seqs=8 * num_groups, max_context=CONTEXT))
    rng = random.Random(1)
    group_prompts = [[rng.randrange(SMALL) for _ in range(40)] for _ in range(num_groups)]
    prompts = {f"{g}.{i}": prompt for g, prompt in enumerate(group_prompts) for i in range(8)}
    for request_id, prompt in prompts.items():
        core.add(request_id, prompt, Sampling(max_tokens=new_tokens))
    for _ in range(new_tokens // 2):
        core.step()
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new: dict[str, Tensor] = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in old.items()}
    new["lm_head.weight"] = new["model.embed_tokens.weight"]
    core.pause("keep", "recompute")
    core.update_weights(new, 1)
    core.resume()
    finished = run_to_end(core)
    worst = 0.0
    for version, weights in enumerate((old, new)):
        model.load_state_dict(weights)
        worst = max(worst, *(largest_difference(model, prompts[key], value, version) for key, value in finished.items()))
    model.load_state_dict(old)
    return worst


def embedded_per_s(core: EngineCore, work: Work, seed: int) -> float:
    core.reset(seed)
    started = time.process_time()
    for i, prompt in enumerate(work.prompts(seed)):
        core.add(str(i), prompt, Sampling(max_tokens=work.new_tokens))
    num_tokens = sum(len(generation.output_ids) for generation in run_to_end(core).values())
    return num_tokens / (time.process_time() - started)


def transformers_per_s(model: Qwen3ForCausalLM, work: Work, seed: int) -> float:
    generation = GenerationConfig(max_new_tokens=work.new_tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=2048, max_batch_tokens=work.batch, use_async_batching=False)
    started = time.process_time()
    outputs = model.generate_batch(work.prompts(seed), generation_config=generation, continuous_batching_config=batching)
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return num_tokens / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run?")
    is_smoke = parser.parse_args().smoke
    works, rounds = (SMOKE, 1) if is_smoke else (FULL, 5)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    measured: dict[str, list[tuple[float, float]]] = {work.name: [] for work in works}
    with tempfile.TemporaryDirectory() as folder:
        context = max(CONTEXT, *(work.context for work in works))
        models = {
            vocab: make_model(f"{folder}/{vocab}", vocab, context) for vocab in dict.fromkeys(work.vocab for work in works)
        }
        for vocab, model in models.items():
            print(f"Qwen3 with a vocabulary of {vocab:,}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
        worst = measure_agreement(models[SMALL], f"{folder}/{SMALL}", *((2, 16) if is_smoke else (8, 128)))
        print(f"agreement with transformers' forward, across an update: largest |difference| {worst:.1e} (goal 1e-5)")
        for model in models.values():
            model.set_attn_implementation("sdpa")
        cores = {
            work.name: EngineCore(
                EngineSpec(model_path=f"{folder}/{work.vocab}", max_num_seqs=work.num_sequences, max_context=work.context)
            )
            for work in works
        }
        for seed in range(rounds):
            for work in works:
                ours = embedded_per_s(cores[work.name], work, seed)
                measured[work.name].append((ours, transformers_per_s(models[work.vocab], work, seed)))
    print(f"\ntokens per CPU-second, one thread, fp32; medians of {rounds} interleaved rounds")
    print(f"{'':<20}{'embedded':>10}{'transformers':>14}{'ratio':>8}{'goal':>7}")
    for work in works:
        ours, theirs = (statistics.median(figures) for figures in zip(*measured[work.name], strict=True))
        ratio = statistics.median(a / b for a, b in measured[work.name])
        print(f"{work.name:<20}{ours:>10.0f}{theirs:>14.0f}{ratio:>8.2f}{work.goal:>7.1f}")


if __name__ == "__main__":
    main()
