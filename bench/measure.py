"""Runs sides in turn and keeps what they say: the heart of ``bench run`` and ``bench compare``.

The order of a run: every side starts; every side makes one picture that is not timed, whose result
is checked; then the rounds, in each of which every side makes the picture of the same request. The
file is written after every picture, so what was measured survives the end of the run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.memory_watch import MemoryWatch
from bench.pictures import compare_latents, compare_pictures, save_picture
from bench.results import Results
from bench.side import Request, Round, Side, SideError
from bench.timing import ratio, summarise, summarise_rounds

LEAST_MARGIN_DB = 6.0
"""How much nearer than another seed's picture a side's must be to the first side's: half as far."""
EXACT_PSNR_DB = 40.0
"""Of float32 sides that are not marked approximate: an error of 2.5 of 255 on average."""
CLOCK_READINGS = 20_000
ANOTHER_SEED = 1


Arithmetic = Callable[[Request, Round], Mapping[str, float]]
"""Part -> floating-point operations that the request needed; skipped calls do not count."""


class Comparison:
    """A run of several sides.

    Args:
        sides: The first is what the others are compared with.
        requests: Request of a round by number; round 0 is the one that is not timed.
        results: Where everything is kept.
        arithmetic: Counts a round's operations, for the shares of the limit.
        limit: Measures the limit; before the rounds and after them, of which the faster counts.
        strict: Whether sides that are not approximate must agree to rounding (in float32).
        say: Told what happens, a line at a time.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        requests: Callable[[int], Request],
        results: Results,
        *,
        arithmetic: Arithmetic | None = None,
        limit: Callable[[], Mapping[str, Any]] | None = None,
        strict: bool = True,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._sides = list(sides)
        self._requests = requests
        self._results = results
        self._arithmetic = arithmetic
        self._limit = limit
        self._strict = strict
        self._say = say
        self._rounds: dict[str, list[Round]] = {side.name: [] for side in sides}
        self._watches: dict[str, MemoryWatch] = {}
        self._first: dict[str, Round] = {}
        alone = sum(side.in_process for side in sides) == 1
        for side in sides:
            self._watches[side.name] = MemoryWatch(side, host=alone or not side.in_process)
        self._entries: dict[str, dict[str, Any]] = {
            side.name: {"approximate": side.approximate, "best": side.best} for side in sides
        }
        results.data["sides"] = self._entries

    def run(self, rounds: int) -> None:
        """Start, check and measure.

        Raises:
            SideError: The first side cannot run or is wrong; what others fail in is recorded.
        """
        try:
            for side in reversed(self._sides.copy()):  # rivals first: what is missing shows at once
                self._start(side)
            for side in self._sides.copy():
                self._try_out(side)
            self._calibrate()
            self._measure_limit()
            for number in range(1, rounds + 1):
                for side in list(self._sides):
                    self._measure(side, number)
                self._conclude()
            self._measure_the_rest()
            self._measure_limit()
            self._require_below_limit()
        finally:
            self._conclude()
            for side in self._sides:
                side.close()

    # ------------------------------------------------------------ before the rounds

    def _start(self, side: Side) -> None:
        entry = self._entries[side.name]
        self._say(f"{side.name}: starting")
        try:
            entry["start"] = {name: round(value, 4) for name, value in side.start().items()}
            entry["settings"] = side.settings()
        except SideError as error:
            self._withhold(side, error)
        self._results.write()

    def _try_out(self, side: Side) -> None:
        entry = self._entries[side.name]
        self._say(f"{side.name}: first picture")
        try:
            begin = time.perf_counter()
            first = side.paint(self._requests(0))
            entry["start"]["first picture"] = round(time.perf_counter() - begin, 4)
            self._first[side.name] = first
            self._keep_picture(side, 0, self._requests(0).seed, first)
            entry["check"] = side.check()
        except SideError as error:
            self._withhold(side, error)
        self._results.write()

    def _withhold(self, side: Side, error: SideError) -> None:
        """No figures of a side that is wrong; without the first one there is nothing to do."""
        entry = self._entries[side.name]
        for figures in ("times", "network", "tflop", "share_of_limit", "memory", "overhead_share"):
            entry.pop(figures, None)
        entry["check"] = {"withheld": str(error)}
        self._rounds[side.name].clear()
        self._say(f"{side.name}: {error}")
        first = side is self._sides[0]
        self._sides.remove(side)
        side.close()
        if first or not self._sides:
            raise error

    def _calibrate(self) -> None:
        """Compare the first pictures, with another seed's as the measure of what is far."""
        leader, *others = self._sides
        first = self._first[leader.name]
        request = self._requests(0)
        elsewhere = Request(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed + ANOTHER_SEED,
        )
        if not others:
            self._require_repeatable(leader, first)
            return
        compared = {"another seed": [compare_rounds(leader.paint(elsewhere), first)]}
        for side in others:
            found = compare_rounds(self._first[side.name], first)
            compared[f"{side.name} / {leader.name}"] = [{"round": 0, **found}]
            try:
                self._require_alike(side, leader, found, compared["another seed"][0])
            except SideError as error:
                self._withhold(side, error)
        self._results.data["pictures"] = compared
        self._results.write()

    def _require_repeatable(self, side: Side, first: Round) -> None:
        found = compare_rounds(side.paint(self._requests(0)), first)
        self._entries[side.name]["check"]["repeated"] = found
        if not found["identical"] and self._strict:
            raise SideError(f"{side.name}: the same request made another picture: {found}")

    def _require_alike(
        self, side: Side, leader: Side, found: dict[str, Any], elsewhere: dict[str, Any]
    ) -> None:
        psnr = found["psnr_db"]
        exact = self._strict and not (side.approximate or leader.approximate)
        far = elsewhere["psnr_db"]
        least = EXACT_PSNR_DB if exact else (0.0 if far is None else far) + LEAST_MARGIN_DB
        if psnr is not None and psnr < least:
            raise SideError(
                f"its picture has {psnr:.1f} dB to that of {leader.name}, {least:.1f} are needed "
                "for its times to be given: it is another picture"
            )

    # ------------------------------------------------------------ the rounds

    def _measure(self, side: Side, number: int) -> None:
        request = self._requests(number)
        watch = self._watches[side.name]
        try:
            if number == 1:
                with watch.watching():
                    made = side.paint(request)
            else:
                made = side.paint(request)
        except SideError as error:
            self._withhold(side, SideError(f"round {number}: {error}"))
            return
        self._rounds[side.name].append(made)
        shown = ", ".join(f"{name} {value:.2f}" for name, value in made.seconds.items())
        self._say(f"{side.name}, round {number}: {shown} s")
        self._keep_picture(side, number, request.seed, made)
        self._describe(side)
        self._results.write()

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
            "device": _largest([one.memory_gib for one in rounds]),
            "timeline": watch.timeline,
        }
        entry["overhead_share"] = self._overhead(side, last)
        if self._arithmetic is not None:
            entry |= self._shares(rounds)

    def _overhead(self, side: Side, last: Round) -> float | None:
        """Share of a picture's time that our clocks take: readings times what one costs here."""
        if not last.spans:
            return None
        watch = self._watches[side.name]
        total = last.seconds["total"]
        return (2 * last.spans * _clock_s() + watch.looking_s) / total

    def _shares(self, rounds: Sequence[Round]) -> dict[str, Any]:
        """Arithmetic of each part, and the share of the limit, each round by its own calls."""
        assert self._arithmetic is not None
        limit = self._results.data.get("limit", {}).get("tflop_per_s")
        counted = [
            self._arithmetic(self._requests(number), one)
            for number, one in enumerate(rounds, start=1)
        ]
        parts = [part for part in counted[-1] if all(part in one.seconds for one in rounds)]
        tflop = {part: counted[-1][part] / 1e12 for part in parts}
        if not limit:
            return {"tflop": tflop}
        shares = {
            part: statistics.median(
                operations[part] / 1e12 / one.seconds[part] / limit
                for operations, one in zip(counted, rounds)
            )
            for part in parts
        }
        return {"tflop": tflop, "share_of_limit": shares}

    def _measure_limit(self) -> None:
        if self._limit is None:
            return
        found, before = dict(self._limit()), self._results.data.get("limit", {})
        if before.get("tflop_per_s", 0.0) < found["tflop_per_s"]:
            self._results.data["limit"] = found
        for side in self._sides:
            if self._rounds[side.name]:
                self._describe(side)

    def _require_below_limit(self) -> None:
        """A part that was faster than the limit shows that the limit was measured too low."""
        entries = [self._entries[side.name] for side in self._sides]
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
        """Ratios and picture comparisons of all sides with the first and of best with best."""
        ratios: dict[str, Any] = {}
        for side in self._sides[1:]:
            leader = self._sides[0]
            pairs = list(zip(self._rounds[leader.name], self._rounds[side.name]))
            if pairs:
                ratios[f"{leader.name} / {side.name}"] = ratios_of(pairs)
                self._compare_last(side, leader, pairs[-1])
        self._results.data["ratios"] = ratios | self._best_with_best()
        self._results.write()

    def _compare_last(self, side: Side, leader: Side, pair: tuple[Round, Round]) -> None:
        compared = self._results.data.setdefault("pictures", {})
        listed = compared.setdefault(f"{side.name} / {leader.name}", [])
        number = min(len(self._rounds[leader.name]), len(self._rounds[side.name]))
        if number and all(one.get("round") != number for one in listed):
            listed.append({"round": number, **compare_rounds(pair[1], pair[0])})

    def _best_with_best(self) -> dict[str, Any]:
        best = [side for side in self._sides if side.best]
        found: dict[str, Any] = {}
        for index, side in enumerate(best):
            for other in best[index + 1 :]:
                same = side.name.split(",")[0] == other.name.split(",")[0]
                pairs = list(zip(self._rounds[side.name], self._rounds[other.name]))
                if pairs and not same and side is not self._sides[0]:
                    found[f"{side.name} / {other.name}"] = ratios_of(pairs)
        return found

    def _measure_the_rest(self) -> None:
        for side in self._sides:
            self._entries[side.name]["times"] |= side.others()


def ratios_of(pairs: Sequence[tuple[Round, Round]]) -> dict[str, Any]:
    """Ratio of every part that both sides have in all rounds."""
    first, second = pairs[-1]
    return {
        part: ratio(
            [one.seconds[part] for one, _ in pairs], [other.seconds[part] for _, other in pairs]
        )
        for part in first.seconds
        if part in second.seconds
        and all(one.seconds.get(part) and other.seconds.get(part) for one, other in pairs)
    }


def compare_rounds(ours: Round, theirs: Round) -> dict[str, Any]:
    """Pictures and, where both have them, latents of one request."""
    found: dict[str, Any] = compare_pictures(ours.image, theirs.image)
    both = [stage for stage in ours.latents if stage in theirs.latents]
    if both:
        found["latent"] = {
            stage: compare_latents(ours.latents[stage], theirs.latents[stage]) for stage in both
        }
    return found


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


def _clock_s() -> float:
    """What reading the clock once costs, its caller included."""
    begin = time.perf_counter()
    for _ in range(CLOCK_READINGS):
        time.perf_counter()
    return (time.perf_counter() - begin) / CLOCK_READINGS


def pictures_folder(path: Path) -> Path:
    """Where the pictures of a results file lie."""
    return path.with_name(f"{path.stem}-pictures")
