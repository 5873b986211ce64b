from __future__ import annotations

import json
import logging
import struct
import sys
from collections.abc import Iterator

import pytest

from tests.turbo.fake_comfyui import (
    FakeComfyUI,
    fake_comfyui,
    play_end,
    play_nothing,
    play_steps,
    play_whole,
    png,
)
from turbo import comfyui_client, comfyui_http, comfyui_socket
from turbo.comfyui_client import ComfyUIClient
from turbo.comfyui_http import is_loopback
from turbo.comfyui_workflow import FLOWMATCH_NODE, workflow_from_plan
from turbo.errors import BackendError, BadInputError
from turbo.plan import DEFAULT_PLAN

WORKFLOW = workflow_from_plan(DEFAULT_PLAN, prompt="a lighthouse")


@pytest.fixture
def fake(monkeypatch) -> Iterator[FakeComfyUI]:
    monkeypatch.setattr(comfyui_socket, "BACK_OFF", 0.01)
    with fake_comfyui() as server:
        yield server


def client_of(fake: FakeComfyUI, **options) -> ComfyUIClient:
    options = {"timeout": 5.0, "poll_interval": 0.02, "attempts": 3} | options
    return ComfyUIClient(fake.url, **options)


def error_of(fake: FakeComfyUI, **options) -> str:
    with pytest.raises(BackendError) as caught:
        client_of(fake, **options).run(WORKFLOW)
    message = str(caught.value)
    assert "\n" not in message
    assert fake.url in message
    return message


# ---------------------------------------------------------------- a run


def test_a_run_reports_every_step_and_brings_the_picture(fake):
    steps = []
    pictures = client_of(fake).run(WORKFLOW, lambda *step: steps.append(step))
    assert pictures == {"307": [fake.picture]}
    assert steps == [("316", 1, 3), ("316", 2, 3), ("316", 3, 3), ("325", 1, 2), ("325", 2, 2)]


def test_a_run_tells_its_own_events_with_the_moment_at_which_each_came(fake):
    told = []
    client_of(fake).run(WORKFLOW, on_event=lambda event, moment: told.append((event, moment)))
    kinds = [event["type"] for event, _ in told]
    assert kinds[:2] == ["execution_start", "execution_cached"]
    assert kinds[-1] == "execution_success"
    assert kinds.count("progress") == 5  # without the one of another workflow
    moments = [moment for _, moment in told]
    assert moments == sorted(moments)


def test_the_workflow_is_queued_for_the_client_that_listens(fake):
    client_of(fake).run(WORKFLOW)
    [(path, body)] = fake.posted
    assert (path, body["prompt"]) == ("/prompt", WORKFLOW)
    assert fake.clients == [f"/ws?clientId={body['client_id']}"]


def test_a_dropped_socket_is_connected_again_and_progress_goes_on(fake):
    def play(fake, prompt_id):
        play_steps(fake, prompt_id, "316", 1)
        fake.drop_sockets()
        assert fake.wait_for_socket()
        play_steps(fake, prompt_id, "325", 2)
        play_end(fake, prompt_id)

    fake.play = play
    steps = []
    client_of(fake).run(WORKFLOW, lambda *step: steps.append(step))
    assert steps[-1] == ("325", 2, 2)
    assert len(fake.clients) == 2
    assert len(set(fake.clients)) == 1


def test_a_closing_frame_counts_as_a_drop(fake):
    def play(fake, prompt_id):
        fake.send_frame(8, struct.pack(">H", 1001))
        with fake.connected:
            fake.sockets.clear()
        assert fake.wait_for_socket()
        play_end(fake, prompt_id)

    fake.play = play
    assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}


def test_a_socket_that_never_comes_back_costs_only_the_progress(fake, caplog):
    def play(fake, prompt_id):
        fake.websockets_allowed = 0
        fake.drop_sockets()
        while not any("HTTP only" in line for line in caplog.messages):
            fake.stopped.wait(0.01)
        fake.finish(prompt_id, {"307": {"images": [{"filename": "a.png"}]}})

    caplog.set_level(logging.INFO)
    fake.play = play
    assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}


def test_a_socket_that_is_silent_is_no_obstacle(fake):
    def play(fake, prompt_id):
        with fake.connected:
            fake.sockets.clear()  # as a server that forgot this client
        play_end(fake, prompt_id)

    fake.play = play
    assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}


def test_without_the_websocket_library_the_server_is_asked_and_this_is_said_once(
    fake, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "websocket", None)
    monkeypatch.setattr(comfyui_socket, "_told_that_library_is_missing", False)
    for _ in range(2):
        assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}
    assert [m for m in caplog.messages if "websocket-client" in m] == [
        "websocket-client is not installed, so ComfyUI is followed without steps; "
        "pip install 'turbo[comfyui]' adds it"
    ]
    assert fake.clients == []


def test_a_message_without_end_is_cut_off(fake, monkeypatch, caplog):
    def play(fake, prompt_id):
        fake.send_frame(1, b" " * 5000)
        assert fake.wait_for_socket()
        play_end(fake, prompt_id)

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(comfyui_socket, "MESSAGE_LIMIT", 4000)
    fake.play = play
    assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}
    assert any("longer than 4000 bytes" in line for line in caplog.messages)


def test_a_hiccup_of_the_server_is_survived(fake):
    hiccups = [(503, b"busy"), (502, b"")]

    def history():
        prompt_id = next(iter(fake.history), None)
        if hiccups:
            return hiccups.pop()
        return 200, json.dumps({prompt_id: fake.history.get(prompt_id)}).encode()

    fake.overrides["/history"] = history
    assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}
    assert not hiccups


def test_nodes_without_pictures_are_left_out(fake):
    def play(fake, prompt_id):
        fake.finish(prompt_id, {"9": {"text": ["hi"]}, "307": {"images": [{"filename": "a.png"}]}})

    fake.play = play
    assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}


def test_the_servers_own_id_of_the_workflow_is_used(fake):
    fake.finish("its own", {"307": {"images": [{"filename": "a.png"}]}})
    fake.overrides["/prompt"] = lambda: (200, b'{"prompt_id": "its own"}')
    fake.overrides["/history/its%20own"] = lambda: (200, json.dumps(fake.history).encode())
    assert client_of(fake).run(WORKFLOW) == {"307": [fake.picture]}


# ---------------------------------------------------------------- failures on the server


def test_a_failing_node_is_named_with_its_error(fake):
    def play(fake, prompt_id):
        error = {"prompt_id": prompt_id, "node_id": "325", "node_type": "SamplerCustom"}
        fake.send("execution_error", **error, exception_message="out of memory\nat 3\n")
        fake.fail(prompt_id, "execution_error")

    fake.play = play
    assert error_of(fake).endswith("failed: node 325 (SamplerCustom): out of memory at 3")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("execution_error", "failed: node 3 (VAELoader): gone"),
        ("execution_interrupted", "interrupted on the server, in node 3 (VAELoader)"),
        ("something_else", "its status is error"),
    ],
)
def test_a_failure_is_also_found_without_the_socket(fake, kind, said):
    def play(fake, prompt_id):
        fake.fail(prompt_id, kind, node_id="3", node_type="VAELoader", exception_message="gone")

    fake.websockets_allowed = 0
    fake.play = play
    assert error_of(fake).endswith(said)


def test_a_refused_workflow_names_the_node_and_the_input(fake):
    details = {"message": "Value not in list", "details": "vae_name: 'ae' not in ['b']"}
    fake.refusal = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"3": {"errors": [details], "class_type": "VAELoader"}},
    }
    assert error_of(fake).endswith(
        "refuses the workflow: node 3 (VAELoader): Value not in list: vae_name: 'ae' not in ['b']"
    )


def test_a_node_that_the_server_lacks_is_named_with_its_pack(fake):
    message = f"Cannot execute because node {FLOWMATCH_NODE} does not exist."
    fake.refusal = {"error": {"message": message, "details": "Node ID '#339'"}, "node_errors": {}}
    assert "; install ComfyUI-EulerDiscreteScheduler" in error_of(fake)


def test_a_workflow_that_is_taken_in_part_is_cancelled(fake):
    fake.refusal = {
        "prompt_id": "P",
        "node_errors": {"3": {"errors": [{"message": "bad"}], "class_type": "VAELoader"}},
    }
    assert "node 3 (VAELoader): bad" in error_of(fake)
    assert ("/queue", {"delete": ["P"]}) in fake.posted


def test_a_workflow_that_vanished_is_an_error(fake):
    def play(fake, prompt_id):
        fake.running = None

    fake.play = play
    assert "no longer knows the workflow" in error_of(fake)


# ---------------------------------------------------------------- servers that are away


def test_no_server_is_one_line_that_says_what_to_do(fake):
    fake.close()
    message = error_of(fake)
    assert message.startswith("no answer from ComfyUI at http://127.0.0.1:")
    assert message.endswith("(connection refused); start it, or check the address and port")


def test_a_server_that_dies_during_the_run_is_told_from_one_that_never_was(fake):
    fake.play = lambda fake, prompt_id: fake.die()
    assert "during the run (connection refused)" in error_of(fake)


def test_a_server_that_hangs_is_given_up(fake):
    fake.play = lambda fake, prompt_id: fake.hang.set()
    assert "(nothing within 0.2 s)" in error_of(fake, timeout=0.2, attempts=2)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"<html>hello</html>"), "to /prompt: it is not JSON"),
        ((200, b"[1]"), "to /prompt: it is no JSON object"),
        ((200, b"{}"), "to /prompt: it has no prompt_id"),
        ((404, b""), "to /prompt: status 404"),
        ((301, b""), "to /prompt: status 301"),
        ((500, b"oops"), "to /prompt: status 500"),
        ((400, b'{"error": "bad"}'), "refuses the workflow: bad"),
        ((400, b"{}"), "refuses the workflow: no reason given"),
        ((200, b"[" * 100_000), "to /prompt: it is not JSON"),
    ],
)
def test_another_kind_of_server_is_recognised(fake, answer, said):
    fake.overrides["/prompt"] = lambda: answer
    assert said in error_of(fake)


@pytest.mark.parametrize(
    "entry",
    [
        {"outputs": [], "status": {"status_str": "success"}},
        {"outputs": {"307": {"images": ["x"]}}, "status": {"status_str": "success"}},
        {"outputs": {"307": {"images": [{"filename": 3}]}}},
        {"outputs": {"307": {"images": [{"filename": "a.png"}] * 300}}},
        ["nonsense"],
    ],
)
def test_a_history_that_makes_no_sense_is_refused(fake, entry):
    def play(fake, prompt_id):
        fake.history[prompt_id] = entry

    fake.play = play
    assert "check that this is the address of a ComfyUI server" in error_of(fake)


def test_an_answer_without_end_is_cut_off(fake, monkeypatch):
    monkeypatch.setattr(
        comfyui_http.ServerHttp.exchange,
        "__kwdefaults__",
        {
            "limit": 1000,
            "timeout": None,
        },
    )
    fake.overrides["/prompt"] = lambda: (200, b" " * 2000)
    assert "the answer is longer than 1000 bytes" in error_of(fake)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", png()[:-20], png()[:40], b"\x89PNG\r\n\x1a\n" + bytes(100)],
    ids=["empty", "gif", "cut", "head", "zeros"],
)
def test_what_is_no_whole_png_is_refused(fake, data):
    fake.picture = data
    assert "no whole PNG picture" in error_of(fake)


def test_a_picture_that_is_gone_is_named(fake):
    fake.overrides["/view"] = lambda: (404, b"")
    assert "stage3_00001_.png but has status 404" in error_of(fake)


def test_a_picture_that_does_not_come_at_once_is_asked_for_again(fake):
    answers = [(200, png()), (502, b"")]
    fake.overrides["/view"] = lambda: answers.pop()
    assert client_of(fake).run(WORKFLOW) == {"307": [png()]}


# ---------------------------------------------------------------- giving up


def test_a_run_that_takes_too_long_is_stopped_on_the_server(fake):
    fake.play = play_nothing
    assert "did not finish within 0.2 s" in error_of(fake, run_timeout=0.2)
    prompt_id = fake.posted[0][1]["prompt_id"]
    assert fake.posted[1:] == [
        ("/queue", {"delete": [prompt_id]}),
        ("/interrupt", {"prompt_id": prompt_id}),
    ]


def test_a_waiting_workflow_is_taken_out_of_the_queue_and_nobody_elses_is_stopped(fake):
    def play(fake, prompt_id):
        fake.running, fake.pending = "someone else's", [prompt_id]

    fake.play = play
    error_of(fake, run_timeout=0.2)
    assert [path for path, _ in fake.posted] == ["/prompt", "/queue"]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, ZeroDivisionError])
def test_leaving_the_run_stops_it_on_the_server(fake, reason):
    def play(fake, prompt_id):
        play_steps(fake, prompt_id, "316", 1)

    def leave(*_):
        raise reason

    fake.play = play
    with pytest.raises(reason):
        client_of(fake).run(WORKFLOW, leave)
    assert [path for path, _ in fake.posted] == ["/prompt", "/queue", "/interrupt"]


def test_a_server_that_cannot_be_told_to_stop_does_not_hide_the_reason(fake, monkeypatch, caplog):
    monkeypatch.setattr(comfyui_client, "CANCEL_TIMEOUT", 0.1)

    def leave(*_):
        fake.hang.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_of(fake).run(WORKFLOW, leave)
    assert any("could not be told to stop" in line for line in caplog.messages)


# ---------------------------------------------------------------- addresses and options


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8188",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://host:port",
        "http://host:0",
        "http://[::1",
        "http://me:secret@host",
        "http://host/?a=b",
        "http://ho st",
        "http://host\n",
        "http://häst",
    ],
)
def test_only_plain_http_addresses_are_taken(url):
    with pytest.raises(BadInputError, match="is no server address"):
        ComfyUIClient(url)


def test_an_address_keeps_its_path_and_loses_its_last_slash():
    assert ComfyUIClient("https://example.org/comfy/").url == "https://example.org/comfy"


@pytest.mark.parametrize(
    "option", [{"timeout": 0}, {"poll_interval": -1}, {"run_timeout": 0}, {"attempts": 0}]
)
def test_numbers_that_cannot_work_are_refused(option):
    with pytest.raises(BadInputError, match=next(iter(option))):
        ComfyUIClient(**option)


def test_a_proxy_is_never_used_for_a_server_on_this_machine(fake, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    steps = []
    client_of(fake).run(WORKFLOW, lambda *step: steps.append(step))
    assert steps
    assert [is_loopback(u) for u in ("http://localhost", "http://[::1]:1", "http://10.0.0.1")] == [
        True,
        True,
        False,
    ]


def test_the_server_tells_about_itself(fake):
    assert client_of(fake).system_stats() == {"system": {"comfyui_version": "0.8.0"}}
    fake.close()
    with pytest.raises(BackendError, match="no answer from ComfyUI"):
        client_of(fake).system_stats()


def test_whole_transcript_over_again_on_one_client(fake):
    client = client_of(fake)
    fake.play = play_whole
    assert client.run(WORKFLOW) == client.run(WORKFLOW)
