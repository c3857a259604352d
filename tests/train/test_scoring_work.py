"""What scoring costs the trainer: the tokens that its forward passes read, and that its own checks are not counted."""

import numpy as np
import pytest

from oldlogits.core.scoring import ScoringSpan
from oldlogits.run.specs import scorer_spec, trainer_spec
from oldlogits.train import scorer as scorer_module
from oldlogits.train import scorer_model as window_scorer_module
from oldlogits.train.reports import ScoringWork
from oldlogits.train.scorer_model import ScorerModel
from oldlogits.train.trainer import Trainer

from ..builders import batch_of, sampled, trajectory

PROBE = [3, 9, 10, 11]


@pytest.fixture
def trainer(tiny_folder, recipe):
    """Its batch: 3 context, 2 of version 0, 1 context, 2 of version 1; and 2 context, 1 of version 1, 4 context."""
    made = Trainer(
        trainer_spec(recipe(variant="ppo_ewma_train_infer", proximal={"source": "ewma"}, audit={"share": 1.0})),
        tiny_folder,
        PROBE,
    )
    made.publish()
    made.live.version = 1
    made.publish()
    long = trajectory([3, 4, 5], sampled([6, 7], 0), [8], sampled([9, 2], 1))
    short = trajectory([3, 4], sampled([5], 1), [6, 7, 8, 9], id="g0.1")
    made.put_batch(batch_of([long, short], [1.0, -1.0]))
    return made


def read(trainer, call):
    before = trainer.scorer.work
    call()
    return (trainer.scorer.work - before).read_tokens


def test_a_forward_pass_reads_each_sequence_up_to_the_token_before_the_last_that_it_scores(trainer):
    assert trainer.scorer.work == ScoringWork(), "probe and publish are not counted"
    assert read(trainer, lambda: trainer.scorer.score(np.array([0, 1]), 0)) == 4
    assert read(trainer, lambda: trainer.scorer.score(np.array([2, 3, 4]), 1)) == 7 + 2
    assert read(trainer, lambda: trainer.scorer.score(np.arange(5), None)) == 7 + 2
    assert read(trainer, lambda: trainer.scorer.score_average(np.array([1]))) == 4
    assert read(trainer, lambda: trainer.scorer.score_engine(np.arange(5))) == 7 + 2
    piece = ScoringSpan(
        trajectory_id="g9.0", token_ids=np.array([3, 4, 5, 6]), positions=np.array([2, 3]), temperature=np.ones(2, np.float32)
    )
    assert read(trainer, lambda: trainer.scorer.score_spans([piece, piece], 1)) == 3 + 3


PIECE = ScoringSpan(
    trajectory_id="g9.0", token_ids=np.array([3, 4]), positions=np.array([1]), temperature=np.ones(1, np.float32)
)


def test_what_the_pieces_cost_is_what_the_trainer_worked(trainer):
    before = trainer.scorer.work
    scored = trainer.scorer.score_spans([PIECE], 0)
    work = trainer.scorer.work - before
    assert (work.switch_s, work.check_s) == pytest.approx((scored.switch_s, scored.check_s))
    assert work.num_checkouts == 1


class Clock:
    """Stands still, but for what `takes` wraps."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def takes(self, seconds, function):
        def timed(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return timed


def test_a_switch_ends_when_the_module_points_at_the_weights_and_the_check_is_told_apart(
    trainer, recipe, tiny_folder, monkeypatch
):
    scorer = ScorerModel(scorer_spec(recipe(proximal={"source": "dedicated", "scorer_versions": 2})), tiny_folder, PROBE)
    published = trainer.publish()
    scorer.publish(1, published.update, published.probe_logps)
    clock = Clock()
    for module in (scorer_module, window_scorer_module):
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(module, "point_at", clock.takes(1.0, module.point_at))
        monkeypatch.setattr(module, "score_tokens", clock.takes(10.0, module.score_tokens))
        monkeypatch.setattr(module, "score_and_count", clock.takes(10.0, module.score_and_count))

    before = trainer.scorer.work
    trainer.scorer.score(np.arange(5), 0)
    assert ((trainer.scorer.work - before).switch_s, (trainer.scorer.work - before).check_s) == (1.0, 10.0)
    before = trainer.scorer.work
    trainer.scorer.score_average(np.arange(5))
    assert ((trainer.scorer.work - before).switch_s, (trainer.scorer.work - before).check_s) == (1.0, 0.0)
    stored, held = trainer.scorer.score_spans([PIECE], 0), scorer.score_spans([PIECE], 1)
    assert (stored.switch_s, stored.check_s, stored.seconds_s) == (1.0, 10.0, 21.0), "checkout, check, forward"
    assert (held.switch_s, held.check_s, held.seconds_s) == (1.0, 0.0, 11.0), "checked when it was received"


def test_the_mixed_version_forward_reads_every_token_once_but_the_last(trainer):
    mixed = trajectory([3, 4, 5], sampled([6, 7], 0), sampled([9, 2], 1, kv="mixed"))
    fresh = trajectory([3, 4], sampled([5], 1), id="g0.1")
    trainer.put_batch(batch_of([mixed, fresh], [1.0, -1.0]))
    assert read(trainer, trainer.scorer.score_mixed) == 6 + 2
