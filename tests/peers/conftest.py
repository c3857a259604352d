"""Tests with other trainers' packages: `make test-peers` installs them and runs these, and nothing else collects them."""

import os
from importlib.util import find_spec

import pytest
import torch

from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
from oldlogits.objective import split_ratio, surrogate, token_weights, weighted_loss

from ..several_versions import SeveralVersions

collect_ignore_glob = [] if find_spec("areal") and find_spec("verl") else ["test_*.py"]

BAND, EPS_LOW, EPS_HIGH, DUAL_CLIP = 1.5, 0.2, 0.28, 3.0


@pytest.fixture(scope="session")
def several(tiny_folder):
    return SeveralVersions(tiny_folder)


@pytest.fixture(scope="session")
def objective():
    """What `oldlogits.objective` makes of tensors of any one shape; the denominator is the number of tokens of the mask."""

    def loss(mu, old, theta, advantages, mask, *, discrepancy="weight_and_mask", denominator="token-mean", dual_clip=DUAL_CLIP):
        logp = {MU: mu.flatten(), OLD: old.flatten(), THETA: theta.flatten()}
        knobs = {"band": BAND, "eps_low": EPS_LOW, "eps_high": EPS_HIGH, "dual_clip": dual_clip}
        flat = mask.flatten().bool()
        split = split_ratio(VARIANTS["decoupled_exact"], logp)
        terms = surrogate(split, advantages.flatten(), flat, discrepancy=discrepancy, **knobs)
        kept = flat & terms.band_mask
        assert (kept & ~terms.clip_mask).sum() > 0, "the clip acts"
        assert 0 < kept.sum() < flat.sum(), "the band acts"
        return weighted_loss(terms.values, token_weights(flat, mode=denominator, kept_mask=kept))

    return loss


@pytest.fixture(scope="session")
def noise():
    """What an engine adds to log-probs: some within the band, some far outside of it."""

    def draw(shape, seed):
        generator = torch.Generator().manual_seed(seed)
        small = 0.1 * torch.randn(shape, generator=generator)
        return small + 2.0 * (torch.rand(shape, generator=generator) < 0.15)

    return draw


@pytest.fixture(scope="session")
def transfer_queue():
    """verl's real TransferQueue, in a Ray cluster of this machine."""
    import ray
    import transfer_queue as tq

    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    for last in (False, False, True):
        try:
            ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
            break
        except Exception:  # Ray gives a node 30 seconds to start, which a machine that others fill may take longer for
            ray.shutdown()
            if last:
                raise
    tq.init()
    yield
    tq.close()
    ray.shutdown()
