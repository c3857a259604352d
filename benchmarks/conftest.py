"""What the benchmarks' tests share with those of the product."""

from tests.conftest import chatml_llama, tiny_folder  # noqa: F401
