"""What this package adds to a vLLM worker: weights from the trainer's copy on its machine. Imported by vLLM only.

    python -m vllm.entrypoints.openai.api_server ...
        --worker-extension-cls oldlogits.engines.protocols.vllm_worker.Extension    imports this module in every worker
        --weight-transfer-config '{"backend": "oldlogits"}'               chooses `FileTransfer`
        --additional-config '{"oldlogits_numerics": "fp8"}'               optional: rounds what it loads;
                                                                          "oldlogits_head_dim": heads of a narrower model;
                                                                          "oldlogits_adapter_scale": the trainer sends LoRA
                                                                          adapters of the model ("oldlogits_base", if the
                                                                          server's folder is a widened one)

    /start_weight_update -> /update_weights {"update_info": {"path": ..., "version": ...}}
        -> /finish_weight_update {"weight_version": ...}

Two things need a repair on CPU, where vLLM packs weights for its kernels. It multiplies with a packed copy of a tied head that
it made when the model was loaded, and a reload packs anew what was loaded, which is the embedding and not the head. Experts are
packed only when their kernel is made, which is once: after a reload the kernel would read unpacked ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, cast

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from oldlogits.core.server import SharedWeights
from oldlogits.engines.embedded.model_folder import read_weights
from oldlogits.engines.embedded.numerics import Numerics, check_numerics, round_linear
from oldlogits.engines.protocols.vllm_messages import NonceFile
from oldlogits.engines.protocols.wide_heads import Widening
from oldlogits.engines.shared_memory import is_shared, says
from oldlogits.models.adapters import merge
from oldlogits.versions import HostCopy

_LINEAR: Final = ("_proj.weight", "experts.gate_up_proj", "experts.down_proj", "lm_head.weight")
_IN_ITS_DTYPE: Final = ("fp32", "bf16")
"""Numerics that the server's own dtype makes; the others are rounded here."""


class FileTransfer(WeightTransferEngine):  # type: ignore[misc] # vLLM is untyped here
    """Loads all weights from a `HostCopy`."""

    init_info_cls = NonceFile
    update_info_cls = SharedWeights
    supports_draft_weight_update = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._kernels: dict[FusedMoEMethodBase, object] = {}

    def init_transfer_engine(self, init_info: NonceFile) -> None:
        """Refuse a trainer whose files cannot be read here."""
        path = Path(init_info.path)
        if not says(path, init_info.nonce):
            raise ValueError(f"{path} is no file of this machine that says the nonce: run server and trainer on one machine")

    def start_weight_update(self) -> None:
        """Make ready for weights in the names and shapes of the model folder."""
        initialize_layerwise_reload(self.model)
        if not torch.accelerator.is_available():
            self.take_kernels()

    def take_kernels(self) -> None:
        """Take the kernels of experts away, so that a reload makes others and packs for them; they come back where it fails."""
        for module in self.model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase) and method.moe_kernel is not None:
                self._kernels[method] = method.moe_kernel
                method.moe_kernel = None

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Load what the trainer shares; unlike the base class's, without a synchronisation that only accelerators have.

        If that fails, the model is made whole again, of weights of no version.
        """
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            self.finish_weight_update()
            raise
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedWeights) -> None:
        """Load what the trainer shares."""
        path = Path(update_info.path)
        if not is_shared(path):
            raise ValueError(f"{path} is not what a trainer shares: oldlogits-*.weights in shared memory")
        with HostCopy(path).read(update_info.version) as weights:
            self.model.load_weights(self._prepared(self._whole(weights)))

    def _whole(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """All weights: the base's with the adapters added, where it is these that the trainer sends."""
        own = self.vllm_config.additional_config
        scale = own.get("oldlogits_adapter_scale", 0)
        if not scale:
            return weights
        return merge(read_weights(Path(own.get("oldlogits_base") or self.model_config.model)), weights, scale)

    def _prepared(self, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Rounded and widened as this server was started for."""
        numerics = self._numerics
        if numerics not in _IN_ITS_DTYPE:
            weights = {n: round_linear(w, numerics) if n.endswith(_LINEAR) else w for n, w in weights.items()}
        narrow = self.vllm_config.additional_config.get("oldlogits_head_dim", 0)
        if narrow:
            shape = self.model_config.hf_config
            widening = Widening(narrow=narrow, wide=shape.head_dim, qk_norm=shape.model_type.startswith("qwen3"))
            weights = widening.weights(weights)
        return iter(weights.items())

    def finish_weight_update(self) -> None:
        """Pack what was loaded, experts and the tied head included."""
        finalize_layerwise_reload(self.model, self.model_config)
        while self._kernels:
            method, kernel = self._kernels.popitem()
            method.moe_kernel = method.moe_kernel or kernel
        if self.model_config.hf_config.tie_word_embeddings:
            self.renew_tied_head()

    def renew_tied_head(self) -> None:
        """Make the head's packed copy from the new embedding; a rounded head is a copy of its own.

        Families without a module for the head (Gemma) multiply with the embedding itself, which was packed like the rest.
        """
        is_rounded = self._numerics not in _IN_ITS_DTYPE
        if not hasattr(self.model, "lm_head"):
            if is_rounded:
                raise ValueError(f"numerics {self._numerics} round the head, and this model has none apart from its embedding")
            return
        head = self.model.lm_head
        if is_rounded:
            rounded = round_linear(self.model.model.embed_tokens.weight.data, self._numerics)
            head.weight = torch.nn.Parameter(rounded, requires_grad=False)
        head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing is held."""

    @property
    def _numerics(self) -> Numerics:
        asked = self.vllm_config.additional_config.get("oldlogits_numerics", "fp32")
        return check_numerics(cast(str, asked))


class Extension:
    """Named by ``--worker-extension-cls``; that this module is imported is all that it is for."""


WeightTransferEngineFactory.register_engine("oldlogits", FileTransfer)
