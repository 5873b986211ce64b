"""Sides measured in turn: order, ratios, checks, and what survives an early end."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench.measure import Comparison, another_seed, ratios_of
from bench.memory_watch import MemoryWatch
from bench.recorded_side import RecordedSide
from bench.results import FORMAT, Results, ResultsFileError
from bench.side import MissingRivalError, Request, Round, SideError
from bench.table import lines_of
from tests.bench.sides import FakeSide, picture
from turbo.errors import OutOfMemoryError

MACHINE = {
    "id": "m1",
    "threads": 2,
    "torch": "2.13",
    "commit": "abc",
    "time": "2026-01-01T00:00:00+00:00",
}
CONFIGURATION = {
    "model": {"fingerprint": "f"},
    "plan": {},
    "prompt": "p",
    "negative_prompt": "n",
    "seed": 5,
    "dtype": "float32",
    "device": "cpu",
}
HEADER = {"format": FORMAT, "kind": "compare", "machine": MACHINE, "configuration": CONFIGURATION}


def request(number: int) -> Request:
    return Request(prompt=f"p, take {number}", negative_prompt="n", seed=5)


def compare(
    sides: list[FakeSide], path: Path | None = None, rounds: int = 3, **options: Any
) -> dict[str, Any]:
    results = Results(path, HEADER)
    Comparison(sides, request, results, say=lambda line: None, **options).run(rounds)
    return results.data


def test_a_total_with_the_png_in_it_is_held_against_one_with_the_png_added():
    image = picture(5)
    ours = Round(seconds={"total": 1.0, "png": 0.5, "stage1": 0.7}, image=image)
    server = Round(seconds={"total": 3.0}, image=image, total_has_png=True)
    assert ratios_of([(ours, server)])["total"]["median"] == 0.5
    assert ratios_of([(server, ours)])["total"]["median"] == 2.0
    assert ratios_of([(ours, ours)])["total"]["median"] == 1.0
    untold = Round(seconds={"total": 1.0, "stage1": 0.7}, image=image)
    assert ratios_of([(untold, server)]) == {}


def test_sides_alternate_in_turned_order_and_each_round_asks_all_for_the_same_picture():
    order: list[str] = []

    def noted(name: str) -> FakeSide:
        def draw(asked: Request) -> Image.Image:
            order.append(name)
            return picture(5)

        return FakeSide(name, draw=draw)

    sides = [noted("a"), noted("b")]
    compare(sides, rounds=2)
    assert order[-4:] == ["a", "b", "b", "a"]  # drift within a round favours neither
    assert [asked.prompt for asked in sides[1].asked] == ["p, take 0", "p, take 1", "p, take 2"]


def test_the_first_picture_is_no_round_and_a_ratio_is_taken_within_rounds():
    slow_machine = {1: 99.0, 2: 99.0, 3: 2.0, 4: 2.0, 5: 20.0}  # 2 is another seed's
    ours = FakeSide("ours", lambda number: slow_machine[number])
    theirs = FakeSide("theirs", lambda number: {1: 50.0, 2: 4.0, 3: 4.0, 4: 40.0}[number])
    found = compare([ours, theirs])
    assert found["sides"]["ours"]["times"]["total"]["all_ms"] == [2000, 2000, 20000]
    assert found["ratios"]["ours / theirs"]["total"]["median"] == pytest.approx(0.5)
    assert found["sides"]["ours"]["network"]["stage1"]["calls_per_picture"] == 2


def test_a_side_with_another_picture_gets_no_figures_and_the_others_go_on():
    wrong = FakeSide("wrong", draw=lambda asked: picture(99))
    right = FakeSide("right")
    found = compare([FakeSide("ours"), wrong, right])
    assert "another picture" in found["sides"]["wrong"]["check"]["withheld"]
    assert "times" not in found["sides"]["wrong"]
    assert list(found["ratios"]) == ["ours / right"]
    assert wrong.closed
    assert any("no figures" in line for line in lines_of(found))


def test_an_approximate_side_may_differ_but_not_as_much_as_another_seed():
    def worse(asked: Request) -> Image.Image:
        return picture(asked.seed, shift=5)

    sides = [FakeSide("ours"), FakeSide("approximate", draw=worse, approximate=True),
             FakeSide("exact", draw=worse)]  # fmt: skip
    found = compare(sides)
    assert "times" in found["sides"]["approximate"]
    assert "withheld" in found["sides"]["exact"]["check"]


def test_a_side_whose_later_picture_is_another_one_loses_its_figures():
    drawn = iter([5, 5, 5, 99])
    found = compare([FakeSide("ours"), FakeSide("theirs", draw=lambda asked: picture(next(drawn)))])
    assert "another picture" in found["sides"]["theirs"]["check"]["withheld"]
    assert found["ratios"] == {}


def test_a_rival_that_dies_keeps_the_rounds_it_made_and_the_file_is_partial(tmp_path: Path):
    def die(number: int) -> float:
        if number == 4:
            raise SideError("was ended by signal 9")
        return 2.0

    results = Results(tmp_path / "r.json", HEADER)
    sides = [FakeSide("ours"), FakeSide("theirs", die)]
    comparison = Comparison(sides, request, results, say=lambda line: None)
    comparison.run(3)
    assert not comparison.complete
    entry = results.data["sides"]["theirs"]
    assert entry["ended"] == "after round 2: was ended by signal 9"
    assert results.data["ratios"]["ours / theirs"]["total"]["pairs"] == 2


def test_a_rival_with_an_error_of_its_own_ends_alone():
    def fail(number: int) -> float:
        raise RuntimeError("out of\nmemory")

    found = compare([FakeSide("ours"), FakeSide("theirs", fail), FakeSide("others")])
    assert found["sides"]["theirs"]["check"] == {"withheld": "RuntimeError: out of memory"}


def test_nothing_is_painted_for_when_no_rival_is_left(tmp_path: Path):
    class Unable(FakeSide):
        def start(self) -> dict[str, float]:
            raise SideError("reads no such files")

    ours, fastest = FakeSide("ours"), FakeSide("ours, compiled", best=True)
    with pytest.raises(SideError, match="nothing is left to compare ours with"):
        compare([ours, fastest, Unable("theirs")], tmp_path / "a.json")
    assert ours.asked == fastest.asked == []
    assert "start" not in json.loads((tmp_path / "a.json").read_text())["sides"]["theirs"]
    another = FakeSide("theirs", draw=lambda asked: picture(99))
    with pytest.raises(SideError, match="nothing is left"):
        compare([ours, fastest, another], tmp_path / "b.json")
    assert len(ours.asked) == 2  # round 0 and another seed
    kept = json.loads((tmp_path / "b.json").read_text())["sides"]["theirs"]
    assert "another picture" in kept["check"]["withheld"]
    assert "start" not in kept


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), OutOfMemoryError("full", "load")]
)
def test_memory_that_runs_out_ends_a_rival_alone_and_the_first_side_with_its_own_error(
    error: Exception,
):
    def fail(number: int) -> float:
        raise error

    found = compare([FakeSide("ours"), FakeSide("theirs", fail), FakeSide("others")])
    assert found["sides"]["theirs"]["check"] == {"withheld": "full"}
    with pytest.raises(type(error)):
        compare([FakeSide("ours", fail), FakeSide("theirs")])


def test_the_largest_seed_has_another_one_too():
    assert another_seed(2**64 - 1) == 0
    assert another_seed(5) == 6


def test_a_whole_process_is_timed_after_the_rounds_if_its_picture_is_right():
    class Whole(FakeSide):
        def paint(self, request: Request) -> Round:
            return replace(super().paint(request), seconds={"process to picture": 7.0})

    found = compare([FakeSide("ours")], cold_start=Whole("ours, whole process", approximate=True))
    assert found["cold_start"] == {"ours": {"process to picture": 7.0}}
    wrong = Whole("ours, whole process", draw=lambda asked: picture(99), approximate=True)
    with pytest.raises(SideError, match=r"ours, whole process: .* is another picture"):
        compare([FakeSide("ours")], cold_start=wrong)
    assert wrong.closed


def test_sides_of_one_process_say_that_they_share_its_memory():
    found = compare([FakeSide("ours"), FakeSide("theirs")])["sides"]
    assert found["ours"]["memory"]["shared_with"] == ["theirs"]
    assert found["ours"]["memory"]["host_peak_gib"] > 0
    assert "of one process with theirs" in "\n".join(lines_of({"sides": found}))


def test_a_server_tells_its_device_memory_part_by_part(monkeypatch: pytest.MonkeyPatch):
    side = FakeSide("theirs")
    held = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(side, "device_memory_gib", lambda: {"allocated": next(held)})
    watch = MemoryWatch(side)
    for part in ("stage1", "stage1", "decode"):
        side.part = part
        watch._look(0.0, keep=True)
    assert watch.device == {"stage1": {"allocated": 3.0}, "decode": {"allocated": 2.0}}


def test_a_rival_that_is_not_there_ends_the_run():
    class Missing(FakeSide):
        def start(self) -> dict[str, float]:
            raise MissingRivalError("give --comfyui-url")

    sides = [FakeSide("ours"), Missing("theirs")]
    with pytest.raises(MissingRivalError, match="give --comfyui-url"):
        compare(sides)
    assert all(side.closed for side in sides)


def test_the_first_side_must_make_the_references_picture():
    wrong = FakeSide("plain", draw=lambda asked: picture(99))
    with pytest.raises(SideError, match="another picture"):
        compare([FakeSide("ours")], reference=wrong)
    right = FakeSide("plain")
    found = compare([FakeSide("ours")], reference=right)
    assert found["pictures"]["ours / plain"][0]["identical"]
    assert right.closed


def test_a_first_side_that_is_wrong_ends_the_run():
    with pytest.raises(SideError, match="it is broken"):
        compare([FakeSide("ours", problem="it is broken"), FakeSide("theirs")])


def test_one_side_alone_must_make_the_same_picture_twice():
    pictures = iter(range(9))
    with pytest.raises(SideError, match="made another picture"):
        compare([FakeSide("ours", draw=lambda asked: picture(next(pictures)))])


def test_what_was_measured_before_the_end_is_kept_and_every_side_is_closed(tmp_path: Path):
    def interrupt(number: int) -> float:
        if number == 3:
            raise KeyboardInterrupt
        return 1.0

    sides = [FakeSide("ours"), FakeSide("theirs", interrupt)]
    with pytest.raises(KeyboardInterrupt):
        compare(sides, tmp_path / "r.json")
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["partial"] is True
    assert kept["sides"]["theirs"]["times"]["total"]["runs"] == 1
    assert kept["ratios"]["ours / theirs"]["total"]["pairs"] == 1
    assert all(side.closed for side in sides)


def test_best_sides_of_two_programs_are_compared_with_each_other():
    ours = [FakeSide("ours"), FakeSide("ours, compiled", lambda n: 1.0, best=True)]
    theirs = [FakeSide("theirs"), FakeSide("theirs, compiled", lambda n: 2.0, best=True)]
    sides = ours + theirs
    found = compare(sides)
    assert found["ratios"]["ours, compiled / theirs, compiled"]["total"]["median"] == 0.5


@pytest.mark.parametrize(("rates", "shares"), [((2.0, 4.0), {"total": 0.25}), ((0.5, 0.5), None)])
def test_the_faster_limit_counts_and_one_that_is_exceeded_is_withheld(
    rates: tuple[float, float], shares: dict[str, float] | None
):
    measured = iter(rates)
    found = compare(
        [FakeSide("ours")],
        arithmetic=lambda asked, made: {"total": 1e12},
        limit=lambda: {"tflop_per_s": next(measured)},
    )
    assert found["sides"]["ours"].get("share_of_limit") == shares
    assert ("withheld" in found["limit"]) == (shares is None)


def test_a_side_of_another_dtype_has_no_share_of_the_limit(monkeypatch: pytest.MonkeyPatch):
    sides = [FakeSide("ours"), FakeSide("theirs"), FakeSide("lower", lambda n: 0.1)]
    for side, dtype in zip(sides, ({"dtype": "float32"}, {}, {"dtype": "bfloat16"})):
        monkeypatch.setattr(side, "settings", partial(dict, dtype))
    found = compare(
        sides,
        arithmetic=lambda asked, made: {"total": 1e12},
        limit=lambda: {"tflop_per_s": 2.0},
    )
    shares = {name: side.get("share_of_limit") for name, side in found["sides"].items()}
    assert shares == {"ours": {"total": 0.5}, "theirs": {"total": 0.5}, "lower": None}
    assert found["sides"]["lower"]["tflop"] == {"total": 1.0}
    assert "withheld" not in found["limit"]


# ---------------------------------------------------------------- an earlier run as a side


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    path = tmp_path / "earlier.json"
    compare([FakeSide("ours", lambda number: 2.0)], path)
    return path


def recorded(path: Path, header: dict[str, Any] = HEADER, rounds: int = 3) -> RecordedSide:
    return RecordedSide(path, header, rounds, {request(n).prompt: n for n in range(rounds + 1)})


def test_an_earlier_run_is_compared_round_by_round(earlier: Path):
    found = compare([FakeSide("now"), recorded(earlier)])  # type: ignore[list-item]
    assert found["ratios"]["now / ours, recorded"]["total"] == {
        "median": 0.5, "p20": 0.5, "p80": 0.5, "pairs": 3,
    }  # fmt: skip
    assert found["pictures"]["ours, recorded / now"][-1]["identical"]
    assert "first picture" in found["sides"]["now"]["start"]
    assert "first picture" not in found["sides"]["ours, recorded"]["start"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"machine": {"id": "m2"}}, "on another machine"),
        ({"configuration": {**CONFIGURATION, "seed": 6}}, "another seed in .*: 5 there, 6 here"),
        ({"configuration": {**CONFIGURATION, "plan": {"x": 1}}}, "another plan"),
        ({"machine": {**MACHINE, "threads": 8}}, "another threads in its machine: 2 there"),
    ],
)
def test_an_earlier_run_of_something_else_is_refused(
    earlier: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ResultsFileError, match=message):
        recorded(earlier, {**HEADER, **changes})


def test_a_damaged_earlier_run_is_refused_in_one_line(tmp_path: Path):
    path = tmp_path / "damaged.json"
    cases: list[dict[str, Any]] = [{"sides": []}, {"sides": {"a": {"times": {"total": [1]}}}}]
    for broken in cases:
        path.write_text(json.dumps({**HEADER, **broken}))
        with pytest.raises(ResultsFileError, match="damaged"):
            recorded(path)


def test_an_earlier_run_with_too_few_rounds_or_without_its_pictures_is_refused(earlier: Path):
    with pytest.raises(ResultsFileError, match="holds 3 rounds, wanted are 4"):
        recorded(earlier, rounds=4)
    for kept in earlier.with_name("earlier-pictures").iterdir():
        kept.unlink()
    with pytest.raises(ResultsFileError, match="earlier"):
        recorded(earlier)
