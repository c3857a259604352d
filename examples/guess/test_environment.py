"""What the environment promises, tested without a model."""

from environment import Guess


def play(number: int, *guesses: str) -> float:
    """One episode with these guesses; returns its reward."""
    game = Guess()
    game.reset(number=number)
    for guess in guesses:
        if game.reply(guess) is None:
            break
    return game.get_reward()


def test_the_number_found_within_four_guesses_is_a_success():
    assert play(7, "5", "8", "6", "7") == 1
    assert play(7, "7") == 1


def test_another_number_or_another_word_is_none():
    assert play(7, "5", "8", "6", "9") == 0
    assert play(7, "seven") == 0
    assert play(7, "7 7") == 0
