"""``bench report``: what the page says, that it cannot be made to run or fetch anything, charts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.report import main
from bench.reporting.charts import part_colours, thinned, ticks
from bench.reporting.files import ResultsFile, newest_of_each
from bench.reporting.ladder import ladders, rung_ratio, switches
from bench.reporting.markup import TIMES, anchor, milliseconds, tag
from bench.reporting.page import headline, make_page, style_sheet
from bench.reporting.png import COLOURS
from bench.table import lines_of
from tests.bench import samples

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'</style>"


class Page(HTMLParser):
    """A page's elements, its text, and what it asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, given in self.elements if (value := given.get(name)) is not None]


def read(path: Path) -> ResultsFile:
    return ResultsFile.read(path)


def page_of(*paths: Path) -> Page:
    return Page(make_page([read(path) for path in paths]))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return samples.write_all(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def page(everything: list[Path]) -> Page:
    return page_of(*everything)


# What the page says.


def test_every_kind_of_file_has_its_section(page: Page):
    titles = [
        "Seconds by stage", "Share of the device's limit", "The ladder of optimisations",
        "Single network calls", "Start", "Memory", "Latency under load",
        "Quality of approximate options", "History over commits", "Pictures",
        "Raw figures and commands",
    ]  # fmt: skip
    assert [given.get("id") for name, given in page.elements if name == "section"] == [
        anchor(title) for title in titles
    ]
    assert page.attributes("href") == [f"#{anchor(title)}" for title in titles]


def test_sections_without_data_are_left_out(tmp_path: Path):
    page = page_of(samples.write(tmp_path, "load.json", samples.load()))
    assert [given.get("id") for name, given in page.elements if name == "section"] == [
        "latency-under-load",
        "raw-figures-and-commands",
    ]


def test_the_page_names_machine_versions_commit_and_command(page: Page):
    for expected in (
        "Sample Processor (invented)", "Sample GPU (invented)", "Power limit 700.00 W",
        "cccccccccccc-dirty", "torch 2.13.0", "model sample-512 (f00dfeed)",
        "python -m bench compare --rounds 5 -o compare.json",
    ):  # fmt: skip
        assert expected in page.text


def test_the_page_says_what_is_partial_or_withheld_and_why(tmp_path: Path):
    data = samples.compare(tmp_path, pictures=False)
    data |= {"partial": True, "error": {"type": "KeyboardInterrupt", "message": "stopped"}}
    text = page_of(samples.write(tmp_path, "compare.json", data)).text
    assert "compare.json, partial: the run ended before its last part" in text
    assert "ended early: KeyboardInterrupt: stopped" in text
    assert "turbo, int8: no figures, because SideError: relative distance 0.31" in text


def test_a_withheld_side_has_no_bar(page: Page):
    spoken = [label for label in page.attributes("aria-label") if "int8" in label]
    assert spoken == []


def test_bars_carry_the_medians_of_the_file(tmp_path: Path):
    path = samples.write(tmp_path, "compare.json", samples.compare(tmp_path, pictures=False))
    sides = read(path).data["sides"]
    spoken = "\n".join(page_of(path).attributes("aria-label"))
    for name in ("turbo", "diffusers, compiled"):
        total = milliseconds(sides[name]["times"]["total"]["median_ms"])
        stage3 = milliseconds(sides[name]["times"]["stage3"]["median_ms"])
        assert re.search(rf"^{name}: total {total}; .*stage3 {stage3}, ", spoken, re.M)


def test_segments_of_a_bar_lie_end_to_end(tmp_path: Path):
    path = samples.write(tmp_path, "run.json", samples.run("abc", "2026-11-20T10:00:00+00:00", 1))
    made = page_of(path)
    rects = [given for name, given in made.elements if name == "rect" and "x" in given][:6]
    starts = [float(str(given["x"]).rstrip("%")) for given in rects]
    widths = [float(str(given["width"]).rstrip("%")) for given in rects]
    ends = [start + width for start, width in zip(starts, widths)]
    assert starts[1:] == pytest.approx(ends[:-1], abs=0.01)
    assert ends[-1] == pytest.approx(100, abs=0.01)


def test_separately_timed_upscaling_is_no_piece_of_the_total(tmp_path: Path):
    path = samples.write(tmp_path, "run.json", samples.run("abc", "2026-11-20T10:00:00+00:00", 1))
    assert [*read(path).measured[0].parts_ms] == [*samples.PARTS, "other"]


def test_what_a_total_includes_beyond_the_others_is_said(tmp_path: Path):
    data = samples.compare(tmp_path, pictures=False)
    data["sides"]["diffusers"]["settings"]["total_includes"] = ["coding the PNG", "its transfer"]
    page = make_page([read(samples.write(tmp_path, "c.json", data))])
    sentence = "The total of diffusers includes coding the PNG and its transfer"
    assert page.count(sentence) == 1
    assert any("total includes coding the PNG" in line for line in lines_of(data))


def test_the_headline_compares_like_with_like(tmp_path: Path):
    path = samples.write(tmp_path, "compare.json", samples.compare(tmp_path, pictures=False))
    file = read(path)
    found = file.data["ratios"]["turbo, compiled / diffusers, compiled"]["total"]["median"]
    said = Page(str(headline([file]))).text
    assert said.startswith("turbo, compiled makes a picture in")
    assert f"{found:.2f} of the time that diffusers, compiled takes" in said


def test_the_ladder_has_switches_marks_and_ratios_of_the_rounds(tmp_path: Path):
    file = read(samples.write(tmp_path, "compare.json", samples.compare(tmp_path, pictures=False)))
    rungs = ladders(file)[0]
    assert [rung.name for rung in rungs] == ["turbo", "turbo, compiled", "turbo, EasyCache"]
    assert switches(rungs[2], rungs[1]) == ["easycache: stage1, stage3"]
    pairs = zip(*(rung.times["total"]["all_ms"] for rung in (rungs[1], rungs[0])))
    quotients = sorted(ours / theirs for ours, theirs in pairs)
    found = rung_ratio(file, rungs[1], rungs[0])
    assert found is not None
    assert found["median"] == pytest.approx(quotients[2])


def test_a_rung_with_other_rounds_than_the_first_has_no_ratio(tmp_path: Path):
    data = samples.compare(tmp_path, pictures=False)
    data["sides"]["turbo, compiled"]["times"]["total"]["all_ms"].pop()
    rungs = ladders(file := read(samples.write(tmp_path, "compare.json", data)))[0]
    assert rung_ratio(file, rungs[1], rungs[0]) is None


def test_memory_is_drawn_with_the_parts_that_have_a_name(tmp_path: Path):
    made = page_of(
        samples.write(tmp_path, "c.json", samples.compare(tmp_path, pictures=False, gpu=True))
    )
    bands = [given for name, given in made.elements if given.get("class") == "band"]
    assert len(bands) == len(samples.SECONDS) * len(samples.PARTS)
    assert "turbo stage3 2.2 14.8" in made.text  # side, part, highest host, highest device


def history_of(folder: Path, *runs: dict[str, Any]) -> Page:
    return page_of(*(samples.write(folder, f"{at}.json", run) for at, run in enumerate(runs)))


def test_the_history_never_joins_two_machines(tmp_path: Path):
    here = [samples.run(f"{at}" * 12, f"2026-11-1{at}T10:00:00+00:00", 1.0) for at in (1, 2)]
    there = samples.run("3" * 12, "2026-11-13T10:00:00+00:00", 0.5, id="0ther0000000")
    spoken = history_of(tmp_path, *here, there).attributes("aria-label")
    assert "totals of turbo over 2 files" in spoken
    assert not any("over 3 files" in label or "over 1 files" in label for label in spoken)


def test_the_history_never_joins_two_configurations(tmp_path: Path):
    runs = [samples.run(f"{at}" * 12, f"2026-11-1{at}T10:00:00+00:00", 1.0) for at in (1, 2)]
    runs[1]["configuration"]["dtype"] = "bfloat16"
    assert "History" not in history_of(tmp_path, *runs).text


def test_the_history_is_in_the_order_of_time(tmp_path: Path):
    runs = [samples.run(f"{at}" * 12, f"2026-11-1{at}T10:00:00+00:00", 1.0) for at in (3, 1, 2)]
    axis = history_of(tmp_path, *runs).text.partition("History over commits The")[0]
    assert re.search(r"1111111 2222222 3333333", history_of(tmp_path, *runs).text), axis


def test_only_the_newest_of_like_files_has_charts_of_its_own(tmp_path: Path):
    runs = [samples.run(f"{at}" * 12, f"2026-11-1{at}T10:00:00+00:00", 1.0) for at in (1, 3, 2)]
    runs[1]["partial"] = True
    files = [read(samples.write(tmp_path, f"{at}.json", run)) for at, run in enumerate(runs)]
    assert [file.name for file in newest_of_each(files)] == ["2.json"]  # 1.json is partial


def test_requests_without_an_answer_are_the_slowest_under_load(tmp_path: Path):
    data = samples.load()
    data["requests"] = [[0.0, 0.0, 100.0, True], [0.1, 0.0, 9e9, False], [0.2, 50.0, 300.0, True]]
    text = page_of(samples.write(tmp_path, "load.json", data)).text
    assert "latency 300 ms no answer no answer no answer no answer no answer" in text
    assert "2 requests failed: HTTP 500: out of memory" in text


def test_withheld_load_and_quality_figures_are_said_to_be_missing(tmp_path: Path):
    data = samples.load()
    for name in ("latency", "queue", "service"):
        data[name] = {"withheld": "CheckError: another picture"}
    del data["requests"]
    quality = samples.quality(tmp_path)
    quality["another_seed"] = {"withheld": "FailedCheckError: not repeatable"}
    paths = [samples.write(tmp_path, "l.json", data), samples.write(tmp_path, "q.json", quality)]
    text = page_of(*paths).text
    assert "l.json, latency: CheckError: another picture" in text
    assert "q.json, another_seed: FailedCheckError: not repeatable" in text


# Pictures.


def test_pictures_are_embedded_with_their_amplified_difference(tmp_path: Path):
    made = page_of(samples.write(tmp_path, "compare.json", samples.compare(tmp_path)))
    images = [given for name, given in made.elements if name == "img"]
    assert len(images) == 2 * (5 + 4)  # two rounds of five sides, four of them compared
    assert all(str(given["src"]).startswith("data:image/webp;base64,") for given in images)
    assert "PSNR 61.2 dB, SSIM 0.9998" in made.text
    assert f"{TIMES}8" in made.text


def test_a_difference_is_absolute_and_eight_times_as_large():
    from bench.reporting.gallery import Tile, _difference

    one = Image.new("RGB", (20, 20), (10, 100, 200))
    other = Image.new("RGB", (20, 20), (15, 97, 100))
    found = _difference(Tile("a", one), Tile("b", other))
    assert isinstance(found, Image.Image)
    assert found.getpixel((3, 3)) == (40, 24, 255)


def test_a_picture_outside_the_results_folder_is_not_shown(tmp_path: Path):
    inside = tmp_path / "results"
    inside.mkdir()
    data = samples.compare(inside)
    secret = samples.picture(tmp_path, "secret", 0, 0)
    data["sides"]["turbo"]["pictures"] = [{**secret, "file": "../pictures/secret.png"}]
    text = page_of(samples.write(inside, "compare.json", data)).text
    assert "lies outside the folder of the results" in text


def test_a_missing_or_changed_picture_is_said_to_be_so(tmp_path: Path):
    data = samples.compare(tmp_path)
    (tmp_path / data["sides"]["turbo"]["pictures"][0]["file"]).unlink()
    Image.new("RGB", (168, 216)).save(tmp_path / data["sides"]["diffusers"]["pictures"][1]["file"])
    text = page_of(samples.write(tmp_path, "compare.json", data)).text
    assert "cannot be read" in text
    assert "is not the one that was measured" in text


# Safety.


def poisoned(value: Any) -> Any:
    """The same with every text replaced, also the keys that a file chooses freely."""
    if isinstance(value, dict):
        return {key: poisoned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner) for inner in value]
    return EVIL if isinstance(value, str) else value


def poisoned_files(folder: Path) -> Iterator[Path]:
    for path in samples.write_all(folder):
        data = json.loads(path.read_text())
        kept = {key: data[key] for key in ("format", "kind")}
        data = poisoned(data) | kept
        for key in ("sides", "options", "errors", "cold_start", "parts"):
            if key in data:
                data[key] = {name + EVIL: inner for name, inner in data[key].items()}
        for side in data.get("sides", {}).values():
            for key in ("times", "network", "share_of_limit", "start", "settings"):
                own = {"total": side[key]["total"]} if key == "times" and key in side else {}
                named = {name + EVIL: inner for name, inner in side.get(key, {}).items()}
                side[key] = named | own
        yield samples.write(folder, path.name, data)


def test_no_text_of_a_file_becomes_part_of_the_page(tmp_path: Path, everything: list[Path]):
    made = page_of(*poisoned_files(tmp_path))
    assert EVIL in "".join(made.words)
    names = {name for name, _ in made.elements}
    assert names <= {name for name, _ in page_of(*everything).elements}
    assert "script" not in names
    handlers = [key for _, given in made.elements for key in given if key.startswith("on")]
    assert handlers == []
    assert made.open == []


def test_the_page_asks_for_nothing_and_allows_nothing(page: Page):
    assert all(source.startswith("data:") for source in page.attributes("src"))
    assert all(target.startswith("#") for target in page.attributes("href"))
    assert "url(" not in style_sheet()
    assert "@import" not in style_sheet()
    policy = [given for _, given in page.elements if "http-equiv" in given]
    assert str(policy[0]["content"]).startswith("default-src 'none'")


def test_text_is_escaped_and_markup_is_not():
    made = tag("p", "<b>", tag("i", "&"), title='"quoted"')
    assert made == '<p title="&#34;quoted&#34;">&lt;b&gt;<i>&amp;</i></p>'


# Colours and sizes.


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def themes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", style_sheet().partition("@media print")[0], re.S)
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for name, block in (("light", light), ("dark", dark))
    }


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read_on_what_is_behind_it(theme: str):
    colours = themes()[theme]
    pairs = [(text, ground) for text in ("text", "muted", "accent") for ground in ("back", "card")]
    pairs += [("warn", "warn-back")]
    pairs += [(name, name.removeprefix("on-")) for name in colours if name.startswith("on-")]
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert len(pairs) > 15
    assert {pair: found for pair, found in low.items() if found < 4.5} == {}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_stand_out_from_the_card(theme: str):
    colours = themes()[theme]
    low = {
        name: contrast(value, colours["card"])
        for name, value in colours.items()
        if name.startswith("series-")
    }
    assert {name: found for name, found in low.items() if found < 3} == {}


def test_both_themes_have_the_same_names_and_the_charts_use_the_light_ones():
    assert themes()["light"].keys() == themes()["dark"].keys()
    for name, (fill, ink) in COLOURS.items():
        assert (themes()["light"][name], themes()["light"][f"on-{name}"]) == (fill, ink)


def test_stages_beyond_the_colours_begin_again():
    found = part_colours(["prompt", *(f"s{at}" for at in range(6)), "decode"])
    assert (found["s0"], found["s5"], found["decode"]) == ("stage-1", "stage-1", "decode")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 67, [0, 20, 40, 60, 80]), (0, 0.9, [0, 0.25, 0.5, 0.75, 1.0]), (3, 3, [3, 4])],
)
def test_axes_have_round_values(low: float, high: float, expected: list[float]):
    assert ticks(high, low) == pytest.approx(expected)


def test_a_long_line_keeps_its_peak():
    points: list[tuple[float, float | None]] = [(float(at), 1.0) for at in range(5000)]
    points[3333] = (3333.0, 9.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert (3333.0, 9.0) in kept


# The command.


def test_the_command_writes_the_page_and_the_charts(everything: list[Path], tmp_path: Path):
    page, charts = tmp_path / "made" / "report.html", tmp_path / "charts"
    given = [*map(str, everything), "-o", str(page), "--charts", str(charts)]
    assert main(given) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(path.name for path in charts.iterdir()) == ["ladder.png", "stages.png"]
    for path in charts.iterdir():
        with Image.open(path) as image:
            assert image.width > 1200
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_chart_without_data_is_named_and_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = samples.write(tmp_path, "load.json", samples.load())
    assert main([str(path), "--charts", str(tmp_path / "charts")]) == 0
    assert "no stages.png: no run or compare file has figures" in capsys.readouterr().err
    assert [*(tmp_path / "charts").iterdir()] == []


def test_charts_of_long_names_have_room_for_their_bars(tmp_path: Path):
    # A layout without room is a warning, which the tests take for an error.
    assert main([*map(str, poisoned_files(tmp_path)), "--charts", str(tmp_path / "charts")]) == 0
    assert len([*(tmp_path / "charts").iterdir()]) == 2


def broken(folder: Path, **changes: Any) -> Path:
    return samples.write(folder, "broken.json", samples.compare(folder, pictures=False) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "turbo-bench/99"}, "this version reads"),
        ({"format": None}, "has no format entry"),
        ({"sides": []}, "sides must be an object"),
        ({"sides": {"a": {"times": {"total": {"median_ms": "fast"}}}}}, "must be a number"),
        ({"sides": {"a": {"times": {"total": {"median_ms": 1}}}}}, "with p20_ms and p80_ms"),
        ({"sides": {"a": {"memory": {"timeline": [[1, 2]]}}}}, "a list of 4 values"),
        ({"ratios": {"a / b": {"total": {"median": float("nan"), "p20": 1, "p80": 1}}}}, "number"),
        ({"partial": "no"}, "partial must be true or false"),
    ],
)
def test_a_file_that_does_not_follow_the_schema_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
):
    page = tmp_path / "report.html"
    assert main([str(broken(tmp_path, **changes)), "-o", str(page)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not page.exists()


def test_a_truncated_and_a_missing_file_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = samples.write(tmp_path, "load.json", samples.load())
    path.write_text(path.read_text()[:-100])
    for name in ("load.json", "none.json"):
        assert main([str(tmp_path / name), "-o", str(tmp_path / "report.html")]) == 2
    assert "no whole JSON file" in (said := capsys.readouterr().err)
    assert "no such file" in said


def test_nothing_to_write_is_bad_input(everything: list[Path]):
    with pytest.raises(SystemExit, match="2"):
        main([str(everything[0])])


def test_empty_values_leave_dashes_rather_than_errors(tmp_path: Path):
    data = samples.compare(tmp_path, pictures=False)
    for side in data["sides"].values():
        side |= {"network": {}, "memory": {"host_peak_gib": None, "device": {}, "timeline": []}}
        side |= {"share_of_limit": {}, "start": {}, "overhead_share": None}
    data["machine"] = {"id": "x", "commit": None, "time": None, "gpu": {"nvidia_smi": {"a": None}}}
    text = page_of(samples.write(tmp_path, "compare.json", data)).text
    assert "Seconds by stage" in text
    assert "Single network calls" not in text
    assert "not known" in text
