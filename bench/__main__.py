"""``python -m bench COMMAND``: the measurements; ``python -m bench COMMAND --help`` says more."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

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


def main() -> int:
    """Run the command that is named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as turbo's command does
        for number in (signal.SIGTERM, signal.SIGHUP):  # so that child processes end too
            signal.signal(number, lambda received, _: sys.exit(128 + received))
        try:
            code: int = import_module(f"bench.{name}").main(sys.argv[2:])
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
