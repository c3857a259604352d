"""Ranges of recipe keys that several sections use: as wide as any run could want, and narrow enough to compute with."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(0), Le(1_000_000)]
Positive = Annotated[int, Ge(1), Le(1_000_000)]
Few = Annotated[int, Ge(1), Le(1024)]
"""Processes and threads."""
Tokens = Annotated[int, Ge(1), Le(2**31 - 1)]
Versions = Annotated[int, Ge(0), Le(10_000)]
"""Lags: there are loops over all of them."""
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Bytes = Annotated[int, Ge(0), Le(2**60)]
AboveZero = Annotated[float, Ge(1e-9), Le(1e9)]
NotNegative = Annotated[float, Ge(0), Le(1e6)]
Seconds = Annotated[float, Gt(0), Le(1e6)]
"""Eleven days: the system's clocks do not take much more."""
AboveOne = Annotated[float, Gt(1)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Auto = Literal["auto"]
