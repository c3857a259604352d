"""`oldlogits watch`: what a browser gets of run folders that grow, and what nobody gets."""

import http.client
import json
import threading

import pytest

from oldlogits.cli.main import run
from oldlogits.core.errors import ConfigError
from oldlogits.record.owner import is_owned, owned
from oldlogits.record.report.page import report_page
from oldlogits.record.watch.pages import list_page, run_line
from oldlogits.record.watch.server import WatchServer


@pytest.fixture
def served(fake_run):
    """A server of the folder that holds a run of four updates, and the run."""
    path = fake_run(4)
    with WatchServer(path.parent, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server, path
        server.shutdown()
        thread.join()


def get(server, path, **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_list_names_every_run_and_links_to_its_pages(served):
    server, path = served
    status, page = get(server, "/")
    assert status == 200
    assert f'href="/run/{path.name}"' in page
    assert run_line(path).state in page
    assert get(server, f"/run/{path.name}")[0] == get(server, f"/episodes/{path.name}")[0] == 200


def test_what_a_run_records_later_is_shown_without_a_restart(served, fake_run):
    server, path = served
    before = get(server, f"/run/{path.name}")[1]
    events = path / "events.jsonl"
    lines = events.read_text().splitlines(keepends=True)
    last = next(line for line in reversed(lines) if json.loads(line)["kind"] == "update")
    at = lines.index(last)
    events.write_text("".join([*lines[:at], *lines[at + 1 :]]))
    assert get(server, f"/run/{path.name}")[1] != before


@pytest.mark.parametrize(
    "path", ["/run/..", "/run/%2e%2e", "/run/../../etc/passwd", "/run/%2Fetc", "/tokens/x", "/run/nobody", "/a/b/c"]
)
def test_nothing_but_the_pages_of_run_folders_is_served(path, served):
    server, _ = served
    assert get(server, path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8642", "[::1]:1", ""])
def test_a_page_of_another_site_is_not_answered(host, served):
    server, _ = served
    assert get(server, "/", Host=host)[0] == 403


def test_it_listens_on_this_machine_only(served):
    assert served[0].server_address[0] == "127.0.0.1"


def test_a_run_that_cannot_be_read_is_told_and_the_others_are_shown(served):
    server, path = served
    bad = path.parent / "bad"
    bad.mkdir()
    (bad / "events.jsonl").write_text('{"seq": 0}\n{"seq": 1}\n')
    status, page = get(server, "/")
    assert status == 200
    assert "unreadable" in page
    assert path.name in page
    status, said = get(server, "/run/bad")
    assert (status, "cannot be read" in said) == (500, True)


def test_text_of_names_and_models_is_no_markup(served):
    server, path = served
    evil = path.parent / "<img src=x onerror=alert(1)>"
    path.rename(evil)
    page = get(server, "/")[1]
    assert "<img" not in page
    assert "&lt;img" in page


def test_the_page_of_a_run_that_goes_on_reads_itself_again_and_that_of_an_ended_one_does_not(fake_run):
    path = fake_run(2)
    assert "http-equiv" not in report_page(path)
    events = path / "events.jsonl"
    events.write_text("".join(line for line in events.read_text().splitlines(keepends=True) if '"run_ended"' not in line))
    assert not is_owned(path)
    assert run_line(path).state == "killed"
    assert "http-equiv" not in report_page(path)
    with owned(path):
        assert is_owned(path)
        assert run_line(path).state == "running"
        assert 'http-equiv="refresh" content="30"' in report_page(path)
        assert 'http-equiv="refresh" content="10"' in list_page(path.parent)


def test_a_taken_port_and_an_absent_folder_are_refused_in_words(served, tmp_path, capsys):
    server, path = served
    with pytest.raises(ConfigError, match="the port cannot be opened"):
        WatchServer(path.parent, server.server_address[1])
    assert run(["watch", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
