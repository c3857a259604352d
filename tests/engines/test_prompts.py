"""Prompts that grow: what is kept, what is sent and written again, and what is not."""

import json
from array import array
from pathlib import Path

import pytest

from oldlogits.core.engine import Sampling
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import GenerateRequest, Transport
from oldlogits.core.trajectory import Ints
from oldlogits.engines import prompts
from oldlogits.engines.prompts import Prompts, flat
from oldlogits.engines.protocols.vllm import VllmProtocol
from oldlogits.engines.protocols.vllm_messages import GenerateBody


def test_a_prompt_begins_with_the_one_kept_only_if_every_token_is_the_same():
    kept = Prompts[str, str]()
    kept.keep("a", array("i", [3, 1, 4]), "made")
    assert kept.begun("a", array("i", [3, 1, 4, 1])) == (3, "made")
    assert kept.begun("a", array("i", [3, 1, 4])) == (3, "made")
    assert kept.begun("a", array("i", [3, 1])) is None
    assert kept.begun("a", array("i", [3, 1, 5, 1])) is None
    assert kept.begun("b", array("i", [3, 1, 4, 1])) is None
    assert kept.take("a") == (array("i", [3, 1, 4]), "made")
    assert kept.take("a") is None


def test_the_prompts_kept_are_the_newest_within_the_bound(monkeypatch):
    monkeypatch.setattr(prompts, "MOST_TOKENS", 10)
    kept = Prompts[int, None]()
    for name in range(4):
        kept.keep(name, array("i", range(4)), None)
    assert [name for name in range(4) if kept.begun(name, array("i", range(4)))] == [2, 3]
    kept.keep(2, array("i", range(6)), None)  # in the place of its four
    assert kept.begun(2, array("i", range(6))) == (6, None)
    assert kept.begun(3, array("i", range(4))) == (4, None)
    kept.keep(5, array("i", range(20)), None)
    assert kept.take(5) is kept.take(2) is None, "one that is longer than all leaves nothing"


def test_a_number_that_no_model_has_as_a_token_is_refused():
    assert flat([3, 1]) == flat((3, 1)) == flat(Ints([3, 1])) == array("i", [3, 1])
    with pytest.raises(ConfigError, match="2147483648"):
        flat([1, 2**31])


class Nowhere(Transport):
    """Carries nothing."""

    async def share(self, text: str) -> Path:
        raise NotImplementedError


@pytest.mark.parametrize("name", ["run-g000001.2/{turn}-0", "nobody's"])
def test_the_body_of_a_turn_is_that_of_its_whole_prompt_however_much_was_written_before(name):
    protocol = VllmProtocol(Nowhere())
    for turn, ids in enumerate([(3, 1), (3, 1, 4, 1, 5), (3, 1, 4, 1, 5), (9, 2), (9, 2, 6)]):
        request = GenerateRequest(request_id=name.format(turn=turn), token_ids=ids, sampling=Sampling(max_tokens=2, top_k=3))
        assert json.loads(protocol._body(request)) == GenerateBody.of(request).model_dump()


def test_what_was_written_of_a_trajectory_is_not_written_again():
    protocol = VllmProtocol(Nowhere())
    first = GenerateRequest(request_id="run-a/0-0", token_ids=Ints([3, 1]), sampling=Sampling(max_tokens=2))
    protocol._body(first)
    tokens, text = protocol._written.take("run-a")
    assert text == b"3,1"
    protocol._written.keep("run-a", tokens, b"what was written")
    body = protocol._body(GenerateRequest(request_id="run-a/1-0", token_ids=Ints([3, 1, 4]), sampling=Sampling(max_tokens=2)))
    assert body.startswith(b'{"token_ids": [what was written,4], ')
