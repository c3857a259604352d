"""Tests choose the kernels that a block of code runs on."""

from contextlib import contextmanager
from unittest import mock

from oldlogits.versions.patches import kernel_choice

CHOICES = ("numba", "torch")


@contextmanager
def kernels(choice):
    """Within: every buffer on the CPU goes through these kernels, whatever its size."""
    with mock.patch.object(kernel_choice, "FEW", {"numba": 0, "torch": 1 << 62}[choice]):
        yield
