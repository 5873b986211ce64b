"""``bench load``: arrivals, what is counted from when, and servers that misbehave."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from PIL import Image

import bench.__main__
from bench import load, load_targets
from bench.arguments import without_folders
from bench.arrivals import (
    Clock,
    FifoWorker,
    Record,
    figures,
    lateness,
    percentile_of_all,
    poisson_arrivals,
    send_all,
)
from bench.load_targets import ServerTarget, prompt_of
from bench.reporting.files import ResultsFile
from bench.reporting.page import make_page
from bench.results import read_results
from tests.bench.fake_images_server import FakeImagesServer, painted, png, running
from turbo.engine import Engine

SMALL_PLAN = """
generation:
  stage1: {height: 64, width: 48, steps: 2}
  stage2: {height: 96, width: 80, steps: 2}
  stage3: {height: 128, width: 96, steps: 2}
"""


class FakeClock(Clock):
    """Time that passes only while somebody sleeps or works."""

    def restart(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def server() -> Iterator[FakeImagesServer]:
    with running() as made:
        yield made


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(SMALL_PLAN)
    return path


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(
    server: FakeImagesServer, output: Path, *more: str, rate: float = 40, duration: float = 0.5
) -> tuple[int, dict[str, Any]]:
    """Exit code and results of a run against a server."""
    asked = ["--rate", str(rate), "--duration", str(duration), "--url", server.url]
    code = load.main([*asked, "--size", "16x32", "-o", str(output), *more])
    return code, read_results(output, ["load"])


# Arrivals.


def test_the_same_seed_gives_the_same_arrivals():
    assert poisson_arrivals(3, 100, seed=5) == poisson_arrivals(3, 100, seed=5)
    assert poisson_arrivals(3, 100, seed=5) != poisson_arrivals(3, 100, seed=6)


def test_gaps_between_arrivals_are_exponential():
    times = poisson_arrivals(4, 1000, seed=1)
    gaps = [after - before for before, after in zip((0.0, *times), times)]
    assert scipy.stats.kstest(gaps, "expon", args=(0, 1 / 4)).pvalue > 0.05
    assert statistics.mean(gaps) == pytest.approx(1 / 4, rel=0.05)


def test_counts_in_equal_windows_are_those_of_a_poisson_distribution():
    times = poisson_arrivals(2, 2000, seed=2)
    in_second = Counter(map(int, times))
    counts = Counter(in_second[second] for second in range(2000))
    tail = 6
    seen = [counts[one] for one in range(tail)] + [2000 - sum(counts[one] for one in range(tail))]
    expected = [2000 * scipy.stats.poisson.pmf(one, 2) for one in range(tail)]
    expected.append(2000 - sum(expected))
    assert scipy.stats.chisquare(seen, expected).pvalue > 0.05


def test_arrivals_are_a_poisson_process_only_with_independent_gaps():
    times = poisson_arrivals(4, 1000, seed=3)
    gaps = [after - before for before, after in pairwise(times)]
    assert abs(scipy.stats.pearsonr(gaps, gaps[1:] + gaps[:1]).statistic) < 0.05
    assert all(0 <= moment < 1000 for moment in times)


# Sending, with a clock that is told what time it is.


class Finishing:
    """Answers at once; sending takes `seconds`."""

    def __init__(self, clock: FakeClock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def submit(self, record: Record) -> None:
        self.clock.sleep(self.seconds)
        record.done_s = self.clock.now()


def test_requests_are_sent_at_their_times(clock: FakeClock):
    records = [Record(0, 0.5), Record(1, 2.0), Record(2, 2.25)]
    send_all(records, Finishing(clock, 0.0), clock, timeout_s=10)
    assert [record.sent_s for record in records] == [0.5, 2.0, 2.25]
    assert lateness(records) == {"share": 0.0, "worst_ms": 0.0}


def test_a_stalled_sender_hides_no_latency(clock: FakeClock):
    # Each sending takes 1 s, though one is due each half second: the third goes out 1 s late.
    records = [Record(0, 0.0), Record(1, 0.5), Record(2, 1.0)]
    send_all(records, Finishing(clock, 1.0), clock, timeout_s=10)
    found = figures(records, 3)
    assert found["late"] == {"share": pytest.approx(2 / 3), "worst_ms": 1000.0}
    assert found["latency"]["all_ms"] == [1000.0, 1500.0, 2000.0]


def test_the_table_warns_of_a_late_sender(clock: FakeClock):
    records = [Record(0, 0.0), Record(1, 0.5), Record(2, 1.0)]
    send_all(records, Finishing(clock, 1.0), clock, timeout_s=10)
    lines = "\n".join(load.table(figures(records, 3)))
    assert "the sender itself was late: 66.7% of the requests" in lines
    assert "the worst 1000.0 ms" in lines


class Keeping:
    """Takes requests and never answers."""

    def __init__(self) -> None:
        self.kept: list[Record] = []

    def submit(self, record: Record) -> None:
        self.kept.append(record)


def test_requests_are_sent_though_none_is_answered(clock: FakeClock):
    records, target = [Record(0, 0.0), Record(1, 1.0), Record(2, 2.0)], Keeping()
    send_all(records, target, clock, timeout_s=5)
    assert [record.sent_s for record in target.kept] == [0.0, 1.0, 2.0]
    assert {record.error for record in records} == {"nothing within 5 s"}
    assert clock.now() == pytest.approx(8, abs=0.1)


def served(clock: FakeClock, arrivals: list[float], seconds: float, timeout_s: float) -> list:
    """Records after a queue that is served, `seconds` each, once all have come."""

    def serve(record: Record) -> None:
        clock.sleep(seconds)
        record.done_s = clock.now()
        if record is records[-1]:
            worker.stop()

    worker = FifoWorker(serve, clock, timeout_s)
    records = [Record(number, moment) for number, moment in enumerate(arrivals)]
    for record in records:
        worker.submit(record)
    clock.sleep(arrivals[-1])
    worker.work()
    return records


def test_waiting_counts_as_queue_time_and_work_as_service(clock: FakeClock):
    found = figures(served(clock, [0.0, 1.0, 2.0], seconds=3, timeout_s=100), 3)
    assert found["queue"]["all_ms"] == [2000, 4000, 6000]  # begun at 2, 5, 8
    assert found["service"]["all_ms"] == [3000, 3000, 3000]
    assert found["latency"]["all_ms"] == [5000, 7000, 9000]
    assert found["throughput_per_s"] == pytest.approx(3 / 11)
    assert found["requests"][1] == [1.0, 4000, 7000, True]


def test_who_waited_too_long_is_not_served(clock: FakeClock):
    records = served(clock, [0.0, 0.0, 0.0, 4.0], seconds=2, timeout_s=5)
    assert [record.is_good for record in records] == [True, False, False, True]
    assert figures(records, 3)["errors"] == {"waited longer than 5 s": 2}


def test_an_error_of_the_engine_is_counted_and_the_next_is_served(clock: FakeClock):
    def serve(record: Record) -> None:
        if record.number == 0:
            raise RuntimeError("out of\nmemory")
        record.done_s = clock.now()
        worker.stop()

    worker = FifoWorker(serve, clock, 10)
    records = [Record(0, 0.0), Record(1, 0.0)]
    for record in records:
        worker.submit(record)
    worker.work()
    assert figures(records, 3)["errors"] == {"out of memory": 1}
    assert figures(records, 3)["completed"] == 1


def test_unanswered_runs_have_no_numbers():
    found = figures([Record(0, 0.0, sent_s=0.0, error="status 500")], 3)
    assert found["latency"] == {"withheld": "no request was answered"}
    assert found["throughput_per_s"] == 0


def test_a_request_without_an_answer_is_the_slowest_and_counts_against_throughput():
    records = [
        Record(number, float(number), done_s=number + 0.5) for number in range(9)
    ] + [Record(9, 9.0, error="status 500")]  # fmt: skip
    found = figures(records, 60)
    assert found["throughput_per_s"] == 9 / 60
    lines = [line for line in load.table(found) if line.startswith("latency")]
    assert lines[0].split() == ["latency", "500.0", "500.0", "no", "answer", "no", "answer"]
    assert percentile_of_all([1.0, 3.0], 0, 50) == 2.0
    assert percentile_of_all([1.0, 3.0], 1, 50) == 3.0
    assert percentile_of_all([1.0, 3.0], 1, 51) is None
    assert percentile_of_all([], 3, 50) is None


def test_endless_different_messages_are_counted_together():
    records = [Record(one, 0.0, sent_s=0.0, error=f"trace {one}") for one in range(50)]
    errors = figures(records, 3)["errors"]
    assert len(errors) == 21
    assert errors["others"] == 30


# A server.


def test_a_good_server_gets_all_requests_and_gives_numbers(server, tmp_path, capsys):
    code, data = run(server, tmp_path / "load.json")
    assert code == 0
    assert data["partial"] is False
    assert data["completed"] == len(data["requests"]) == len(server.bodies) - 1  # one warm-up
    assert data["latency"]["runs"] == data["completed"]
    assert data["queue"] == data["service"] == {"withheld": "the server does not tell"}
    assert data["check"] == {"size": [16, 32], "distinct": data["completed"] + 1}
    assert "p99" in capsys.readouterr().out


def test_requests_are_asked_for_as_the_images_api_has_it(server, tmp_path):
    run(server, tmp_path / "load.json", "--seed", "7", "--model", "z-image")
    wanted = {
        "prompt": prompt_of(0),
        "n": 1,
        "size": "16x32",
        "seed": 7,
        "response_format": "b64_json",
        "model": "z-image",
    }
    assert wanted in server.bodies  # threads send them, so a later one may come first
    assert len({body["prompt"] for body in server.bodies}) == len(server.bodies)


def test_service_time_is_what_the_server_tells(server, tmp_path):
    server.answer = lambda body, number: painted(body, inference_time_s=0.25)
    _, data = run(server, tmp_path / "load.json")
    assert set(data["service"]["all_ms"]) == {250}
    assert "withheld" in data["queue"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, b'{"error": {"message": "out of memory"}}'), "status 500: out of memory"),
        ((422, b'{"error": "bad size"}'), "status 422: bad size"),
        ((503, b"busy"), "status 503"),
        ((404, b"<html>"), "status 404"),
        ((200, b"<html>"), "the answer is no JSON object"),
        ((200, b'{"data": []}'), "the answer has no data[0].b64_json"),
        ((200, b'{"data": [{"b64_json": "?"}]}'), "the answer's picture cannot be decoded"),
        ((200, b'{"data": [{"b64_json": "aGVsbG8="}]}'), "the answer's picture cannot be decoded"),
        (painted({"size": "8x8", "seed": 1}), "a picture of 8x8 came, asked for was 16x32"),
        (None, "remote end closed connection without response"),
    ],
)
def test_an_error_is_counted_by_its_message_and_the_run_goes_on(
    server, tmp_path, answer, message, capsys
):
    server.answer = lambda body, number: answer if number == 3 else painted(body)
    code, data = run(server, tmp_path / "load.json")
    assert code == 1  # it is more than a hundredth of the requests
    assert {text.lower(): count for text, count in data["errors"].items()} == {message.lower(): 1}
    assert data["completed"] == len(data["requests"]) - 1
    assert f"(1 of {len(data['requests'])} requests)" in capsys.readouterr().out


def test_a_truncated_picture_is_an_error(server, tmp_path):
    half = base64.b64encode(png(1, 16, 32)[:60]).decode()
    broken = 200, json.dumps({"data": [{"b64_json": half}]}).encode()
    server.answer = lambda body, number: broken if number == 2 else painted(body)
    _, data = run(server, tmp_path / "load.json")
    assert data["errors"] == {"the answer's picture cannot be decoded": 1}


def test_a_hanging_server_is_given_up_and_the_other_requests_are_answered(server):
    def answer(body, number):
        if body["seed"] == 2:
            server.released.wait()
        return painted(body)

    class Leaping(Clock):
        """Ahead by an hour once all requests but the one are over."""

        def now(self) -> float:
            is_time = all(record.is_over for record in records if record.number != 2)
            return super().now() + 3600 * is_time

    server.answer = answer
    clock, records = Leaping(), [Record(number, 0.0) for number in range(6)]
    target = ServerTarget(server.url, (16, 32), clock, seed=0, timeout_s=600)
    send_all(records, target, clock, timeout_s=600)
    assert [record.number for record in records if record.is_good] == [0, 1, 3, 4, 5]
    assert records[2].error == "nothing within 600 s"


def test_an_answer_that_does_not_come_is_not_waited_for(server):
    server.answer = lambda body, number: server.released.wait() and None
    record = Record(0, 0.0)
    ServerTarget(server.url, (16, 32), Clock(), seed=0, timeout_s=0.05).submit(record)
    while not record.is_over:
        time.sleep(0.01)
    assert record.error == "nothing within 0.05 s"


def test_a_server_that_dies_leaves_the_numbers_from_before(tmp_path):
    with running() as server:

        def answer(body, number):
            if number == 5:
                server._server.socket.close()  # as the port of a killed process
            return painted(body)

        server.answer = answer
        code, data = run(server, tmp_path / "load.json", rate=20, duration=1)
        assert code == 1
    assert 0 < data["completed"] < len(data["requests"])
    assert sum(data["errors"].values()) == len(data["requests"]) - data["completed"]


def test_a_run_says_on_which_machine_the_server_is(server, tmp_path, monkeypatch, capsys):
    _, here = run(server, tmp_path / "here.json")
    monkeypatch.setattr(load_targets, "is_here", lambda url: False)
    _, elsewhere = run(server, tmp_path / "elsewhere.json")
    machines = [data["configuration"]["server_machine"] for data in (here, elsewhere)]
    assert machines == ["this one", "another one"]
    assert capsys.readouterr().out.count("the server is on another machine") == 1
    page = make_page([ResultsFile.read(tmp_path / "elsewhere.json")])
    assert "the server is on another machine than the one named here" in page


def test_a_run_without_an_answer_fails(server, tmp_path, capsys):
    server.answer = lambda body, number: (500, b"{}")
    code, data = run(server, tmp_path / "load.json")
    assert code == 1
    assert data["latency"] == {"withheld": "no request was answered"}
    assert "warm-up: status 500" in capsys.readouterr().out


def test_a_server_that_paints_one_picture_for_all_gets_no_numbers(server, tmp_path, capsys):
    server.answer = lambda body, number: painted({**body, "seed": 1})
    code, data = run(server, tmp_path / "load.json")
    assert code == 1
    assert "only 1 different pictures" in data["latency"]["withheld"]
    assert "requests" not in data
    assert "throughput_per_s" not in data
    assert "only 1 different pictures" in capsys.readouterr().err


def test_a_server_that_is_away_is_bad_input_in_one_line(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = load.main(["--rate", "1", "--duration", "9", "--url", f"http://127.0.0.1:{port}"])
    assert code == 2
    said = capsys.readouterr().err
    assert "connection refused" in said
    assert said.count("\n") == 1


def test_ctrl_c_keeps_what_was_measured(server, tmp_path, monkeypatch, capsys):
    def answer(body, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return painted(body)

    server.answer = answer
    output = tmp_path / "load.json"
    asked = ["--rate", "20", "--duration", "60", "--url", server.url, "--size", "16x32"]
    monkeypatch.setattr(sys, "argv", ["bench", "load", *asked, "-o", str(output)])
    assert bench.__main__.main() == 130
    data = read_results(output, ["load"])
    assert data["partial"] is True
    assert data["error"]["type"] == "KeyboardInterrupt"
    assert data["completed"] >= 1
    assert data["latency"]["runs"] == data["completed"]
    assert data["check"] == {"withheld": "the run ended before its last check"}
    assert "stopped; if a results file was asked for" in capsys.readouterr().err


# The engine.


def run_engine(plan: Path, output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    asked = ["--rate", "4", "--duration", "1", "--device", "cpu", "--plan", str(plan)]
    code = load.main([*asked, "-o", str(output), *more])
    return code, read_results(output, ["load"])


def test_the_engine_serves_a_queue_and_repeats_its_first_picture(plan, tmp_path, capsys):
    code, data = run_engine(plan, tmp_path / "load.json")
    assert code == 0
    count = len(poisson_arrivals(4, 1, seed=0))
    assert data["completed"] == data["queue"]["runs"] == data["service"]["runs"] == count
    for _, queue_ms, latency_ms, ok in data["requests"]:
        assert ok
        assert 0 <= queue_ms <= latency_ms
    assert data["check"] == {"distinct": count, "first picture made again": {"identical": True}}
    assert data["warm_up"]["check"] == {"warm-up picture made twice": {"identical": True}}
    assert data["configuration"]["model"]["parameters"]["network"] > 1_000_000
    assert data["configuration"]["plan"]["generation"]["stage3"]["width"] == 96
    assert str(tmp_path) not in json.dumps(data)
    assert "warming up: 1 requests, not counted" in capsys.readouterr().out


def test_an_engine_that_does_not_repeat_itself_gets_no_numbers(plan, tmp_path, monkeypatch, capsys):
    honest = Engine.generate
    made: list[str] = []

    def generate(self, prompt, **options):
        result = honest(self, prompt, **options)
        made.append(prompt)
        if made.count(prompt) == 2 and prompt == prompt_of(0):
            result.images[0] = Image.new("RGB", result.image.size)
        return result

    monkeypatch.setattr(Engine, "generate", generate)
    code, data = run_engine(plan, tmp_path / "load.json")
    assert code == 1
    assert "the same request gave another picture" in data["latency"]["withheld"]
    assert "requests" not in data
    assert data["partial"] is True


def test_ctrl_c_ends_the_engine_between_two_steps(plan, tmp_path, monkeypatch):
    honest = Engine.generate
    made: list[str] = []

    def generate(self, prompt, **options):
        made.append(prompt)
        if prompt == prompt_of(1):
            os.kill(os.getpid(), signal.SIGINT)
        return honest(self, prompt, **options)

    monkeypatch.setattr(Engine, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        run_engine(plan, tmp_path / "load.json", "--duration", "60")
    data = read_results(tmp_path / "load.json", ["load"])
    assert data["partial"] is True
    assert data["completed"] == 1
    assert data["unfinished"] == len(data["requests"]) - 1
    assert made[-1] in (prompt_of(1), prompt_of(2))


# Bad input.


@pytest.mark.parametrize("option", ["--rate", "--duration", "--timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x", ""])
def test_no_rate_and_no_duration_is_refused_in_one_line(option, value, capsys):
    given = {"--rate": "1", "--duration": "1", option: value}
    with pytest.raises(SystemExit) as caught:
        load.main([f"{name}={text}" for name, text in given.items()])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"{option}: must be a number above 0, got {value!r}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1e-3", "--duration", "1"], "no request arrives within 1 s"),
        (["--rate", "1e9", "--duration", "1e9"], "more than 100000 requests"),
        (["--rate", "1", "--duration", "9", "--url", "ftp://x"], "no server address"),
        (["--rate", "1", "--duration", "9", "--url", "http://x", "--size", "x"], "--size must be"),
        (["--rate", "1", "--duration", "9", "--plan", "nowhere.yaml"], "nowhere.yaml"),
        (["--rate", "1", "--duration", "9", "--model", "nowhere"], "nowhere"),
        (["--rate", "1", "--duration", "9", "--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(arguments, message, capsys):
    assert load.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "http://x", "--device", "cpu"],
        ["--url", "http://x", "--dtype", "float32"],
        ["--size", "16x16"],
        ["--seed", "-1"],
        ["--warm-up", "0"],
    ],
)
def test_options_that_do_not_fit_are_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        load.main(["--rate", "1", "--duration", "1", *arguments])
    assert caught.value.code == 2


def test_folders_and_names_of_servers_are_left_out_of_the_results():
    given = ["--model", "/home/me/models", "--plan=/home/me/plan.yaml", "--url", "http://host/x"]
    assert without_folders(given) == ["--model", "models", "--plan=plan.yaml", "--url", "URL"]
    assert without_folders(["--rate", "1", "-o", "l.json"]) == ["--rate", "1", "-o", "l.json"]
    assert without_folders(["-o/home/me/l.json", "--only", "a"]) == ["-ol.json", "--only", "a"]


def test_prompts_are_kept_whatever_stands_in_them():
    prompt = "a/b testing, 1/2 cat http://host/x"
    for given in (["--prompt", prompt], [f"--prompt={prompt}"], ["--negative", prompt]):
        assert without_folders(["--plan", "/tmp/plan", *given]) == ["--plan", "plan", *given]
