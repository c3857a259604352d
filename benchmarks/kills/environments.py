"""An environment that no resumed run can carry on."""

from __future__ import annotations

import random
from typing import Final

from order_desk.environment import OrderDesk

_DOTS: Final = random.SystemRandom().randrange(1, 12)


class OtherDesk(OrderDesk):
    """The order desk, with a customer who speaks otherwise in every process: no recorded call has the same answer again."""

    def reply(self, message: str) -> str | None:
        """Answer as the desk's customer does, and pause for a while."""
        answer = super().reply(message)
        return answer if answer is None else f"{answer}{' .' * _DOTS}"
