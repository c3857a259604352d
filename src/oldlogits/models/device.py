"""Where a process keeps its model, the CPU or a GPU, and what it sets for the whole process."""

from __future__ import annotations

import os
from typing import Final, Literal

import torch

from oldlogits.core.errors import ConfigError

CPU: Final = torch.device("cpu")


def configure_process(*, num_threads: int, seed: int) -> None:
    """Set what torch keeps for a whole process; called where a process begins, and by nothing that it builds.

    Args:
        num_threads: The threads of one operation on the CPU. Sums depend on it: with another number a run gives other numbers.
        seed: The seed of what is drawn without a generator of its own.
    """
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def find_device(wanted: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Find the device that a recipe asks for: of several GPUs that of this process's number, which torchrun gives.

    On a GPU fp32 is fp32: containers that switch TF32 on by an environment variable are overruled.

    Raises:
        ConfigError: There is no such GPU.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return CPU
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ConfigError(
            "there is no GPU for this process",
            got=f"{torch.cuda.device_count()} visible to torch {torch.__version__}, local rank {number}",
            allowed="one for each rank of a machine",
            fix="set trainer.device and engine.device to 'cpu', start fewer ranks, or install a torch with CUDA and look at "
            "CUDA_VISIBLE_DEVICES",
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("highest")
    return device
