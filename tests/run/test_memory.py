"""The memory that --dry-run says against what the process of a trainer takes at its peak."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from oldlogits.run.cost import estimate

from ..runs import recipe
from ..waiting import HUNG_S

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}  # SmolLM2-135M's

PEAK = """
import sys
from pathlib import Path
import numpy as np
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.models.device import configure_process
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer
from tests.builders import batch_of, sampled, trajectory
from tests.run.test_memory import config_of

folder, out = map(Path, sys.argv[1:3])
configure_process(num_threads=2, seed=0)
trainer = Trainer(trainer_spec(config_of(folder, sys.argv[3])), folder, list(range(5, 45)))
for version in range(2):
    trainer.publish()
    made = [
        trajectory([3] * 56, sampled([7 + i] * 200, version, logp=-9.0), id=f"g0.{i}", group="g0", reward=float(i % 2))
        for i in range(4)
    ]
    trainer.put_batch(batch := batch_of(made, [-1.0, 1.0, -1.0, 1.0], num_steps=1))
    tags = batch.version[batch.loss_mask]
    values = trainer.scorer.score(np.arange(len(tags)), version)
    trainer.train(Scored(policy=OLD, values=values, computed_at=tags, num_switches=1))
    if version:
        trainer.end_checkpoint(True)  # it was written while the second update was trained
    else:
        trainer.begin_checkpoint(out, {})
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def config_of(folder, dtype):
    return recipe(
        folder,
        model={"path": str(folder), "forward_dtype": dtype},
        env={"max_episode_tokens": 256},
        engine={"precision": "fp8"},
        trainer={"micro_batch_tokens": 1024, "head_chunk_tokens": 512, "lr": 1e-5, "minibatches_per_update": 1},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak in /proc")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_trainers_peak_with_a_checkpoint_beside_training_is_what_the_dry_run_says_to_15_percent(
    tiny_folder, tmp_path, dtype
):
    """The shape of SmolLM2-135M with random weights and fewer layers: 48,000 words of it are the embedding."""
    folder = tmp_path / "model"
    for path in tiny_folder.glob("*token*"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    for path in tiny_folder.glob("*.jinja"):
        (folder / path.name).write_bytes(path.read_bytes())
    config = LlamaConfig(**SHAPE, num_hidden_layers=10, vocab_size=49152, max_position_embeddings=512, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "checkpoint"), dtype],
        capture_output=True, text=True, timeout=HUNG_S, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1]) * 1024
    assert estimate(config_of(folder, dtype)).process_bytes == pytest.approx(peak, rel=0.15)
