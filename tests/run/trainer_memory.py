"""What a trainer's process takes at its peak: updates at the largest lag, beside a checkpoint that is being written.

python -m tests.run.trainer_memory RECIPE FOLDER    prints VmHWM in bytes
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from oldlogits.config.load import load_config
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer

from ..builders import batch_of, sampled, trajectory


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def play(recipe: Path, folder: Path) -> None:
    """Publish, and train `window + 2` updates of tokens of the oldest version that is allowed; write a checkpoint meanwhile."""
    config = load_config(recipe, [])
    length, tokens = config.env.max_episode_tokens, config.trainer.micro_batch_tokens
    trainer = Trainer(trainer_spec(config), Path(config.model.path), probe_ids=[1, 2, 3])
    trainer.publish()
    for update in range(config.window + 2):
        oldest = max(0, update - config.window)
        texts = [[3 + k, *range(3, 3 + length // 2 - 1)] for k in range(2 * tokens // length)]
        trainer.put_batch(
            batch_of(
                [
                    trajectory(text, sampled([5 + k] * (length - len(text)), oldest, logp=-5.0), id=f"g0.{k}")
                    for k, text in enumerate(texts)
                ],
                [(-1.0) ** k for k in range(len(texts))],
            )
        )
        batch = trainer.scorer.current_batch()
        chosen = torch.arange(int(batch.loss_mask.sum())).numpy()
        values = trainer.scorer.score(chosen, oldest)
        if update == config.window + 1:
            trainer.begin_checkpoint(folder, {})
        trainer.train(Scored(policy=OLD, values=values, computed_at=batch.version[batch.loss_mask], num_switches=1))
        trainer.publish()
        trainer.retain(max(0, update + 1 - config.window))
    trainer.end_checkpoint(wait=True)
    assert len(trainer.stored_versions) == config.window + 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    play(Path(sys.argv[1]), Path(sys.argv[2]))
    print(peak_bytes())
