"""The embedded engine against transformers: do the log-probs agree, and how many tokens come out of a CPU-second?

    python -m benchmarks.engine [--smoke]

Agreement: the largest |difference| between the engine's log-probs and transformers' forward with the weights of the
version that each token is tagged with; groups share their prompt, and the weights change in mid-flight with
kv = "recompute". Throughput: sampled tokens per CPU-second of process time at 64 concurrent sequences, against
transformers' continuous batching of the same randomly initialised Qwen3, both fp32 on one thread, in interleaved rounds.
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

VOCAB, CONTEXT = 2048, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much one run measures."""

    rounds: int
    sequences: int
    new_tokens: int


FULL = Size(rounds=5, sequences=64, new_tokens=128)
SMOKE = Size(rounds=1, sequences=16, new_tokens=16)


def make_model(folder: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
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


def measure_agreement(model: Qwen3ForCausalLM, folder: str, size: Size) -> float:
    """Groups of 8 that share a prompt; the weights change half-way."""
    core = EngineCore(EngineSpec(model_path=folder, max_num_seqs=size.sequences, max_context=CONTEXT))
    rng = random.Random(1)
    group_prompts = [[rng.randrange(VOCAB) for _ in range(40)] for _ in range(size.sequences // 8)]
    prompts = {f"{g}.{i}": prompt for g, prompt in enumerate(group_prompts) for i in range(8)}
    for request_id, prompt in prompts.items():
        core.add(request_id, prompt, Sampling(max_tokens=size.new_tokens))
    for _ in range(size.new_tokens // 2):
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


def time_embedded(core: EngineCore, prompts: Sequence[list[int]], new_tokens: int) -> float:
    started = time.process_time()
    for i, prompt in enumerate(prompts):
        core.add(str(i), prompt, Sampling(max_tokens=new_tokens))
    num_tokens = sum(len(generation.output_ids) for generation in run_to_end(core).values())
    return num_tokens / (time.process_time() - started)


def time_transformers(model: Qwen3ForCausalLM, prompts: Sequence[list[int]], new_tokens: int) -> float:
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512, use_async_batching=False)
    started = time.process_time()
    outputs = model.generate_batch(list(prompts), generation_config=generation, continuous_batching_config=batching)
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return num_tokens / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run?")
    size = SMOKE if parser.parse_args().smoke else FULL
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder)
        print(f"model: Qwen3, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, fp32, one thread")
        worst = measure_agreement(model, folder, size)
        print(f"agreement with transformers' forward, across an update: largest |difference| {worst:.1e} (target 1e-5)")
        core = EngineCore(EngineSpec(model_path=folder, max_num_seqs=size.sequences, max_context=CONTEXT))
        model.set_attn_implementation("sdpa")
        ratios = []
        for round_number in range(size.rounds):
            rng = random.Random(round_number)
            prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(32, 65))] for _ in range(size.sequences)]
            ours = time_embedded(core, prompts, size.new_tokens)
            theirs = time_transformers(model, prompts, size.new_tokens)
            ratios.append(ours / theirs)
            print(f"round {round_number}: embedded {ours:.0f}, transformers {theirs:.0f} tokens/CPU-s, ratio {ratios[-1]:.2f}")
        print(f"median ratio at {size.sequences} sequences: {statistics.median(ratios):.2f} (target 3)")


if __name__ == "__main__":
    main()
