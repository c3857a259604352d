"""`oldlogits serve` as a process, and whatever a client may send: it refuses, says why, and goes on as before."""

import contextlib
import json
import socket
import struct
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oldlogits.core.errors import LayoutError
from oldlogits.core.weights import FullWeights
from oldlogits.engines.embedded.model_folder import read_weights
from oldlogits.engines.shared_memory import HostWeights, share_bytes, shared_file, take_bytes
from oldlogits.versions import HostCopy

from ..servers import serving
from ..waiting import HUNG_S, wait_until

pytestmark = pytest.mark.slow

IDLE_S = 2
LIMIT = 2**20 + 16 * 128
GOOD = {"token_ids": [3, 1, 4], "sampling_params": {"max_tokens": 8, "temperature": 0.0}}


@pytest.fixture(scope="module")
def server(tiny_folder):
    with serving(tiny_folder, "--idle-s", str(IDLE_S), "--max-connections", "64", "--max-num-seqs", "8") as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=HUNG_S, trust_env=False) as one:
        yield one


@pytest.fixture(scope="module")
def tokens(client):
    """What the server samples greedily before anybody has sent anything else."""
    return sampled(client)


def sampled(client):
    answer = client.post("/inference/v1/generate", json=GOOD)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def label(client):
    return client.get("/weight_info").json()["weight_version"]


def recovered(client):
    """End what a request may have begun: an update, a pause."""
    client.post("/finish_weight_update", json={})
    assert client.post("/resume").status_code == 200


def check_refusal(answer):
    assert 400 <= answer.status_code < 500, f"{answer.status_code}: {answer.text[:300]}"
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert len(error["message"]) > 8


VALID = {
    "/inference/v1/generate": {
        "request_id": "a",
        "token_ids": [3, 1],
        "sampling_params": {
            "max_tokens": 4, "temperature": 1.0, "top_p": 0.9, "top_k": 3, "stop_token_ids": [1], "prompt_logprobs": 0,
            "logprobs": 0, "n": 1, "min_p": 0.0,
        },
        "stream": False,
    },
    "/inference/v1/abort_requests": {"request_ids": ["a"]},
    "/abort_requests": {"request_ids": ["a"]},
    "/init_weight_transfer_engine": {"init_info": {"path": "/dev/shm/oldlogits-1.weights", "nonce": "x"}},
    "/start_weight_update": {},
    "/update_weights": {"update_info": {"path": "/dev/shm/oldlogits-1.weights", "version": 1}},
    "/finish_weight_update": {"weight_version": "fuzz"},
    "/pause": {},
    "/resume": {},
}  # fmt: skip

ODD = st.sampled_from(
    [
        *(2**63, -(2**63) - 1, 2**64, 10**400, -1, 0, 2**31, 1e308, 1e-300, 5e-324, float("nan"), float("inf"), True, None),
        *("", "\0", "\ud800", "x" * 5000, "../../etc/passwd", "/dev/shm/oldlogits-\0.weights"),
        "/dev/shm/oldlogits-" + "y" * 300 + ".weights",
    ]
)
JSON = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bodies(draw, valid):
    """A valid body with a value or two replaced, removed or added, or a body of nothing that is valid."""
    if draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    body = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 2))):
        place = body
        while place and isinstance(inner := place[key := draw(st.sampled_from(sorted(place)))], dict) and draw(st.booleans()):
            place = inner
        if not place or draw(st.integers(0, 9)) == 0:
            place[draw(st.text(max_size=8))] = draw(JSON)
        elif draw(st.integers(0, 9)) == 0:
            del place[key]
        else:
            place[key] = draw(JSON | st.lists(ODD, min_size=1, max_size=3))
        if not isinstance(body, dict):
            break
    return body


@pytest.mark.parametrize("path", VALID)
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_body_holds_the_answer_is_200_or_a_refusal_and_the_server_goes_on(path, data, client, tokens):
    body = data.draw(bodies(VALID[path]))
    before = label(client)
    answer = client.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    if answer.status_code != 200:
        check_refusal(answer)
    recovered(client)
    assert sampled(client) == tokens
    assert label(client) == before, "no weights were loaded"


@pytest.mark.parametrize(
    "content",
    [
        *(b"[" * 100_000, b'{"token_ids": ' + b"[" * 5000 + b"]" * 5000 + b"}", b"", b"{", b"\xff\xfe", b"null", b"[]", b'"x"'),
        *(b'{"token_ids": [1], "sampling_params": {"temperature": ' + hot + b"}}" for hot in (b"1" + b"0" * 400, b"1e400")),
        *(b'{"token_ids": [' + number + b"]}" for number in (b"9" * 5000, b"-1", b"1.5", b"NaN", b"9223372036854775808")),
        *(
            b'{"token_ids": [3], "sampling_params": {"' + key + b'": ' + value + b"}}"
            for key in (b"top_k", b"max_tokens", b"prompt_logprobs", b"logprobs")
            for value in (b"9223372036854775808", b"-9223372036854775809", b'"1"')
        ),
        *(
            b'{"token_ids": [3], "sampling_params": {"' + key + b'": ' + value + b"}}"
            for key, value in (
                (b"top_k", b"9223372036854775807"), (b"max_tokens", b"0"),
                (b"stop_token_ids", b"[9223372036854775808]"), (b"stop_token_ids", b"[9223372036854775807]"),
                (b"stop_token_ids", b"[-1]"), (b"stop_token_ids", b"[" + b"1," * 2000 + b"1]"),
                (b"temperature", b"1e-300"), (b"temperature", b"1e308"), (b"temperature", b"-1"), (b"top_p", b"1e-300"),
                (b"top_p", b"0"), (b"top_p", b"2"), (b"n", b"2"), (b"min_p", b"0.5"),
            )
        ),
        b'{"token_ids": [1], "request_id": "' + b"x" * 5000 + b'"}',
        b'{"token_ids": [1], "request_id": "\\ud800"}',
    ],
)  # fmt: skip
def test_a_wrong_request_to_sample_is_refused_with_its_reason(content, client, tokens):
    check_refusal(client.post("/inference/v1/generate", content=content, headers={"content-type": "application/json"}))
    assert sampled(client) == tokens


def test_unknown_routes_and_methods_are_refused_in_the_same_shape(client):
    for method, path in [
        ("GET", "/nowhere"),
        ("GET", "/pause"),
        ("POST", "/health"),
        ("POST", "/pause?mode=%00"),
        ("PUT", "/x"),
    ]:
        check_refusal(client.request(method, path))


def memory_of(pid):
    return int(next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM")).split()[1]) * 1024


def test_a_body_above_the_limit_is_refused_before_it_takes_memory(client, server, tokens):
    before = memory_of(server.process.pid)
    check_refusal(client.post("/inference/v1/generate", content=b" " * (LIMIT + 1)))
    chunks = (b" " * 2**20 for _ in range(200))
    with contextlib.suppress(httpx.TransportError):  # the connection may be closed while the client still writes
        assert client.post("/inference/v1/generate", content=chunks).status_code == 413
    assert memory_of(server.process.pid) - before < 50 * 2**20
    assert sampled(client) == tokens


def exchange(server, *parts, pause_s=0.0):
    """What comes back for bytes that are written as they are, until the server closes or has answered."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=HUNG_S) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause_s)
            found = b""
            while b"\r\n\r\n" not in found and (more := connection.recv(4096)):
                found += more
        except ConnectionError:
            return b""
        return found


POST = b"POST /inference/v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BROKEN = {
    "half an address as host": (b"GET /load HTTP/1.1\r\nHost: [::1\r\n\r\n", b"400"),
    "brackets as host": (b"GET /load HTTP/1.1\r\nHost: ][\r\n\r\n", b"400"),
    "a port that is none": (b"GET /load HTTP/1.1\r\nHost: localhost:abc\r\n\r\n", b""),
    "no host": (b"GET /load HTTP/1.1\r\n\r\n", b"400"),
    "an empty host": (b"GET /load HTTP/1.1\r\nHost:\r\n\r\n", b"401"),
    "bytes as host": (b"GET /load HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n", b"4"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", b"400"),
    "a head without end": (b"GET /load HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", b""),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", b"400"),
    "a length that is none": (POST + b"Content-Length: ten\r\n\r\n", b"400"),
    "a length of 30 digits": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", b"4"),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", b"400"),
    "chunks that are none": (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"4"),
    "a path of NULs": (b"GET /%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
    "a token of bytes": (b"GET /load HTTP/1.1\r\nHost: evil\r\nAuthorization: \xff\r\n\r\n", b"401"),
    "an upgrade": (b"GET /load HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", b""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_request_is_refused_and_harms_nobody(name, server, client, tokens):
    sent, status = BROKEN[name]
    answer = exchange(server, sent)
    assert not answer.startswith(b"HTTP/1.1 5")
    assert answer.startswith(b"HTTP/1.1 " + status) or not answer
    assert sampled(client) == tokens


@pytest.mark.parametrize(
    "half, status",
    [
        (b"", b""),
        (b"GET /load HT", b""),
        (b"GET /load HTTP/1.1\r\nHost: localhost\r\n", b""),
        (POST + b"Content-Length: 50\r\n\r\n", b"HTTP/1.1 408"),
        (POST + b'Content-Length: 50\r\n\r\n{"token_ids"', b"HTTP/1.1 408"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{", b"HTTP/1.1 408"),
    ],
)
def test_a_client_that_does_not_go_on_is_let_go(half, status, server, client, tokens):
    assert exchange(server, half).startswith(status), "the server has ended the connection"
    assert sampled(client) == tokens


def test_a_body_that_drips_is_ended_too(server):
    head = POST + b"Content-Length: 1000\r\n\r\n"
    assert exchange(server, head, *([b" "] * (4 * IDLE_S)), pause_s=0.4).startswith((b"HTTP/1.1 408", b""))


def test_a_client_that_leaves_ends_its_request(server, client, tokens):
    body = json.dumps({"token_ids": [3], "sampling_params": {"max_tokens": 120}}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: client.get("/load").json() == {"server_load": 0}, "the request to end")
    assert sampled(client) == tokens


def test_connections_beyond_the_limit_are_closed_and_those_within_it_served(server, client, tokens):
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=HUNG_S) for _ in range(200)]
    try:
        closed = threading.Semaphore(0)

        def look(connection):
            if not connection.recv(1):
                closed.release()

        threads = [threading.Thread(target=look, args=(one,), daemon=True) for one in idle]
        for thread in threads:
            thread.start()
        for _ in idle:
            assert closed.acquire(timeout=HUNG_S), "those beyond the limit at once, the others when they stay idle"
    finally:
        for one in idle:
            one.close()
    assert httpx.post(server.url + "/inference/v1/generate", json=GOOD, trust_env=False).status_code == 200


def whole_copy(tiny_folder):
    """The bytes of a file that holds all weights as version 7."""
    host = HostWeights()
    path = host.take(FullWeights(tensors=read_weights(tiny_folder)), 7)
    content = path.read_bytes()
    host.close()
    return content


def prefixed(layout: bytes, magic=b"oldhost\0", version=1):
    return struct.pack("<8sII", magic, version, len(layout)) + layout + b"\0" * 4096


LAYOUT = b'{"entries":[["model.norm.weight","float32",[32],0,32]],"aliases":{},"frozen":[]}'
DAMAGED = {
    "empty": lambda whole: b"",
    "one byte": lambda whole: b"o",
    "noise": lambda whole: bytes(range(256)) * 64,
    "cut in its layout": lambda whole: whole[:40],
    "cut in its weights": lambda whole: whole[: len(whole) // 2],
    "cut by a byte": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0" * 64,
    "another format": lambda whole: prefixed(LAYOUT, version=2),
    "another magic": lambda whole: prefixed(LAYOUT, magic=b"newhost\0"),
    "a layout that is no JSON": lambda whole: prefixed(b"{" * 3000),
    "a layout of lists": lambda whole: prefixed(b"[" * 3000 + b"]" * 3000),
    "a layout without entries": lambda whole: prefixed(b'{"entries":[],"aliases":{},"frozen":[]}'),
    "a layout of negative size": lambda whole: prefixed(LAYOUT.replace(b"[32],0,32", b"[-32],0,-32")),
    "a layout of 2^62 values": lambda whole: prefixed(
        LAYOUT.replace(b"[32],0,32", b"[4611686018427387904],0,4611686018427387904")
    ),
    "a layout of no dtype": lambda whole: prefixed(LAYOUT.replace(b"float32", b"nn")),
    "one weight only": lambda whole: prefixed(LAYOUT),
    "another version": lambda whole: whole,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_weights_that_are_refused_change_neither_label_nor_tokens(name, client, tokens, tiny_folder):
    path = shared_file(1)
    path.write_bytes(DAMAGED[name](whole_copy(tiny_folder)))
    before = label(client)
    try:
        client.post("/pause?mode=keep")
        client.post("/start_weight_update")
        check_refusal(client.post("/update_weights", json={"update_info": {"path": str(path), "version": 8}}))
        check_refusal(client.post("/finish_weight_update", json={"weight_version": "new"}))
        assert label(client) == before
        recovered(client)
        assert (label(client), sampled(client)) == (before, tokens)
    finally:
        path.unlink(missing_ok=True)


def test_a_good_update_after_refused_ones_gets_its_label_and_samples_with_its_weights(client, tokens, tiny_folder):
    host = HostWeights()
    generator = torch.Generator().manual_seed(0)
    changed = {n: w + torch.randn(w.shape, generator=generator) for n, w in read_weights(tiny_folder).items()}
    for weights, name in ((changed, "run/9"), (read_weights(tiny_folder), "default")):
        path = host.take(FullWeights(tensors=weights), 9)
        for route, body in (
            ("/pause?mode=keep", None),
            ("/start_weight_update", None),
            ("/update_weights", {"update_info": {"path": str(path), "version": 9}}),
            ("/finish_weight_update", {"weight_version": name}),
            ("/resume", None),
        ):
            assert client.post(route, json=body).status_code == 200
        assert label(client) == name
        assert (sampled(client) == tokens) is (name == "default")
        host.close()


def test_no_weights_at_all_travel_as_nothing_and_are_no_copy(tmp_path):
    path, lengths = share_bytes([])
    assert take_bytes(path, lengths) == ()
    path, lengths = share_bytes([memoryview(b""), memoryview(b"")])
    assert [bytes(part) for part in take_bytes(path, lengths)] == [b"", b""]
    assert not path.exists()
    with pytest.raises(LayoutError, match="at least one tensor"):
        HostCopy.create(tmp_path / "none", {}, 0)
