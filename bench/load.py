"""``python -m bench load``: requests at random times, as users send them, and how long each waits.

Arrivals are a Poisson process drawn beforehand from a seed, and every request is sent at its time
whether or not earlier ones are done. Latency counts from that time; a request without an answer
counts as the slowest of all, and more than 1 % of them end the command with code 1. Without
``--url`` an engine in this process serves a queue, one request at a time; with it, a server that
has OpenAI's images API.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.arguments import Parser, positive, whole, without_folders
from bench.arrivals import (
    LATE_MS,
    Clock,
    Record,
    figures,
    percentile_of_all,
    poisson_arrivals,
    send_all,
)
from bench.endings import FAILED, OK, exit_code, require_writable
from bench.load_targets import (
    CheckError,
    EngineTarget,
    ServerTarget,
    parse_size,
)
from bench.machine import describe_machine
from bench.results import FORMAT, Results, describe_error
from bench.servers import ANOTHER_MACHINE
from turbo.engine import Engine, pick_device
from turbo.errors import BadInputError
from turbo.plan import DEFAULT_PLAN, Plan, load_plan

MOST_REQUESTS = 100_000
MOST_ERRORS = 0.01
"""Share of the requests without a right answer beyond which the command fails."""
PERCENTS = (50, 80, 95, 99)
_IN_PROCESS_ONLY = ("device", "dtype")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if 99 % of the requests were answered and all checks passed."""
    given = list(sys.argv[2:] if arguments is None else arguments)
    options = _parse(given)

    def work() -> int:
        require_writable(options.output)
        records = _draw(options)
        clock = Clock()
        plan = DEFAULT_PLAN if options.plan is None else load_plan(options.plan)
        results = _open_results(options, given, _device(options, plan))
        target = _make_target(options, plan, clock)
        return _run(options, results, target, clock, records)

    return exit_code(work)


def _run(
    options: argparse.Namespace,
    results: Results,
    target: EngineTarget | ServerTarget,
    clock: Clock,
    records: Sequence[Record],
) -> int:
    data = results.data
    try:
        data["configuration"] |= {"target": target.name, **target.describe()}
        print(f"warming up: {options.warm_up} requests, not counted", flush=True)
        data["warm_up"] = target.warm_up(options.warm_up)
        for error in data["warm_up"].get("errors", []):
            print(f"warm-up: {error}", flush=True)
        print(
            f"sending {len(records)} requests over {options.duration:g} s, "
            f"{options.rate:g} per s on average, seed {options.seed}",
            flush=True,
        )
        try:
            send_all(records, target, clock, options.timeout)
        finally:
            data |= figures([*records], options.duration)
        data["check"] = target.check()
    except CheckError as error:
        _withhold(data, str(error))
        raise
    except BaseException as error:  # Ctrl-C too: what was measured stays
        data["error"] = describe_error(error)
        if "latency" in data:
            data["check"] = {"withheld": "the run ended before its last check"}
        raise
    finally:
        results.write()
        target.stop()
    data["partial"] = False
    results.write()
    for line in table(data):
        print(line)
    return OK if data["completed"] >= (1 - MOST_ERRORS) * len(records) else FAILED


def _withhold(data: dict[str, Any], why: str) -> None:
    """Take back all times: what they belong to was wrong."""
    for name in ("latency", "queue", "service", "check"):
        data[name] = {"withheld": why}
    for name in ("throughput_per_s", "throughput_over_s", "requests"):
        data.pop(name, None)
    data["error"] = {"type": "CheckError", "message": why}


def table(data: dict[str, Any]) -> Iterator[str]:
    """The run's figures as lines for a terminal."""
    asked = len(data["requests"])
    if data.get("configuration", {}).get("server_machine") == ANOTHER_MACHINE:
        yield (
            "the server is on another machine: the figures are its own and the network's, and the "
            "machine in the results file is the one that sent the requests"
        )
    yield (
        f"{data['completed']} of {asked} requests answered, {data['throughput_per_s']:.4g} per s "
        f"over {data['throughput_over_s']:.4g} s"
    )
    yield "ms".rjust(10) + "".join(f"p{percent}".rjust(12) for percent in PERCENTS)
    for name in ("latency", "queue", "service"):
        summary = data[name]
        if "withheld" in summary:
            yield f"{name:10}  no number: {summary['withheld']}"
            continue
        unanswered = asked - data["completed"] if name == "latency" else 0
        values = (percentile_of_all(summary["all_ms"], unanswered, one) for one in PERCENTS)
        yield f"{name:10}" + "".join(
            f"{'no answer':>12}" if value is None else f"{value:12.1f}" for value in values
        )
    for message, count in data["errors"].items():
        yield f"error: {message} ({count} of {asked} requests)"
    late = data["late"]
    if late["share"]:
        yield (
            f"warning: the sender itself was late: {late['share']:.1%} of the requests were sent "
            f"more than {LATE_MS:g} ms after their time, the worst {late['worst_ms']:.1f} ms; "
            "latency counts from that time all the same"
        )


def _draw(options: argparse.Namespace) -> list[Record]:
    if not options.rate * options.duration <= MOST_REQUESTS:
        raise BadInputError(
            f"a rate of {options.rate:g} per s over {options.duration:g} s is more than "
            f"{MOST_REQUESTS} requests; lower --rate or --duration"
        )
    times = poisson_arrivals(options.rate, options.duration, options.seed)
    if not times:
        raise BadInputError(
            f"no request arrives within {options.duration:g} s at {options.rate:g} per s with seed "
            f"{options.seed}; raise --duration or --rate"
        )
    return [Record(number, moment) for number, moment in enumerate(times)]


def _device(options: argparse.Namespace, plan: Plan) -> str:
    """Where this process computes: nowhere but on the CPU if a server does the work."""
    if options.url is not None:
        return "cpu"
    return str(pick_device(options.device or plan.model.device))


def _open_results(options: argparse.Namespace, given: Sequence[str], device: str) -> Results:
    """A results file, written before anything costly is done."""
    header = {
        "format": FORMAT,
        "kind": "load",
        "command": ["load", *without_folders(given)],
        "machine": describe_machine(device),
        "configuration": {"timeout_s": options.timeout, "seed": options.seed},
        "offered": {
            "rate_per_s": options.rate,
            "duration_s": options.duration,
            "seed": options.seed,
        },
    }
    results = Results(options.output, header)
    del results.data["parts"]
    results.write()
    return results


def _make_target(
    options: argparse.Namespace, plan: Plan, clock: Clock
) -> EngineTarget | ServerTarget:
    if options.url is not None:
        last = plan.stages[-1]
        size = (last.width, last.height) if options.size is None else parse_size(options.size)
        model = options.model
        return ServerTarget(options.url, size, clock, options.seed, options.timeout, model)
    engine = Engine.from_pretrained(
        options.model, plan=plan, device=options.device or "auto", dtype=options.dtype or "auto"
    )
    return EngineTarget(engine, clock, options.seed, options.timeout)


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m bench load", description=__doc__)
    parser.add_argument("--rate", type=positive, required=True, metavar="R",
                        help="mean requests per second")  # fmt: skip
    parser.add_argument("--duration", type=positive, required=True, metavar="S",
                        help="seconds during which requests arrive")  # fmt: skip
    parser.add_argument("--url", help="a server with OpenAI's images API, without /v1/...")
    parser.add_argument("--model", metavar="DIR",
                        help="model folder (default: the built-in one); with --url the name "
                        "to ask for")  # fmt: skip
    parser.add_argument("--plan", type=Path, metavar="FILE",
                        help="plan file; with --url its last size is asked for")  # fmt: skip
    parser.add_argument("--size", metavar="WxH", help="with --url: the size to ask for")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="auto (default), float32, bfloat16 or float16")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="N",
                        help="of arrivals and pictures (default: 0)")  # fmt: skip
    parser.add_argument("--timeout", type=positive, default=600, metavar="S",
                        help="give a request up after so long (default: 600)")  # fmt: skip
    parser.add_argument("--warm-up", type=whole(1, 1000), default=1, metavar="N",
                        help="requests before the run, not counted (default: 1)")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="results file")
    options = parser.parse_args(given)
    foreign = [name for name in _IN_PROCESS_ONLY if options.url and getattr(options, name)]
    if foreign:
        parser.error(f"--{foreign[0]} is for the engine in this process, --url for a server's own")
    if options.size is not None and options.url is None:
        parser.error("--size is for --url; in process the plan says the size")
    return options
