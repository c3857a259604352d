"""What scoring costs the trainer: the tokens that its forward passes read, and that its own checks are not counted."""

import numpy as np
import pytest

from oldlogits.core.protocols import Piece
from oldlogits.train.trainer import ScoringWork, Trainer

from ..builders import batch_of, sampled, trajectory

PROBE = [3, 9, 10, 11]


@pytest.fixture
def trainer(tiny_folder, recipe):
    """Its batch: 3 context, 2 of version 0, 1 context, 2 of version 1; and 2 context, 1 of version 1, 4 context."""
    made = Trainer(recipe(variant="ppo_ewma_train_infer", source={"type": "ewma"}, referee={"share": 1.0}), tiny_folder, PROBE)
    made.publish()
    made.version = 1
    made.publish()
    long = trajectory([3, 4, 5], sampled([6, 7], 0), [8], sampled([9, 2], 1))
    short = trajectory([3, 4], sampled([5], 1), [6, 7, 8, 9], id="g0.1")
    made.put_batch(batch_of([long, short], [1.0, -1.0]))
    return made


def read(trainer, call):
    before = trainer.work
    call()
    return (trainer.work - before).read_tokens


def test_a_forward_pass_reads_each_sequence_up_to_the_token_before_the_last_that_it_scores(trainer):
    assert trainer.work == ScoringWork(), "probe and publish are not counted"
    assert read(trainer, lambda: trainer.score(np.array([0, 1]), 0)) == 4
    assert read(trainer, lambda: trainer.score(np.array([2, 3, 4]), 1)) == 7 + 2
    assert read(trainer, lambda: trainer.score(np.arange(5), None)) == 7 + 2
    assert read(trainer, lambda: trainer.score_average(np.array([1]))) == 4
    assert read(trainer, lambda: trainer.score_engine(np.arange(5))) == 7 + 2
    piece = Piece(
        trajectory_id="g9.0", token_ids=np.array([3, 4, 5, 6]), positions=np.array([2, 3]), temperature=np.ones(2, np.float32)
    )
    assert read(trainer, lambda: trainer.score_pieces([piece, piece], 1)) == 3 + 3


def test_the_seconds_of_a_switch_are_part_of_those_of_the_score(trainer):
    piece = Piece(trajectory_id="g9.0", token_ids=np.array([3, 4]), positions=np.array([1]), temperature=np.ones(1, np.float32))
    before = trainer.work.switch_s
    scored = trainer.score_pieces([piece], 0)
    assert 0 < scored.switch_s < scored.seconds_s
    assert trainer.work.switch_s - before == pytest.approx(scored.switch_s)
    assert trainer.work.num_checkouts == 1


def test_the_mixed_version_forward_reads_every_token_once_but_the_last(trainer):
    mixed = trajectory([3, 4, 5], sampled([6, 7], 0), sampled([9, 2], 1, kv="mixed"))
    fresh = trajectory([3, 4], sampled([5], 1), id="g0.1")
    trainer.put_batch(batch_of([mixed, fresh], [1.0, -1.0]))
    assert read(trainer, trainer.score_mixed) == 6 + 2
