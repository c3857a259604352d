"""A made-up run that looks like a real one: what the runtime would have recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from oldlogits.record.episodes import Episode, EpisodeSegment
from oldlogits.record.event_log import EventLog
from oldlogits.record.events import Evaluated, Probed, RunEnded, RunStarted, Updated, WarmStarted
from oldlogits.record.folder import RunFolder
from oldlogits.record.intervals import wilson
from oldlogits.record.jsonl import LineFile
from oldlogits.record.summary import summarise_folder
from oldlogits.record.tables import write_tokens

NUM_TOKENS = 400
MAX_STALENESS = 6


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """``fake_run(num_updates, seed)`` writes a run folder and returns it."""

    def make(num_updates: int = 12, seed: int = 0) -> Path:
        return write_fake_run(tmp_path / f"run{num_updates}", num_updates=num_updates, seed=seed)

    return make


def write_fake_run(path: Path, *, num_updates: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder = RunFolder.create(path)
    folder.write_config({"variant": "decoupled_exact", "seed": seed, "trainer": {"lr": 5e-4, "minibatches_per_update": 2}})
    with EventLog(folder.events) as log, LineFile(folder.episodes) as episodes:
        _start(log, seed)
        _evaluate(log, "before", 0, 0.24)
        for version in range(1, num_updates + 1):
            success = 0.22 + 0.55 * (1 - math.exp(-3 * version / num_updates)) + 0.05 * rng.standard_normal()
            columns = _tokens(rng, version)
            write_tokens(folder.tokens, version, columns)
            _update(log, rng, version, success, columns)
            if version % max(num_updates // 4, 1) == 0 and version < num_updates:
                _evaluate(log, "during", version, success)
            if version % max(num_updates // 6, 1) == 1 or version == num_updates:
                for reward in (0.0, 1.0):
                    episodes.append(asdict(_episode(rng, version, reward)))
            episodes.append(asdict(_silent_episode(version)))
        _evaluate(log, "after", num_updates, 0.71)
        log.emit(RunEnded(version=num_updates, reason="done", error="", accounting=_account(num_updates)))
    summarise_folder(folder).write(folder.summary)
    return path


def _start(log: EventLog, seed: int) -> None:
    log.emit(
        RunStarted(
            version=0,
            variant="decoupled_exact",
            r_d="old/mu",
            r_s="theta/old",
            corrects_mismatch=True,
            source="snapshot",
            runtime="local",
            seed=seed,
            denominator="tokens",
            band=1.1,
            eps_low=0.2,
            eps_high=0.28,
            truncation=None,
            max_staleness=MAX_STALENESS,
            group_size=8,
            prompts_per_update=16,
            model="tiny desk model",
            num_parameters=157_312,
            num_trained=157_312,
            numerics="fp8",
        )
    )
    log.emit(WarmStarted(version=0, steps=400, loss=0.31, cached=False, seconds_s=12.2))


def _evaluate(log: EventLog, stage: str, version: int, success: float) -> None:
    for mode, bonus in (("sampled", 0.0), ("greedy", 0.1)):
        found = wilson(round(192 * min(success + bonus, 1)), 192)
        log.emit(
            Evaluated(
                version=version,
                stage=stage,
                mode=mode,
                mean=found.mean,
                low=found.low,
                high=found.high,
                reward_mean=found.mean,
                reward_low=found.low,
                reward_high=found.high,
                success_at=1.0,
                num_episodes=192,
                rewards=[float(index < round(192 * min(success + bonus, 1))) for index in range(192)],
                seconds_s=1.9,
            )
        )


def _tokens(rng: np.random.Generator, version: int) -> dict[str, np.ndarray]:
    staleness = rng.integers(0, min(MAX_STALENESS, version - 1) + 1, NUM_TOKENS)
    log_r_d = 0.035 * rng.standard_t(4, NUM_TOKENS)
    log_r_s = (0.02 + 0.05 * np.sqrt(staleness)) * rng.standard_t(4, NUM_TOKENS)
    advantage = rng.choice([-1.0, 1.0], NUM_TOKENS)
    band_mask = np.abs(log_r_d) <= math.log(1.1)
    clip_mask = ~(((advantage > 0) & (log_r_s > math.log(1.28))) | ((advantage < 0) & (log_r_s < math.log(0.8))))
    logp_mu = -rng.exponential(0.5, NUM_TOKENS)
    return {
        "trajectory": np.array([f"t{version}-{index // 50}" for index in range(NUM_TOKENS)]),
        "index": np.arange(NUM_TOKENS),
        "token_id": rng.integers(0, 500, NUM_TOKENS),
        "version": version - 1 - staleness,
        "trainer_version": np.full(NUM_TOKENS, version - 1),
        "staleness": staleness,
        "provenance": np.full(NUM_TOKENS, "exact"),
        "reward": (advantage > 0).astype(np.float32),
        "advantage": advantage.astype(np.float32),
        "logp_mu": logp_mu.astype(np.float32),
        "logp_proximal": (logp_mu + log_r_d).astype(np.float32),
        "logp_theta": (logp_mu + log_r_d + log_r_s).astype(np.float32),
        "log_r_d": log_r_d.astype(np.float32),
        "log_r_s": log_r_s.astype(np.float32),
        "loss_mask": np.ones(NUM_TOKENS, dtype=bool),
        "band_mask": band_mask,
        "clip_mask": clip_mask,
        "active_mask": band_mask & clip_mask,
        "step": np.zeros(NUM_TOKENS, np.int32),
        "temperature": np.ones(NUM_TOKENS, np.float32),
        "mixed_kv": np.zeros(NUM_TOKENS, dtype=bool),
        "context": np.zeros(np.arange(0, NUM_TOKENS, 50).sum(), np.int32),
    }


def _update(log: EventLog, rng: np.random.Generator, version: int, success: float, columns: dict[str, np.ndarray]) -> None:
    lags, counts = np.unique(columns["staleness"], return_counts=True)
    wait_s, step_s = float(rng.gamma(2, 0.2)), 0.8 + 0.1 * float(rng.random())
    log.emit(
        Updated(
            version=version,
            metrics={
                "reward/mean": success + 0.05,
                "episode/num": 128.0,
                "episode/multi_version": 71 / 128,
                "copies/trainer": 6.2,
                "copies/engine": 2.0,
                "mask/num_nonfinite": 0.0,
                "ratio/log_r_d_abs_max": float(np.abs(columns["log_r_d"]).max()),
                "reward/success": success,
                "loss/value": float(rng.normal(0, 0.02)),
                "policy/entropy": 0.5 / version,
                "reward/uniform_groups": 0.25,
                "train/lr": 1e-3,
                "episode/turns": 3.0,
                "episode/sampled_tokens": 20.0,
                "grad/norm": float(rng.gamma(4, 0.1)),
                "mask/rho": float(columns["active_mask"].mean()),
                "mask/rho_band": float(columns["band_mask"].mean()),
                "mask/rho_clip": float(columns["clip_mask"].mean()),
                "ratio/ess": float(0.9 + 0.02 * rng.standard_normal()),
                "kl/mu_prox_k1": float(abs(rng.normal(1e-3, 2e-4))),
                "kl/mu_prox_k3": float(abs(rng.normal(1.2e-3, 2e-4))),
                "kl/prox_theta_k3": float(abs(rng.normal(6e-3, 1e-3))),
                "kl/prox_theta_k3@lag1": float("nan"),
                "ratio/log_r_d_abs_mean": float(np.abs(columns["log_r_d"]).mean()),
                "ratio/log_r_s_abs_mean": float(np.abs(columns["log_r_s"]).mean()),
                "queue/running": float(rng.integers(90, 128)),
                "queue/queued": float(rng.integers(0, 30)),
                "staleness/mean": float(columns["staleness"].mean()),
                "staleness/max": float(columns["staleness"].max()),
                "throughput/engine_tokens_per_s": 2300 + 150 * float(rng.standard_normal()),
                "throughput/trainer_tokens_per_s": 4900 + 300 * float(rng.standard_normal()),
                "idle/engine_share": 0.03 + 0.02 * float(rng.random()),
                "idle/trainer_share": wait_s / (wait_s + step_s + 0.4),
                "time/wait_batch_s": wait_s,
                "time/score_s": 0.25,
                "time/step_s": step_s,
                "time/publish_s": 0.06,
                "time/update_s": wait_s + step_s + 0.31,
            },
            staleness_counts={str(lag): int(count) for lag, count in zip(lags, counts, strict=True)},
            provenance={"exact": NUM_TOKENS},
        )
    )
    log.emit(
        Probed(
            version=version,
            max_abs_error=3.1e-6,
            mean_abs_error=4e-7,
            num_tokens=64,
            num_above=0,
            consistency_publish_max_abs_error=0.0,
            consistency_lag0_max_abs_error=2.4e-7,
        )
    )


def _episode(rng: np.random.Generator, version: int, reward: float) -> Episode:
    older = max(0, version - 2)
    order = "A7" if reward else "A1"
    return Episode(
        id=f"episode-{version}-{reward:g}",
        group=f"g{version}",
        version=version,
        split="train",
        stage="train",
        reward=reward,
        stop_reason="done" if reward else "max_turns",
        num_turns=3,
        versions=tuple(sorted({older, max(0, version - 1), version})),
        segments=(
            _context("<system>You work at the order desk. Refund only what was delivered & is under 30 days old.</system>\n"),
            _context("<user>My lamp arrived broken. I want my money back.</user>\n<agent>"),
            _sampled(rng, "Could you tell me the number of the order ?", older),
            _context("</agent>\n<user>It is A7.</user>\n<agent>"),
            _sampled(rng, "<call> get_order order =", older),
            _sampled(rng, f"{order} </call>", max(0, version - 1)),
            _context(f'</agent>\n<tool>{{"order": "{order}", "status": "delivered", "days": 12}}</tool>\n<agent>'),
            _sampled(rng, f"<call> refund order = {order} </call> Your refund is on its way .", version),
        ),
    )


def _silent_episode(version: int) -> Episode:
    return Episode(
        id=f"silent-{version}",
        group="g",
        version=version,
        split="train",
        stage="train",
        reward=1.0,
        stop_reason="done",
        num_turns=3,
        versions=(version,),
    )


def _context(text: str) -> EpisodeSegment:
    return EpisodeSegment(kind="context", text=text, num_tokens=len(text.split()))


def _sampled(rng: np.random.Generator, text: str, version: int) -> EpisodeSegment:
    tokens = tuple(f"{word} " for word in text.split())
    logp_mu = tuple(float(value) for value in -rng.exponential(0.4, len(tokens)))
    return EpisodeSegment(
        kind="sampled", text="".join(tokens), num_tokens=len(tokens), version=version, tokens=tokens, logp_mu=logp_mu
    )


def _account(num_updates: int) -> dict[str, int]:
    trained = 128 * num_updates
    return {
        "submitted": trained + 40,
        "trained": trained,
        "filtered": 8,
        "failed": 1,
        "cancelled": 31,
        "queued": 0,
        "running": 0,
    }
