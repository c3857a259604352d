"""What the studies' tests share with those of the product."""

from tests.conftest import tiny_folder  # noqa: F401
