"""A game of two: the agent guesses a number from 1 to 9, the other side says higher or lower."""


class Guess:
    """One episode. Public methods with docstrings would be tools of the agent; this game has none, it is a conversation."""

    system_prompt = "guess my number"

    def reset(self, *, number: int) -> str:
        """Begin an episode with a row of rows.jsonl; returns the first message to the agent."""
        self.number, self.guesses, self.found = number, 0, False
        return "from 1 to 9"

    def reply(self, message: str) -> str | None:
        """Answer what the agent said; None ends the episode."""
        self.guesses += 1
        words = message.split()
        if len(words) != 1 or not words[0].isdecimal():
            return None
        self.found = int(words[0]) == self.number
        if self.found or self.guesses == 4:
            return None
        return "higher" if self.number > int(words[0]) else "lower"

    def get_reward(self) -> float:
        """Score the episode when it has ended: 1 if the number was found within four guesses."""
        return float(self.found)
