"""An environment adapter from outside of the package: the recipe names it by ``tests.extension.own_adapter:adapt_quiz``.

It makes an environment of a quiz that was written for something else: an object with questions and their answers.
"""

from __future__ import annotations

from oldlogits.core.environment import ENVIRONMENTS, Environment
from oldlogits.core.errors import EnvironmentShapeError


class Quiz:
    """Questions with their answers; it knows nothing of this package."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers


NUMBERS = Quiz({f"w{i} w{i}": f"w{i + 1}" for i in range(10)})


def adapt_quiz(target: str) -> type[Environment]:
    """Make an environment class of a quiz."""
    quiz = ENVIRONMENTS.find(target)
    if not isinstance(quiz, Quiz):
        raise EnvironmentShapeError("this is no quiz", got=repr(quiz), allowed="a Quiz", fix="name a Quiz")
    questions = list(quiz.answers)

    class QuizEnvironment:
        """Answer a question; the reward is the share of right words."""

        @staticmethod
        def make_row(split: str, index: int) -> dict[str, str]:
            return {"question": questions[index % len(questions)]}

        def reset(self, question: str) -> str:
            self._wanted, self._said = quiz.answers[question], ["nothing"]
            return question

        def reply(self, message: str) -> str | None:
            self._said = message.split() or ["nothing"]
            return None

        def look_up(self, word: str) -> str:
            """Look up a word."""
            return word

        def get_reward(self) -> float:
            return sum(word <= self._wanted for word in self._said) / len(self._said)

    return QuizEnvironment
