"""An environment of one tool: a number to guess."""


class NumberGuess:
    """Guess a number between 1 and 9; the game says higher or lower."""

    system_prompt = "Find the number. Use the tool guess, then say done."

    def reset(self, *, number: int) -> str:
        """A new game."""
        self.number, self.guesses, self.found = number, 0, False
        return "I thought of a number from 1 to 9."

    def guess(self, value: int) -> str:
        """Compare a number with the secret one."""
        self.guesses += 1
        self.found = value == self.number
        return "right" if self.found else "higher" if value < self.number else "lower"

    def get_reward(self) -> float:
        """1 if the number was found within three guesses."""
        return float(self.found and self.guesses <= 3)
