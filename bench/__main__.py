"""``python -m bench COMMAND``: the measurements; ``python -m bench COMMAND --help`` says more."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any

COMMANDS = {
    "run": "the workflow end to end and by part",
    "compare": "the workflow beside a rival's, in the same run",
    "model": "write a model of random weights to measure with",
    "device": "all GPU checks and measurements in one results file",
    "report": "a page and PNG charts of results files",
    "export": "the figures for other tools, such as github-action-benchmark",
    "load": "requests at random times: latency, queue, throughput, errors",
    "quality": "how far each approximate option changes the picture",
    "loading": "peak host memory of reading a model's files",
}


def _command(name: str) -> Any:
    try:
        return import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("bench", "turbo", ""):
            raise
        from bench.endings import BAD_INPUT, complain, missing_packages

        sys.exit(complain(BAD_INPUT, missing_packages([str(error.name)])))


def end_on_signals() -> None:
    """End as an error does, so that child processes end too; what ``nohup`` ignores stays so."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not every system has both
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def main() -> int:
    """Run the command that is named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as turbo's command does
        end_on_signals()
        try:
            code: int = _command(name).main(sys.argv[2:])
        except KeyboardInterrupt:
            print(
                "stopped; if a results file was asked for, it holds what was measured",
                file=sys.stderr,
            )
            return 130
        return code
    listed = "\n".join(f"  {known:10} {meaning}" for known, meaning in COMMANDS.items())
    print(f"usage: python -m bench COMMAND ...\n\n{listed}\n\nRESULTS files: bench/schema.md")
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
