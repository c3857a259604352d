"""Names that strangers choose reach a terminal and a page as text, and never as its control codes or markup."""

import json
from pathlib import Path

import pytest

from oldlogits.cli.main import print_error, run
from oldlogits.core.errors import TokenTableError

NAME = "\x1b[31m\x1b]0;owned\x07\u202e\x9b1m\r<script>alert(1)</script>"
ROW = {"trajectory": NAME, "index": 1, "token_id": 3, "mask": True, "version": None, "trainer_version": 1, "logp_mu": -0.5}
HOSTILE = ("\x1b", "\x07", "\u202e", "\x9b", "\r")


def test_names_of_tokens_and_files_are_shown_without_control_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "\x1b[31mred.jsonl"
    path.write_text("".join(json.dumps({**ROW, "index": i, "version": [None, 1][i]}) + "\n" for i in (0, 1)))
    page = tmp_path / "doctor.html"
    assert run(["doctor", str(path), "--page", str(page)]) == 1
    shown = capsys.readouterr().out
    assert "\\x1b" in shown
    for text in (shown, page.read_text()):
        assert not any(code in text for code in HOSTILE)
    assert "<script>alert" not in page.read_text()


def test_an_error_shows_control_codes_of_what_it_quotes_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(TokenTableError(f"a token is given twice: '{NAME}'", got=f"{NAME}\nrow 2", allowed="once", fix="rename it"))
    shown = capsys.readouterr().err
    assert not any(code in shown for code in HOSTILE)
    assert "\\x1b[31m" in shown
    assert len(shown.splitlines()) == 5
