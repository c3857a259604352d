"""The annotations of tensors' shapes, which jaxtyping checks in tests; without that package they say the same to a reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Float32 as Float32
    from jaxtyping import Float64 as Float64
    from jaxtyping import Int as Int
    from jaxtyping import Int64 as Int64
    from jaxtyping import Shaped as Shaped
else:
    try:
        from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped
    except ModuleNotFoundError:

        class Unchecked:
            """A shape that nothing checks: ``Float[Tensor, "token"]`` is `Tensor`."""

            def __class_getitem__(cls, item):
                """Return the array's type alone."""
                return item[0]

        Bool = Float = Float32 = Float64 = Int = Int64 = Shaped = Unchecked
