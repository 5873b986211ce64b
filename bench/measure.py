"""Runs sides in turn and keeps what they say: the heart of ``bench run`` and ``bench compare``.

The order of a run: every side starts; every side makes one picture that is not timed, whose result
is checked and beside which its memory is watched; then the rounds, in each of which every side
makes the picture of the same request, in turned order every second time. The file is written after
every picture, so what was measured survives the end of the run.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.endings import OUT_OF_MEMORY
from bench.judging import compare_rounds, require_alike
from bench.memory_watch import MemoryWatch
from bench.pictures import save_picture
from bench.results import Results
from bench.side import MissingRivalError, Request, Round, Side, SideError
from bench.timing import Span, ratio, summarise, summarise_rounds
from turbo.errors import TurboError
from turbo.messages import one_line
from turbo.noise import MAX_SEED

MOST_OVERHEAD = 0.01
SPANS_TRIED = 2000

Arithmetic = Callable[[Request, Round], Mapping[str, float]]
"""Part -> floating-point operations that the request needed; skipped calls do not count."""

_FIGURES = (
    "start",
    "times",
    "network",
    "skips",
    "tflop",
    "share_of_limit",
    "memory",
    "overhead_share",
)


class Comparison:
    """A run of several sides.

    Args:
        sides: The first is what the others are compared with.
        requests: Request of a round by number; round 0 is the one that is not timed.
        results: Where everything is kept.
        reference: Makes one picture, with which the first side's must agree.
        cold_start: Makes one picture after the rounds, of which only the time is kept.
        arithmetic: Counts a round's operations, for the shares of the limit.
        limit: Measures the limit; before the rounds and after them, of which the faster counts.
        strict: Whether sides that are equally exact must agree to rounding, as float32 does.
        device: Whose clock times are taken with.
        say: Told what happens, a line at a time.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        requests: Callable[[int], Request],
        results: Results,
        *,
        reference: Side | None = None,
        cold_start: Side | None = None,
        arithmetic: Arithmetic | None = None,
        limit: Callable[[], Mapping[str, Any]] | None = None,
        strict: bool = True,
        device: torch.device | None = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._leader = sides[0]
        self._all = list(sides)
        self._active = list(sides)
        self._requests = requests
        self._results = results
        self._reference = reference
        self._cold_start = cold_start
        self._arithmetic = arithmetic
        self._limit = limit
        self._strict = strict
        self._device = device or torch.device("cpu")
        self._say = say
        self._far_db: float | None = None
        self._rounds: dict[str, list[Round]] = {side.name: [] for side in sides}
        self._first: dict[str, Round] = {}
        self._watches = {side.name: MemoryWatch(side) for side in sides}
        self._entries: dict[str, dict[str, Any]] = {
            side.name: {"approximate": side.approximate, "best": side.best} for side in sides
        }
        results.data["sides"] = self._entries

    def run(self, rounds: int) -> None:
        """Start, check and measure.

        Raises:
            MissingRivalError: What a side needs is not there.
            SideError: The first side cannot run or is wrong. Of others, what they were measured
                with before they ended is kept, and nothing of one whose picture is wrong.
        """
        try:
            for side in reversed(self._all):  # rivals first: what is missing shows at once
                self._start(side)
            self._require_others()
            for side in self._active.copy():
                self._try_out(side)
            self._require_others()
            self._calibrate()
            self._require_others()
            self._measure_limit()
            for number in range(1, rounds + 1):
                for side in self._active[:: 1 if number % 2 else -1]:
                    self._measure(side, number)
                self._judge_round()
                self._conclude()
            self._measure_the_rest()
            self._measure_limit()
            self._require_below_limit()
            self._measure_cold_start()
        finally:
            try:
                self._conclude()
            finally:
                for side in self._all:
                    side.close()

    @property
    def complete(self) -> bool:
        """Whether every side made all its pictures, and right ones."""
        return self._active == self._all

    # ------------------------------------------------------------ sides that fail

    @contextlib.contextmanager
    def _guarded(self, side: Side) -> Iterator[None]:
        """Let another side's failure end that side alone."""
        try:
            yield
        except MissingRivalError:
            raise
        except SideError as error:
            self._end(side, error)
        except OUT_OF_MEMORY as error:
            if side is self._leader:
                raise
            self._end(side, SideError(one_line(error, limit=300)))
        except (TurboError, OSError, RuntimeError, ValueError) as error:
            kind = type(error).__name__
            self._end(side, SideError(f"{kind}: {one_line(str(error), limit=300)}"))

    def _end(self, side: Side, error: SideError) -> None:
        """Go on without a side, with the figures it has; without the first one nothing goes on."""
        entry = self._entries[side.name]
        if self._rounds[side.name]:
            entry["ended"] = f"after round {len(self._rounds[side.name])}: {error}"
        else:
            entry.pop("start", None)  # of what ran nothing is known to be right
            entry["check"] = {"withheld": str(error)}
        self._drop(side, error)

    def _withhold(self, side: Side, error: SideError) -> None:
        """Give no figures of a side that is wrong."""
        entry = self._entries[side.name]
        for figures in _FIGURES:
            entry.pop(figures, None)
        entry["check"] = {"withheld": str(error)}
        self._rounds[side.name].clear()
        self._drop(side, error)

    def _drop(self, side: Side, error: SideError) -> None:
        self._say(f"{side.name}: {error}")
        self._active.remove(side)
        side.close()
        if side is self._leader:
            raise SideError(f"{side.name}: {error}")

    # ------------------------------------------------------------ before the rounds

    def _require_others(self) -> None:
        """Go on if what was to be compared can be.

        Raises:
            SideError: The first side's program is alone, though it was not meant to be.
        """
        asked, left = ({_program(side) for side in sides} for sides in (self._all, self._active))
        if len(self._active) < 2 <= len(self._all) or len(left) < 2 <= len(asked):
            raise SideError(f"nothing is left to compare {self._leader.name} with")

    def _start(self, side: Side) -> None:
        entry = self._entries[side.name]
        self._say(f"{side.name}: starting")
        with self._guarded(side):
            entry["start"] = {name: round(value, 4) for name, value in side.start().items()}
            entry["settings"] = side.settings()
        self._results.write()

    def _try_out(self, side: Side) -> None:
        entry = self._entries[side.name]
        self._say(f"{side.name}: first picture")
        with self._guarded(side):
            begin = time.perf_counter()
            with self._watches[side.name].watching():
                first = side.paint(self._requests(0))
            if not first.recorded:
                entry["start"]["first picture"] = round(time.perf_counter() - begin, 4)
            self._first[side.name] = first
            self._keep_picture(side, 0, self._requests(0).seed, first)
            entry["check"] = side.check()
        self._results.write()

    def _calibrate(self) -> None:
        """Compare the first pictures, with another seed's as the measure of what is far."""
        leader, first, request = self._leader, self._first[self._leader.name], self._requests(0)
        elsewhere = leader.paint(replace(request, seed=another_seed(request.seed)))
        far = compare_rounds(elsewhere, first)
        self._far_db = far["psnr_db"]
        compared: dict[str, Any] = {"another seed": [far]}
        self._results.data["pictures"] = compared
        self._require_reference(first, compared)
        for side in self._active[1:]:
            self._judge(side, 0, self._first[side.name], first)
        self._results.write()

    def _require_reference(self, first: Round, compared: dict[str, Any]) -> None:
        """The first side's picture against the reference's, or else against its own repeated."""
        leader, request = self._leader, self._requests(0)
        if self._reference is not None:
            try:
                self._reference.start()
                other = self._reference.paint(request)
            finally:
                self._reference.close()
            found = compare_rounds(first, other)
            compared[f"{leader.name} / {self._reference.name}"] = [{"round": 0, **found}]
            require_alike(leader, self._reference, found, self._far_db, strict=self._strict)
        elif len(self._all) == 1:
            found = compare_rounds(leader.paint(request), first)
            self._entries[leader.name]["check"]["repeated"] = found
            if not found["identical"] and self._strict:
                raise SideError(f"{leader.name}: the same request made another picture: {found}")

    def _judge(self, side: Side, number: int, made: Round, leaders: Round) -> None:
        compared = self._results.data["pictures"]
        try:
            found = compare_rounds(made, leaders)
            listed = compared.setdefault(f"{side.name} / {self._leader.name}", [])
            listed.append({"round": number, **found})
            require_alike(side, self._leader, found, self._far_db, strict=self._strict)
        except SideError as error:
            self._withhold(side, error)

    # ------------------------------------------------------------ the rounds

    def _measure(self, side: Side, number: int) -> None:
        request = self._requests(number)
        with self._guarded(side):
            made = side.paint(request)
            self._rounds[side.name].append(made)
            shown = ", ".join(f"{name} {value:.2f}" for name, value in made.seconds.items())
            self._say(f"{side.name}, round {number}: {shown} s")
            self._keep_picture(side, number, request.seed, made)
            self._describe(side)
        self._results.write()

    def _judge_round(self) -> None:
        """The newest picture of every side against the first side's."""
        number = len(self._rounds[self._leader.name])
        for side in self._active[1:]:
            made, leaders = self._rounds[side.name][-1], self._rounds[self._leader.name][-1]
            self._judge(side, number, made, leaders)

    def _keep_picture(self, side: Side, number: int, seed: int, made: Round) -> None:
        path = self._results.path
        if path is None:
            return
        kept = save_picture(made.image, pictures_folder(path), f"{side.name}-{number}")
        pictures = self._entries[side.name].setdefault("pictures", [])
        pictures.append({"round": number, "seed": seed, **kept})

    def _describe(self, side: Side) -> None:
        entry, rounds = self._entries[side.name], self._rounds[side.name]
        last = rounds[-1]
        entry["times"] = entry.get("times", {}) | {
            part: summarise_rounds([one.seconds[part] for one in rounds])
            for part in last.seconds
            if all(part in one.seconds for one in rounds)
        }
        entry["network"] = {
            stage: summarise([1000 * call for one in rounds for call in one.network_s[stage]])
            | {"calls_per_picture": len(last.network_s[stage])}
            for stage in last.network_s
            if all(one.network_s.get(stage) for one in rounds)
        }
        entry["skips"] = {stage: list(counts) for stage, counts in last.skips.items()}
        watch = self._watches[side.name]
        entry["memory"] = {
            "host_peak_gib": watch.host_peak_gib,
            "device": _largest([one.memory_gib for one in rounds]) or _largest([watch.device]),
            "shared_with": [
                other.name
                for other in self._all
                if other is not side and other.in_process and side.in_process
            ],
            "timeline": watch.timeline,
        }
        entry["overhead_share"] = self._overhead(side, last)
        if self._arithmetic is not None:
            entry |= self._shares(side, rounds)

    def _overhead(self, side: Side, last: Round) -> float | None:
        """Share of a picture's time that its clocks take: how many, times what one costs here."""
        if not last.spans:
            return None
        share = last.spans * _span_s(self._device) / last.seconds["total"]
        if share > MOST_OVERHEAD:
            self._say(f"{side.name}: taking times took {share:.1%} of the time")
        return share

    def _shares(self, side: Side, rounds: Sequence[Round]) -> dict[str, Any]:
        """Arithmetic of each part, and the share of the limit, each round by its own calls.

        The limit is that of the first side's dtype; one that says it has another has no share.
        """
        assert self._arithmetic is not None
        limit = self._results.data.get("limit", {}).get("tflop_per_s")
        counted = [
            self._arithmetic(self._requests(number), one)
            for number, one in enumerate(rounds, start=1)
        ]
        parts = [part for part in counted[-1] if all(part in one.seconds for one in rounds)]
        tflop = {part: counted[-1][part] / 1e12 for part in parts}
        if not limit or self._dtype_of(side) not in (None, self._dtype_of(self._leader)):
            return {"tflop": tflop}
        shares = {
            part: statistics.median(
                operations[part] / 1e12 / one.seconds[part] / limit
                for operations, one in zip(counted, rounds)
            )
            for part in parts
        }
        return {"tflop": tflop, "share_of_limit": shares}

    def _dtype_of(self, side: Side) -> Any:
        return self._entries[side.name].get("settings", {}).get("dtype")

    def _measure_limit(self) -> None:
        if self._limit is None:
            return
        found, before = dict(self._limit()), self._results.data.get("limit", {})
        if before.get("tflop_per_s", 0.0) < found["tflop_per_s"]:
            self._results.data["limit"] = found
        for side in self._active:
            if self._rounds[side.name]:
                self._describe(side)

    def _require_below_limit(self) -> None:
        """A part that was faster than the limit shows that the limit was measured too low."""
        entries = [self._entries[side.name] for side in self._active]
        largest = max(
            (share for entry in entries for share in entry.get("share_of_limit", {}).values()),
            default=0.0,
        )
        if largest <= 1:
            return
        for entry in entries:
            entry.pop("share_of_limit", None)
        self._results.data["limit"] = {
            "withheld": f"a part ran at {largest:.0%} of it: something else kept the machine busy "
            "while the limit was measured; measure again on an idle machine"
        }

    # ------------------------------------------------------------ after each round

    def _conclude(self) -> None:
        """Ratios of the first side to all others, and of the best of two programs."""
        pairs = [(self._leader, side) for side in self._all[1:]]
        best = [side for side in self._all if side.best and side is not self._leader]
        pairs += [
            (side, other)
            for index, side in enumerate(best)
            for other in best[index + 1 :]
            if _program(side) != _program(other)
        ]
        ratios: dict[str, Any] = {}
        for side, other in pairs:
            both = list(zip(self._rounds[side.name], self._rounds[other.name]))
            if both:
                ratios[f"{side.name} / {other.name}"] = ratios_of(both)
        self._results.data["ratios"] = ratios
        self._results.write()

    def _measure_cold_start(self) -> None:
        """A whole process; its time counts only if it made the first side's picture."""
        side = self._cold_start
        if side is None:
            return
        self._say(side.name)
        try:
            made = side.paint(self._requests(0))
            found = compare_rounds(made, self._first[self._leader.name])
            require_alike(side, self._leader, found, self._far_db, strict=self._strict)
        except SideError as error:
            raise SideError(f"{side.name}: {error}") from error
        finally:
            side.close()
        self._results.data["pictures"][f"{side.name} / {self._leader.name}"] = [
            {"round": 0, **found}
        ]
        self._results.data["cold_start"] = {_program(side): dict(made.seconds)}

    def _measure_the_rest(self) -> None:
        for side in self._active:
            self._entries[side.name]["times"] |= side.others()


def another_seed(seed: int) -> int:
    """The next one; after the largest the smallest."""
    return (seed + 1) % (MAX_SEED + 1)


def _program(side: Side) -> str:
    return side.name.partition(",")[0]


def ratios_of(pairs: Sequence[tuple[Round, Round]]) -> dict[str, Any]:
    """Ratio of every part that both sides have in all rounds.

    Where only one side's total has the PNG in it, the other's is added to its total.
    """
    timed = [(_like(one, other), _like(other, one)) for one, other in pairs]
    first, second = timed[-1]
    return {
        part: ratio([one[part] for one, _ in timed], [other[part] for _, other in timed])
        for part in first
        if part in second and all(one.get(part) and other.get(part) for one, other in timed)
    }


def _like(made: Round, other: Round) -> Mapping[str, float]:
    """A round's times as they may stand beside the other's; no total if it cannot be made so."""
    if made.total_has_png or not other.total_has_png:
        return made.seconds
    total, png = made.seconds["total"], made.seconds.get("png")
    like = {} if png is None else {"total": total + png}
    return like | {part: seconds for part, seconds in made.seconds.items() if part != "total"}


def _largest(
    found: Sequence[Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, float]]:
    largest: dict[str, dict[str, float]] = {}
    for one in found:
        for part, values in one.items():
            entry = largest.setdefault(part, {})
            for name, gib in values.items():
                key = f"{name}_gib"
                entry[key] = max(entry.get(key, 0.0), round(gib, 4))
    return largest


def _span_s(device: torch.device) -> float:
    """What taking one time costs here, in seconds."""
    begin = time.perf_counter()
    for _ in range(SPANS_TRIED):
        span = Span(device)
        span.begin()
        span.end()
    return (time.perf_counter() - begin) / SPANS_TRIED


def pictures_folder(path: Path) -> Path:
    """Where the pictures of a results file lie."""
    return path.with_name(f"{path.stem}-pictures")
