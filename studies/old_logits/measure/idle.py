"""Is the comparison one at all? Four checks of every learning run, against baselines that do not do what they are said to do.

They are those of probe-the-harness (arXiv 2610.02911), where a method's gain vanished once the clip of its baseline acted: does
the clip ever act, are seeds really different, is a batch trained twice, and is the loss divided by what the recipe states?
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from oldlogits.config.schema import RunConfig
from oldlogits.core.loss import LOSSES, STEP_RULES, LossInputs, card_of
from oldlogits.core.policies import MU, THETA
from oldlogits.objective import kept_mask, log_discrepancy, token_weights, weighted_loss
from oldlogits.record.events import BatchTaken, Updated
from oldlogits.train.spec import objective_of
from studies.old_logits.results import Checks

_COLUMNS = ("trajectory", "token_id", "step", "staleness", "advantage", "logp_mu", "logp_proximal", "logp_theta")


def idle_checks(config: RunConfig, folder: Path, updates: Sequence[Updated], batches: Sequence[BatchTaken]) -> Checks:
    """Check a run by what it recorded; its token tables must be there for every update.

    Args:
        config: The recipe.
        folder: The run folder.
        updates: Its updates.
        batches: The groups that each of them trained.
    """
    trained = Counter(group for batch in batches for group in batch.groups)
    digest, errors = "", [0.0]
    for update in updates:
        table = pq.read_table(folder / f"tokens/v{update.version:06d}.parquet", columns=list(_COLUMNS))
        columns = {name: table[name].to_numpy() for name in _COLUMNS}
        digest = digest or hashlib.sha256(columns["token_id"].astype(np.int64).tobytes()).hexdigest()[:16]
        errors.append(abs(update.metrics["loss/value"] - recomputed_loss(config, columns)))
    return Checks(
        clipped=max((1 - update.metrics["mask/rho_clip"] for update in updates), default=0.0),
        masked=max((1 - update.metrics["mask/rho_band"] for update in updates), default=0.0),
        first_batch=digest,
        num_retrained=sum(num > 1 for num in trained.values()),
        loss_error=max(errors),
    )


def recomputed_loss(config: RunConfig, columns: dict[str, np.ndarray]) -> float:
    """Form the loss of an update again from its record, in float64, with the denominator that the recipe states.

    The mean over its optimizer steps, as ``loss/value``. `columns` are those of the update's token table.
    """
    own = config.objective
    objective = objective_of(own, config.correction, variant=config.variant, band=config.fixed_band)
    column = {name: torch.tensor(columns[name]) for name in _COLUMNS[2:]}
    sequence = torch.from_numpy(np.unique(columns["trajectory"], return_inverse=True)[1])
    found = []
    for step in sorted(set(column["step"].tolist())):
        here = column["step"] == step
        index = torch.unique(sequence[here], return_inverse=True)[1]
        num, mask = int(index.max()) + 1, torch.ones(int(here.sum()), dtype=torch.bool)
        logp = {
            MU: column["logp_mu"][here].double(),
            objective.variant.proximal: column["logp_proximal"][here].double(),
            THETA: column["logp_theta"][here].double(),
        }
        tokens = LossInputs(
            logp=logp,
            advantages=column["advantage"][here].double(),
            loss_mask=mask,
            staleness=column["staleness"][here].long(),
            sequence_index=index,
            num_sequences=num,
        )
        is_kept = own.loss_aggregation == "token-mean-kept"
        weights = token_weights(
            mask,
            mode=own.loss_aggregation,
            sequence_index=index,
            num_sequences=num,
            kept_mask=kept_mask(log_discrepancy(objective.variant, logp), mask, objective.band) if is_kept else None,
            constant=own.loss_aggregation_tokens,
            dtype=torch.float64,
        )
        if rule := card_of(own.loss).step_rule:
            tokens = dataclasses.replace(tokens, step_mask=STEP_RULES.find(rule)(tokens, objective))
        terms = LOSSES.find(own.loss)(tokens, objective)
        found.append(float(weighted_loss(terms.values, weights)))
    return float(np.mean(found))
