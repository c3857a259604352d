"""What a kind of work takes, as a line: a fixed time, and a time for each unit of its size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Sums over pieces of work, of which a straight line of seconds against size can be drawn.

    Args:
        num: Pieces of work.
        size: Sum of their sizes.
        size_sq: Sum of the squares of their sizes.
        seconds_s: Sum of what they took.
        size_s: Sum of size times seconds.
    """

    num: float = 0.0
    size: float = 0.0
    size_sq: float = 0.0
    seconds_s: float = 0.0
    size_s: float = 0.0

    def __add__(self, other: Line) -> Line:
        """Both."""
        return self._with(other, 1.0)

    def __sub__(self, other: Line) -> Line:
        """What was done in between."""
        return self._with(other, -1.0)

    def _with(self, other: Line, sign: float) -> Line:
        return Line(
            num=self.num + sign * other.num,
            size=self.size + sign * other.size,
            size_sq=self.size_sq + sign * other.size_sq,
            seconds_s=self.seconds_s + sign * other.seconds_s,
            size_s=self.size_s + sign * other.size_s,
        )

    def fit(self) -> tuple[float, float]:
        """The fixed seconds and those for a unit, by least squares, neither below 0; they reproduce the sum of the seconds.

        Example:
            Sizes 1 and 3 that took 2 s and 4 s: a fixed second, and one for each unit.
        """
        if not self.num or not self.size:
            return (self.seconds_s / self.num if self.num else 0.0), 0.0
        spread = self.size_sq - self.size**2 / self.num
        slope = (self.size_s - self.size * self.seconds_s / self.num) / spread if spread > 1e-9 * self.size_sq else 0.0
        slope = min(max(0.0, slope), self.seconds_s / self.size)
        return (self.seconds_s - slope * self.size) / self.num, slope

    def metrics(self, name: str) -> dict[str, float]:
        """The sums, under names that begin with `name`."""
        return {
            f"{name}_num": self.num,
            f"{name}_size": self.size,
            f"{name}_size_sq": self.size_sq,
            f"{name}_s": self.seconds_s,
            f"{name}_size_s": self.size_s,
        }


def piece(size: float, seconds_s: float) -> Line:
    """One piece of work."""
    return Line(num=1.0, size=size, size_sq=size**2, seconds_s=seconds_s, size_s=size * seconds_s)
