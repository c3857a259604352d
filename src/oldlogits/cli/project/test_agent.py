"""The environment by itself; run it with pytest."""

import json
from pathlib import Path

from agent import WORDS, Opposites

ROWS = [json.loads(line) for line in (Path(__file__).parent / "rows.jsonl").read_text().splitlines()]


def test_each_row_is_won_by_its_answer_only():
    """The row's answer is rewarded, and no other word is."""
    for row in ROWS:
        for word in WORDS:
            game = Opposites()
            game.reset(**row)
            game.reply(word)
            assert game.get_reward() == (word == row["answer"])
