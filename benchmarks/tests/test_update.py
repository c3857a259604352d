"""The benchmark of an update: every contender trains the same tokens, and the table says what it is about."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.update.batch import SIZES, Trajectories
from benchmarks.update.ours import batch_of
from benchmarks.update.plain import micro_batches

SIZE = SIZES["smoke"]


def test_the_plain_loop_and_ours_train_the_same_tokens_with_the_same_advantages():
    drawn = Trajectories.drawn(SIZE)
    batch = batch_of(drawn, SIZE, version=5, num_versions=2)
    ours = sorted(zip(batch.token_ids[batch.loss_mask], batch.advantages[batch.sequence[batch.loss_mask]], strict=True))
    plain = []
    for ids, attended, sampled, advantages in micro_batches(drawn, SIZE.plain_tokens):
        assert ids.numel() <= SIZE.plain_tokens
        assert not ids[attended == 0].any()
        rows, columns = np.nonzero(sampled.numpy())
        plain += zip(ids.numpy()[rows, columns], advantages.numpy()[rows], strict=True)
    assert sorted(plain) == ours
    assert set(batch.version[batch.loss_mask]) == {3, 4}


@pytest.mark.slow
def test_it_runs_and_prints_goals_beside_figures_at_80_columns():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.update", "--smoke"]
    played = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    shown = played.stdout[played.stdout.index("CPU s") :]
    assert "goal >= 6" in shown
    assert "exact, 4 versions" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
