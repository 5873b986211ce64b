"""``python -m bench report``: one self-contained page, and PNG charts, of results files.

The page asks for nothing else, so it can be sent around. Pictures are those that lie beside the
results files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bench.arguments import Parser
from bench.endings import OK, exit_code, require_writable
from turbo.whole_file import write_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m bench report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results files, of any kinds")
    parser.add_argument("-o", "--output", type=Path, help="HTML file to write")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="folder for PNG charts")
    options = parser.parse_args(arguments)
    if options.output is None and options.charts is None:
        parser.error("nothing to write; give -o report.html, --charts DIR or both")

    def work() -> int:
        require_writable(options.output)
        require_writable(options.charts and options.charts / "stages.png", "--charts")
        _write(options.results, options.output, options.charts)
        return OK

    return exit_code(work)


def _write(paths: Sequence[Path], output: Path | None, charts: Path | None) -> None:
    from bench.reporting.files import ResultsFile
    from bench.reporting.page import make_page

    files = [ResultsFile.read(path) for path in dict.fromkeys(paths)]
    if output is not None:
        page = make_page(files)
        write_whole(output, page.encode())
        print(f"wrote {output} ({len(page.encode()) / 1e6:.1f} MB)")
    if charts is not None:
        from bench.reporting.png import draw_charts

        for path, missing in draw_charts(files, charts):
            if missing:
                print(f"no {path.name}: {missing}", file=sys.stderr)
            else:
                print(f"wrote {path}")
