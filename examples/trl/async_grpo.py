"""TRL's AsyncGRPOTrainer with exact old logits: the lines that end in `# exact` are what a user's script needs beside its own.

Needs two GPUs, `pip install 'trl[vllm]>=1.16'`, and a server of vLLM as TRL's documentation of `AsyncGRPOTrainer` starts it.
"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM  # exact
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.rewards import accuracy_reward

from oldlogits.integrations.trl import make_exact  # exact

MODEL = "Qwen/Qwen3-0.6B"

if __name__ == "__main__":
    trainer = AsyncGRPOTrainer(
        model=MODEL,
        reward_funcs=accuracy_reward,
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        args=AsyncGRPOConfig(output_dir="runs/async_grpo", max_staleness=4),
    )
    scoring = AutoModelForCausalLM.from_pretrained(MODEL, dtype="bfloat16", device_map="cuda")  # exact
    make_exact(trainer, scoring, band=1.5)  # exact
    trainer.train()
