"""Ranges of recipe keys that several sections use."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
AboveZero = Annotated[float, Gt(0), Lt(math.inf)]
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
AboveOne = Annotated[float, Gt(1)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Auto = Literal["auto"]
