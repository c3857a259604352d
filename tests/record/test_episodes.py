from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.record.episodes import Episode, EpisodeSegment, pieces_of, read_episodes
from oldlogits.record.jsonl import LineFile, RecordError
from oldlogits.record.report.transcripts import chosen_transcripts


def episode(name: str, *, version: int = 1, reward: float = 0.0, versions=(0, 1), stage="train", segments=()) -> Episode:
    return Episode(
        id=name,
        group="g",
        version=version,
        split="train" if stage == "train" else "heldout",
        stage=stage,
        reward=reward,
        stop_reason="done",
        num_turns=2,
        versions=versions,
        segments=segments,
    )


SEGMENTS = (
    EpisodeSegment(kind="context", text="Hi <b>&\n", num_tokens=2),
    EpisodeSegment(kind="sampled", text="ab", num_tokens=2, version=0, tokens=("a", "b"), logp_mu=(-0.5, float("-inf"))),
    EpisodeSegment(kind="sampled", text="c", num_tokens=1, version=1, tokens=("c",)),
)


def test_episodes_are_read_back_equal_with_and_without_their_text(tmp_path: Path):
    written = [episode("a", segments=SEGMENTS), episode("b", reward=float("inf"), stage="after")]
    with LineFile(tmp_path / "episodes.jsonl") as log:
        for one in written:
            log.append(asdict(one))
    assert list(read_episodes(tmp_path / "episodes.jsonl")) == written


def test_a_line_that_is_no_episode_is_refused(tmp_path: Path):
    with LineFile(tmp_path / "episodes.jsonl") as file:
        file.append({"id": "a"})
    with pytest.raises(RecordError, match="is no episode"):
        list(read_episodes(tmp_path / "episodes.jsonl"))


def test_the_lowest_and_highest_rewards_early_and_late_are_chosen_and_of_equals_those_of_most_versions():
    pool = [
        episode(f"{version}-{reward:g}-{len(versions)}", version=version, reward=reward, versions=versions)
        for version in range(1, 10)
        for reward in (0.0, 1.0)
        for versions in ((version,), (version - 1, version))
    ]
    assert [(t.title, t.episode.id) for t in chosen_transcripts(pool)] == [
        ("Early in training", "1-0-2"),
        ("Early in training", "1-1-2"),
        ("Late in training", "9-0-2"),
        ("Late in training", "9-1-2"),
    ]


def test_one_episode_is_shown_once_and_none_is_no_error():
    assert [t.episode.id for t in chosen_transcripts([episode("only")])] == ["only"]
    assert chosen_transcripts([]) == []
    assert [t.title for t in chosen_transcripts([episode("e", stage="after")])] == ["Evaluation"]


def test_sampled_segments_of_one_turn_are_joined_and_each_version_has_its_colour():
    (transcript,) = chosen_transcripts([episode("a", segments=SEGMENTS)])
    (context,), (first, second) = transcript.turns
    assert context.text == "Hi <b>&\n"
    assert [(segment.version, transcript.tint(segment)) for segment in (first, second)] == [(0, 0), (1, 1)]
    assert list(transcript.tokens(first)) == [("a", "version 0\nlog-prob -0.500"), ("b", "version 0\nlog-prob -inf")]
    assert list(transcript.tokens(second)) == [("c", "version 1")]


def bytes_of(ids) -> str:
    """A tokenizer of bytes, such as those at the end of a byte-level one."""
    return bytes(ids).decode(errors="replace")


@given(st.one_of(st.text(max_size=60).map(str.encode), st.binary(max_size=60)))
def test_the_pieces_of_a_turn_joined_are_its_text_whatever_its_bytes(content: bytes):
    pieces = pieces_of(bytes_of(content), list(content), bytes_of)
    assert "".join(pieces) == bytes_of(content)
    assert len(pieces) == len(content)


def test_a_piece_is_what_its_token_adds_and_a_character_is_of_the_token_that_completes_it():
    ids = list("aé☃".encode())
    assert pieces_of("aé☃", ids, bytes_of) == ("a", "", "é", "", "", "☃")


def test_the_pieces_of_a_long_turn_are_found_in_time_that_grows_with_its_tokens():
    num_decoded = 0

    def decode(ids):
        nonlocal num_decoded
        num_decoded += len(ids)
        return bytes_of(ids)

    text = "abcd" * 500
    assert pieces_of(text, list(text.encode()), decode) == tuple(text)
    assert num_decoded < 30 * len(text)
