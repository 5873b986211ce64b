"""The report page tells nothing of the folders of the machine that wrote it."""

from __future__ import annotations

import shutil
from pathlib import Path

from bench.report import main

RESULTS = Path(__file__).parents[2] / "bench" / "results"


def test_pictures_that_are_missing_are_named_without_their_folder(tmp_path: Path) -> None:
    for name in ("compare-comfyui-cpu.json", "compare-diffusers-cpu.json"):
        shutil.copyfile(RESULTS / name, tmp_path / name)
    page = tmp_path / "report.html"
    assert main([*map(str, tmp_path.glob("*.json")), "-o", str(page)]) == 0
    text = page.read_text()
    assert "cannot be read" in text
    assert str(tmp_path) not in text


def test_the_page_that_is_kept_names_no_folder_of_the_repository() -> None:
    assert str(RESULTS.parents[1]) not in (RESULTS / "report.html").read_text()
