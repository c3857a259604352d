"""The journal of rollouts: every record is read back as it was written, and adds up to what was in flight."""

import asyncio
import errno
import json
import math
import zlib
from dataclasses import fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.engine import Generation, Span
from oldlogits.core.engine_stats import EngineCapabilities
from oldlogits.core.errors import RunFolderError, RunWriteError
from oldlogits.core.trajectory import Context, Sampled
from oldlogits.rollout.journal import journal as journal_module
from oldlogits.rollout.journal.journal import FILE, Journal, read, to_bytes
from oldlogits.rollout.journal.progress import Progress, group_of, number_of
from oldlogits.rollout.journal.records import (
    Admitted,
    Answered,
    Ended,
    Failed,
    Grew,
    LeftOut,
    Published,
    Restarted,
    Running,
    SpanScored,
    StateSaved,
    Taken,
    decode,
    encode,
)

from ..builders import sampled
from ..waiting import wait_until

IDS = st.integers(0, 2**31 - 1)
VERSIONS = st.integers(0, 2**62)
LOGPS = st.floats(max_value=0.0) | st.just(math.nan)
REWARDS = st.floats(allow_nan=False, allow_infinity=False)
ANY = st.floats(allow_nan=True, allow_infinity=True)
TEXTS = st.text(st.characters(codec=None), max_size=8) | st.sampled_from(["", "\ud800", "a\ndb", "\u2028", "\x00"])
EPISODES = st.builds("g{:06d}.{}".format, st.integers(0, 2), st.integers(0, 1))
CONTEXTS = st.builds(lambda ids: Context(token_ids=tuple(ids)), st.lists(IDS, min_size=1, max_size=4))


@st.composite
def spans(draw):
    """A sampled segment."""
    logps = draw(st.lists(LOGPS, min_size=1, max_size=4))
    temperature = draw(st.floats(1e-6, 1e6))
    kv = draw(st.sampled_from(["fresh", "mixed"]))
    return sampled(range(len(logps)), draw(VERSIONS), logp=logps, kv=kv, temperature=temperature)


SEGMENTS = st.lists(CONTEXTS | spans(), min_size=1, max_size=3).map(tuple)
VALUES = st.lists(ANY, max_size=4).map(tuple)
GROUPS = st.integers(0, 2).map("g{:06d}".format)
RECORDS = st.one_of(
    st.builds(Admitted, group=GROUPS, row=IDS, version=VERSIONS, size=st.integers(1, 9)),
    st.builds(Grew, episode=EPISODES, start=st.integers(0, 9), segments=SEGMENTS),
    st.builds(
        Running,
        episode=EPISODES,
        num_segments=st.integers(0, 9),
        start=st.integers(0, 9),
        sampled=st.lists(spans(), min_size=1, max_size=2).map(tuple),
    ),
    st.builds(Answered, episode=EPISODES, num_tokens=st.integers(1, 9)),
    st.builds(StateSaved, episode=EPISODES, num_segments=st.integers(0, 9), state=TEXTS.map(json.dumps)),
    st.builds(SpanScored, episode=EPISODES, version=VERSIONS, values=VALUES),
    st.builds(Ended, episode=EPISODES, reward=REWARDS, stop_reason=st.text(max_size=4)),
    st.builds(Failed, episode=EPISODES, again=st.booleans(), version=VERSIONS, reason=st.text(max_size=8)),
    st.builds(Restarted, episode=EPISODES, version=VERSIONS, reason=st.text(max_size=8), num_lost_tokens=st.integers(0, 9)),
    st.builds(
        LeftOut,
        group=GROUPS,
        version=VERSIONS,
        rewards=st.lists(REWARDS, max_size=3).map(tuple),
        oldest_version=VERSIONS,
        num_failed=st.integers(0, 9),
    ),
    st.builds(Taken, version=st.integers(0, 4), groups=st.lists(GROUPS, max_size=3).map(tuple)),
    st.builds(Published, version=st.integers(0, 4), probe=VALUES),
)


def exact(value):
    """A value with NaN equal to itself, and -0.0 another number than 0.0."""
    if is_dataclass(value):
        return type(value).__name__, [(field.name, exact(getattr(value, field.name))) for field in fields(value)]
    if isinstance(value, dict):
        return [(key, exact(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [exact(each) for each in value]
    return repr(value)


def placed(records, progress):
    """Records in an order in which they can happen: tokens follow those before them. They are added up in `progress`."""
    found = []
    for record in records:
        if isinstance(record, Grew):
            record = replace(record, start=progress.num_segments(record.episode))
        if isinstance(record, Running):
            known = progress.episode(record.episode)
            start = known.num_running if known is not None else 0
            record = replace(record, num_segments=progress.num_segments(record.episode), start=start)
        found.append(record)
        progress.apply(record)
    return found


def damaged(line, at):
    changed = bytearray(line)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.slow
@given(RECORDS)
def test_every_record_is_read_back_bit_for_bit(record):
    line = encode(record)
    assert line.index(b"\n") == len(line) - 1, "a record is a line"
    assert exact(decode(line)) == exact(record)


@given(RECORDS, st.data())
def test_a_flipped_bit_anywhere_in_a_line_is_found(record, data):
    line = encode(record)
    at = data.draw(st.integers(0, len(line) - 2))
    with pytest.raises(ValueError, match="another checksum"):
        decode(damaged(line, at))


@pytest.mark.parametrize("text", [b"Nothing {}", b"\xff\xfe {}", b"Taken", b"Taken {}", b"Taken []", b'Ended {"episode": 1}'])
def test_a_line_that_is_no_record_is_a_value_error_whatever_its_checksum(text):
    with pytest.raises(ValueError, match=r"."):
        decode(b"%08x %s\n" % (zlib.crc32(text), text))


@pytest.mark.slow
@given(st.lists(RECORDS, max_size=30))
def test_progress_is_read_back_from_its_own_records(records):
    progress = Progress()
    placed(records, progress)
    again = Progress()
    for record in progress.records():
        assert again.apply(decode(encode(record))), "no record is of a group that is not in flight"
    for name in ("groups", "taken", "probes"):
        assert exact(getattr(again, name)) == exact(getattr(progress, name))


@pytest.mark.slow
@given(st.lists(RECORDS, max_size=30), st.integers(0, 30))
def test_a_checkpoint_anywhere_and_the_records_after_it_are_the_same_as_all(records, at):
    whole, before = Progress(), Progress()
    records = placed(records, whole)
    for record in records[:at]:
        before.apply(record)
    after = Progress()
    for record in before.at(0).records():
        after.apply(decode(encode(record)))
    for record in records[at:]:
        after.apply(record)
    assert exact(after.groups) == exact(whole.groups)
    assert exact(after.taken) == exact(whole.taken)


def failed(episode, *, again):
    return Failed(episode=episode, again=again, version=3, reason="look: ValueError: no")


def restarted(episode):
    return Restarted(episode=episode, version=3, reason="it answered otherwise", num_lost_tokens=5)


def left_out(group, *rewards):
    return LeftOut(group=group, version=3, rewards=rewards, oldest_version=2, num_failed=1)


def admitted(number=0, *, version=0, size=2):
    return Admitted(group=f"g{number:06d}", row=number, version=version, size=size)


ROUND = [
    admitted(0),
    Grew(episode="g000000.0", start=0, segments=(Context(token_ids=(1, 2)),)),
    Running(episode="g000000.0", num_segments=1, start=0, sampled=(sampled([3], 0),)),
    Ended(episode="g000000.1", reward=0.5, stop_reason="done"),
]


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def checkpoint_of(path, records=()):
    (path / FILE).parent.mkdir(parents=True, exist_ok=True)
    (path / FILE).write_bytes(to_bytes(records))
    return path


def test_nothing_is_written_before_the_first_checkpoint_and_all_after_it(tmp_path):
    journal = Journal(tmp_path / "rollouts")
    journal.note(admitted(0))
    number, held = journal.begin(0)
    assert (number, held) == (1, [admitted(0)])
    journal.note(admitted(1))
    journal.close()
    assert written(tmp_path / "rollouts") == {"000001.jsonl": encode(admitted(1))}


def test_a_run_that_goes_on_appends_to_the_last_file_and_begins_the_next_at_its_checkpoint(tmp_path):
    folder = tmp_path / "rollouts"
    first = Journal(folder)
    first.begin(0)
    first.note(admitted(0))
    first.close()
    progress = read(checkpoint_of(tmp_path / "v0"), folder, 1)
    second = Journal(folder, progress)
    second.note(admitted(1))
    number, held = second.begin(3)
    second.note(admitted(2, version=3))
    second.close()
    assert (number, held) == (2, [admitted(0), admitted(1)])
    assert written(folder) == {
        "000001.jsonl": encode(admitted(0)) + encode(admitted(1)),
        "000002.jsonl": encode(admitted(2, version=3)),
    }
    third = read(checkpoint_of(tmp_path / "v0"), folder, 1)
    assert list(third.groups) == ["g000000", "g000001", "g000002"], "from the checkpoint before, over both files"
    assert (third.num_submitted, third.next_row, third.next_group) == (6, 3, 3)


def test_files_that_no_checkpoint_needs_are_removed_and_no_others(tmp_path):
    journal = Journal(tmp_path / "rollouts")
    for version in range(4):
        journal.begin(version)
    journal.note(admitted())
    journal.close()
    journal.forget(3)
    assert list(written(tmp_path / "rollouts")) == ["000003.jsonl", "000004.jsonl"]


@pytest.mark.parametrize("missing", range(1, len(encode(ROUND[-1]))))
def test_a_last_line_that_a_kill_has_cut_is_dropped_and_what_comes_is_appended_whole(missing, tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    (folder / "000001.jsonl").write_bytes(to_bytes(ROUND)[:-missing])
    progress = read(checkpoint_of(tmp_path / "v0"), folder, 1)
    assert "g000000.1" not in progress.groups["g000000"].episodes
    journal = Journal(folder, progress)
    journal.note(ROUND[-1])
    journal.close()
    assert (folder / "000001.jsonl").read_bytes() == to_bytes(ROUND)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("place", ["checkpoint", "journal"])
def test_a_damaged_line_is_named_by_file_and_number(number, place, tmp_path):
    folder, checkpoint = tmp_path / "rollouts", checkpoint_of(tmp_path / "v0")
    folder.mkdir()
    path = checkpoint / FILE if place == "checkpoint" else folder / "000001.jsonl"
    lines = [encode(record) for record in ROUND]
    lines[number - 1] = damaged(lines[number - 1], 20)
    path.write_bytes(b"".join(lines))
    with pytest.raises(RunFolderError) as error:
        read(checkpoint, folder, 1)
    assert f"line {number} of {path} is damaged" in str(error.value)
    remedy = "resume from another checkpoint" if place == "checkpoint" else f"remove it and the later files of {folder}"
    assert remedy in str(error.value)


def test_the_remedy_for_a_damaged_file_of_the_journal_helps(tmp_path):
    folder, checkpoint = tmp_path / "rollouts", checkpoint_of(tmp_path / "v0", ROUND)
    folder.mkdir()
    (folder / "000001.jsonl").write_bytes(b"00000000 nothing\n")
    with pytest.raises(RunFolderError):
        read(checkpoint, folder, 1)
    (folder / "000001.jsonl").unlink()
    assert list(read(checkpoint, folder, 1).records()) == ROUND


def test_a_file_that_is_missing_before_others_is_noticed_and_no_token_stands_in_another_context(tmp_path):
    folder, checkpoint = tmp_path / "rollouts", checkpoint_of(tmp_path / "v0", ROUND)
    journal = Journal(folder, Progress())
    for record in ROUND:
        journal.progress.apply(record)
    journal.grew("g000000.0", [*ROUND[1].segments, sampled([3], 0)])
    journal.begin(0)
    journal.grew("g000000.0", [*ROUND[1].segments, sampled([3], 0), Context(token_ids=(4,))])
    journal.close()
    first, second = sorted(folder.iterdir())
    assert len(read(checkpoint, folder, 0).groups["g000000"].episodes["g000000.0"].segments) == 3
    first.unlink()
    with pytest.raises(RunFolderError, match="segments from 2 on where 1 are known") as error:
        read(checkpoint, folder, 0)
    assert f"line 1 of {second}" in str(error.value)
    second.unlink()
    assert list(read(checkpoint, folder, 0).records()) == ROUND


def test_what_is_of_no_group_in_flight_writes_nothing(tmp_path):
    journal = Journal(tmp_path / "rollouts")
    journal.begin(0)
    prompt = Context(token_ids=(1,))
    journal.grew("eval-0.3", [prompt])
    journal.running({"eval-0.3": [sampled([2])], "probe": [sampled([2])], "g000007.1": [sampled([2])]})
    for record in (
        Grew(episode="g000007.0", start=0, segments=(prompt,)),
        Ended(episode="g000007.0", reward=1.0, stop_reason="done"),
        failed("g000007.0", again=True),
        restarted("g000007.0"),
        left_out("g000007", 0.5, 1.0),
    ):
        journal.note(record)
    journal.close()
    assert written(tmp_path / "rollouts") == {"000001.jsonl": b""}
    assert journal.progress == Progress()


def test_every_segment_is_written_once_however_often_an_episode_is_told(tmp_path):
    journal = Journal(tmp_path / "rollouts")
    journal.begin(0)
    journal.note(admitted())
    segments = []
    for segment in (Context(token_ids=(1,)), sampled([2]), sampled([3], 1), Context(token_ids=(4,))):
        segments.append(segment)
        journal.grew("g000000.0", segments)
        journal.grew("g000000.0", segments)
    journal.close()
    read_back = read(checkpoint_of(tmp_path / "v0"), tmp_path / "rollouts", 1)
    assert read_back.groups["g000000"].episodes["g000000.0"].segments == segments
    assert (tmp_path / "rollouts/000001.jsonl").read_bytes().count(b"Grew") == 4


def test_a_disk_that_refuses_is_told_to_the_next_caller_and_the_run_can_close_it(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "rollouts")

    class Full:
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(type(tmp_path), "open", lambda path, mode: Full())
    journal.begin(0)
    journal.note(admitted(0))
    wait_until(lambda: journal._failure is not None, "the writer was refused")
    with pytest.raises(RunWriteError, match="No space left"):
        journal.note(admitted(1))
    journal.close()


def test_a_group_that_is_left_out_or_trained_is_not_in_flight_and_an_episode_that_begins_again_has_nothing():
    progress = Progress()
    for record in [*ROUND, admitted(1), failed("g000001.0", again=True), restarted("g000000.0")]:
        progress.apply(record)
    assert list(progress.groups["g000000"].episodes) == ["g000000.1"]
    assert (progress.num_submitted, progress.num_failed) == (2 + 2 + 1, 1)
    progress.apply(left_out("g000000", 0.5))
    assert (list(progress.groups), progress.num_filtered) == (["g000001"], 1)
    progress.forget(["g000001", "g000009"])
    assert not progress.groups
    assert progress.at(0).num_submitted == 0, "what a checkpoint counts is not counted again"


def test_an_episode_belongs_to_its_group_whichever_replay_it_is():
    assert [group_of(id) for id in ("g000012.3", "g000012.3r2", "nothing")] == ["g000012", "g000012", ""]
    assert number_of("g1234567") == 1234567


def test_an_episode_that_ended_with_a_turn_that_was_known_whole_holds_it():
    """An engine may tell a whole turn while it is paused; a run that goes on samples nothing of it, and reports nothing."""
    prompt = Context(token_ids=(1, 2))
    turn = Sampled(token_ids=(7, 8), logp_mu=(-0.5, -0.25), version=3, kv="fresh", temperature=1.0)
    progress = Progress()
    for record in (
        Admitted(group="g000000", row=0, version=3, size=2),
        Grew(episode="g000000.0", start=0, segments=(prompt,)),
        Running(episode="g000000.0", num_segments=1, start=0, sampled=(turn,)),
        Ended(episode="g000000.0", reward=1.0, stop_reason="done"),
    ):
        assert progress.apply(record)
    (trajectory,) = progress.groups["g000000"].episodes["g000000.0"].trajectories("g000000.0", "g000000")
    assert trajectory.segments == (prompt, turn)
    again = Progress()
    assert all(again.apply(record) for record in progress.records())
    assert again.groups == progress.groups


def test_a_running_turn_is_written_piece_by_piece_and_read_back_as_one_segment_of_each_version(tmp_path):
    journal, prompt = Journal(tmp_path / "rollouts"), Context(token_ids=(1,))
    journal.begin(0)
    journal.note(admitted())
    journal.grew("g000000.0", [prompt])
    for turn in ([sampled([2])], [sampled([2, 3])], [sampled([2, 3])], [sampled([2, 3, 4]), sampled([5], 1)]):
        journal.running({"g000000.0": turn})
    journal.close()
    pieces = [decode(line).sampled for line in (tmp_path / "rollouts/000001.jsonl").read_bytes().splitlines()[2:]]
    assert pieces == [(sampled([2]),), (sampled([3]),), (sampled([4]), sampled([5], 1))], "no token is written twice"
    episode = read(checkpoint_of(tmp_path / "v0"), tmp_path / "rollouts", 1).groups["g000000"].episodes["g000000.0"]
    assert episode.known == (prompt, sampled([2, 3, 4]), sampled([5], 1))


@pytest.mark.parametrize("lost", [2, 3])
def test_a_piece_of_a_running_turn_that_is_lost_is_noticed(lost, tmp_path):
    """Its tokens would stand in another context than they were sampled in: behind others, or in another turn."""
    records = [
        *ROUND[:3],
        Grew(episode="g000000.0", start=1, segments=(sampled([3]), Context(token_ids=(4,)))),
        Running(episode="g000000.0", num_segments=3, start=0, sampled=(sampled([5]),)),
        Running(episode="g000000.0", num_segments=3, start=1, sampled=(sampled([6]),)),
    ]
    checkpoint = checkpoint_of(tmp_path / "v0", [*records[:lost], *records[lost + 1 :]])
    if lost == 2:  # what the next segments hold as well
        assert len(read(checkpoint, None, 0).groups["g000000"].episodes["g000000.0"].known) == 4
    else:
        with pytest.raises(RunFolderError, match="where 1 after 1 are known: some are missing"):
            read(checkpoint, None, 0)
    checkpoint = checkpoint_of(tmp_path / "v0", [*records[:4], records[5]])
    with pytest.raises(RunFolderError, match="1 tokens of a turn after 3 segments, where 0 after 3 are known"):
        read(checkpoint, None, 0)


class Telling:
    """An engine that tells what its turns have sampled; `before_answer` is what happens while it does."""

    capabilities = EngineCapabilities(partials=True, growth=True)

    def __init__(self, before_answer=lambda: None):
        self.turns, self.asked, self.before_answer = {}, [], before_answer

    async def grown(self, known):
        self.asked.append(dict(known))
        found = {}
        for request, ids in self.turns.items():
            if (start := known.get(request.partition("/")[0])) is not None:
                new, spans = tuple(ids[start:]), (Span(version=0, start=0, end=len(ids) - start),)
                found[request] = Generation(
                    output_ids=new, logprobs=(-1.0,) * len(new), spans=spans if new else (), finish_reason="abort"
                )
        self.before_answer()
        return found


def followed(journal, engine, *steps, monkeypatch):
    """Let a journal look at an engine again after each step."""
    monkeypatch.setattr(journal_module, "GROWTH_S", 0.0)

    async def main():
        following = asyncio.create_task(journal.follow(engine, 1.0))
        for step in (*steps, lambda: None):
            step()
            seen = len(engine.asked)
            while len(engine.asked) < seen + 2:
                await asyncio.sleep(0)
        following.cancel()

    asyncio.run(main())


def test_a_journal_that_follows_an_engine_asks_for_what_it_does_not_know_and_notes_it_once(tmp_path, monkeypatch):
    journal, engine, prompt = Journal(tmp_path / "rollouts"), Telling(), Context(token_ids=(1,))
    journal.begin(0)
    journal.note(admitted())
    journal.grew("g000000.0", [prompt])
    engine.turns = {"g000000.0/0": [2, 3], "eval-0.3/1": [9], "probe": [9]}

    def next_turn():
        journal.grew("g000000.0", [prompt, sampled([2, 3, 4, 5]), Context(token_ids=(6,))])
        engine.turns = {"g000000.0/1": [7]}

    followed(
        journal,
        engine,
        lambda: engine.turns["g000000.0/0"].append(4),
        next_turn,
        monkeypatch=monkeypatch,
    )
    assert engine.asked[0] == {"g000000.0": 0}, "an evaluation and a probe are not asked for"
    assert {known["g000000.0"] for known in engine.asked} == {0, 1, 3}
    episode = journal.progress.episode("g000000.0")
    assert episode.known == (prompt, sampled([2, 3, 4, 5]), Context(token_ids=(6,)), sampled([7]))
    journal.close()


@pytest.mark.parametrize(
    "happening", ["the turn ends", "the episode begins again", "the episode fails", "the group is trained"]
)
def test_an_answer_about_a_turn_that_is_over_by_then_is_not_noted(happening, tmp_path, monkeypatch):
    journal, prompt = Journal(tmp_path / "rollouts"), Context(token_ids=(1,))
    journal.begin(0)
    journal.note(admitted())
    journal.grew("g000000.0", [prompt])

    def happens():
        engine.turns.clear()
        if happening == "the turn ends":
            journal.grew("g000000.0", [prompt, sampled([2, 3]), Context(token_ids=(4,))])
        elif happening == "it begins again":
            journal.note(restarted("g000000.0"))
            journal.grew("g000000.0", [prompt])
        elif happening == "it fails":
            journal.note(failed("g000000.0", again=False))
        else:
            journal.progress.forget(["g000000"])

    engine = Telling(lambda: engine.turns and happens())
    engine.turns = {"g000000.0/0": [2]}
    followed(journal, engine, monkeypatch=monkeypatch)
    episode = journal.progress.episode("g000000.0")
    assert episode is None or not episode.running
    journal.close()


def test_an_engine_that_does_not_tell_is_not_asked(tmp_path):
    journal, engine = Journal(tmp_path / "rollouts"), Telling()
    engine.capabilities = EngineCapabilities(partials=True)
    asyncio.run(asyncio.wait_for(journal.follow(engine, 1.0), 60))
    assert engine.asked == []
    journal.close()


def test_what_events_tell_of_the_time_since_a_checkpoint_is_read_back_and_what_it_holds_itself_is_not(tmp_path):
    journal = Journal(tmp_path / "rollouts")
    journal.note(admitted(0))
    journal.note(failed("g000000.0", again=True))
    _, held = journal.begin(0)
    since = [admitted(1), failed("g000001.1", again=False), restarted("g000001.0"), left_out("g000000", 0.5, 1.0)]
    for record in since[:2]:
        journal.note(record)
    journal.grew("g000001.0", [Context(token_ids=(1,))])
    for record in since[2:]:
        journal.note(record)
    journal.note(failed("g000009.0", again=True))  # of no group in flight
    journal.close()
    progress = read(checkpoint_of(tmp_path / "v0", held), tmp_path / "rollouts", 1)
    assert progress.told == since
    assert (progress.num_submitted, progress.num_failed, progress.num_filtered) == (2, 1, 2)
    assert read(tmp_path / "v0", None, 1).told == []
    assert progress.at(1).told == [], "a checkpoint counts their events"
