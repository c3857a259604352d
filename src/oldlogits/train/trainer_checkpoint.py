"""The checkpoints of a trainer, and the batch that it writes for a post-mortem."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oldlogits.batch import TokenBatch
from oldlogits.config.schema import ModelConfig
from oldlogits.core.errors import RunFolderError
from oldlogits.core.scoring import Scored
from oldlogits.models.load import local, point_at, write_model
from oldlogits.models.lora import write_adapters
from oldlogits.train.checkpoint import of_kind, read_state, sliced, write_state
from oldlogits.train.consistency import ConsistencyChecks
from oldlogits.train.optimizer import Optimizer
from oldlogits.train.reports import ConsistencyErrors
from oldlogits.train.weights.average import Averaging
from oldlogits.train.weights.live import LiveModel
from oldlogits.train.weights.load import folder_weights


class TrainerCheckpoint:
    """Writes and reads all that a trainer needs to go on.

    Args:
        config: The model's section of the recipe.
        tokenizer: The model's tokenizer.
        live: The live weights.
        optimizer: The optimizer over them.
        checks: What the current version gave the probe tokens.
        averaging: The averaged weights; None: there are none.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        live: LiveModel,
        optimizer: Optimizer,
        checks: ConsistencyChecks,
        averaging: Averaging | None,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._live, self._optimizer, self._checks, self._averaging = live, optimizer, checks, averaging

    def save(self, folder: Path) -> None:
        """Write ``model/`` in the standard format, and ``state/`` to resume from, to a folder that is the same on all ranks.

        With adapters ``model/`` has them added, and ``adapter/`` holds them by themselves, as peft reads them.
        """
        m, live = self._config, self._live
        weights = folder_weights(live.model, live.dtype, m.adapter_scale, live.ranks)
        adapters = live.full_weights().tensors if m.lora_rank else {}
        state = folder / "state"
        if live.ranks.is_first:
            if m.lora_rank:
                write_adapters(
                    folder / "adapter", adapters, rank=m.lora_rank, alpha=m.lora_alpha, targets=m.lora_targets, base=m.path
                )
            write_model(live.model.config, live.model.generation_config, weights, folder / "model")
            self._tokenizer.save_pretrained(folder / "model")
            state.mkdir(parents=True, exist_ok=True)
            logps = self._checks.published.get(live.version, np.empty(0)).tolist()
            counters = {"version": live.version, "schedule_steps": self._optimizer.num_steps, "probe_logps": logps}
            counters |= asdict(self._checks.errors) | {"device": live.ranks.device.type}
            (state / "trainer.json").write_text(json.dumps(counters, indent=1))
        live.ranks.gather(None)  # the folder is there
        write_state(state, self._state(), live.ranks)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint of `save`, written by any number of ranks; the model's weights are loaded too.

        Raises:
            RunFolderError: The checkpoint is incomplete.
        """
        live, counters_file = self._live, folder / "state" / "trainer.json"
        with live.ranks.agreeing():
            if not counters_file.is_file():
                raise RunFolderError(
                    f"the checkpoint lacks {counters_file.name}",
                    got=str(folder),
                    allowed="a folder with model/ and state/, which every rank reads",
                    fix="resume from another run folder",
                )
        counters = json.loads(counters_file.read_text())
        state = read_state(folder / "state", live.model, live.ranks)
        torch.set_rng_state(state["rng"])
        parameters = dict(live.model.named_parameters())
        for name, master in of_kind("master", state).items():
            parameters[name].data.copy_(master)
        self._optimizer.load(state, counters.pop("schedule_steps"))
        live.version = counters.pop("version")
        same_device = counters.pop("device", live.ranks.device.type) == live.ranks.device.type
        published = np.array(counters.pop("probe_logps"), np.float32)
        point_at(live.scoring, live.weights)
        self._checks.check_restored(live.scoring, live.version, published, same_device=same_device)
        self._checks.errors = ConsistencyErrors(**counters)
        if self._averaging is not None:
            weights = {name: local(weight) for name, weight in of_kind("averaged", state).items()}
            self._averaging.load(of_kind("averaging", state), weights)

    def _state(self) -> dict[str, Tensor]:
        """Give all that `restore` needs but for counters, by the keys of a state."""
        live = self._live
        tensors = {"rng": torch.get_rng_state(), **self._optimizer.state()}
        tensors |= sliced("master", live.weights, live.model)
        if self._averaging is not None:
            tensors |= {f"averaging|{key}": value for key, value in self._averaging.state().items()}
            tensors |= sliced("averaged", self._averaging.average.weights, live.model)
        return tensors


def write_batch(folder: Path, batch: TokenBatch, scored: Scored | None) -> None:
    """Write a batch, and the proximal policy's log-probs of it, one for each loss token."""
    columns = asdict(batch)
    folder.mkdir(parents=True, exist_ok=True)
    ids = columns.pop("trajectory_ids")
    if scored is not None:
        columns[f"logp_{scored.policy}"] = scored.values
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in columns.items()},
        folder / "batch.safetensors",
    )
    (folder / "trajectories.json").write_text(json.dumps(list(ids)))
