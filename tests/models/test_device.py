"""Where a model is kept, with a torch that claims to see so many GPUs."""

import pytest
import torch

from oldlogits.core.errors import ConfigError
from oldlogits.models.device import find_device


@pytest.fixture
def gpus(monkeypatch):
    def see(num, local_rank=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return see


def test_auto_takes_the_gpu_of_the_ranks_number_and_the_cpu_where_there_is_none(gpus):
    gpus(0)
    assert find_device("auto") == torch.device("cpu")
    gpus(4)
    assert (find_device("auto"), find_device("cpu")) == (torch.device("cuda", 0), torch.device("cpu"))
    gpus(4, local_rank=3)
    assert find_device("cuda") == torch.device("cuda", 3)


@pytest.mark.parametrize("wanted, num, local_rank", [("cuda", 0, None), ("auto", 2, 2)])
def test_a_gpu_that_is_not_there_is_refused(wanted, num, local_rank, gpus):
    gpus(num, local_rank)
    with pytest.raises(ConfigError, match="no GPU for this process"):
        find_device(wanted)
