"""``bench quality`` with a tiny model and small stages: what it compares, checks and keeps."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench import quality
from bench.picture_grid import WIDTH, Cell, Row, draw_grid
from bench.pictures import compare_pictures, load_picture, shown, shown_difference
from bench.quality import choose_options, read_prompts, table, title
from bench.quality_study import (
    OPTIONS,
    Study,
    _shares,
    with_easycache,
    without_easycache,
    without_middle_stages,
)
from bench.results import read_results
from tools.judging import judge_one
from tools.scenes import held_out_prompts
from turbo.engine import Engine
from turbo.errors import BadInputError
from turbo.plan import DEFAULT_PLAN, EasyCache, Plan, Stage, dump_plan
from turbo.testing import make_tiny_model

STAGES = (
    Stage(name="small", height=32, width=32, steps=2, cfg=2.0),
    Stage(
        name="large",
        height=64,
        width=48,
        steps=6,
        denoise=0.9,
        seed_offset=1,
        easycache=EasyCache(threshold=0.5, start=0.0, end=1.0),
    ),
)
PLAN = Plan(stages=STAGES)
OPTIONS_RUN = "easycache,float16"


def write_plan(path: Path, plan: Plan = PLAN) -> Path:
    path.write_text(dump_plan(plan), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quality")
    make_tiny_model(made / "model")
    write_plan(made / "plan.yaml")
    return made


def run(folder: Path, output: Path, *more: str) -> dict[str, Any]:
    model, plan = str(folder / "model"), str(folder / "plan.yaml")
    command = ["--model", model, "--plan", plan, "--device", "cpu", "--options", OPTIONS_RUN]
    assert quality.main([*command, "-o", str(output), *more]) == 0
    return read_results(output, ["quality"])


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run(folder, folder / "one.json", "--prompts", "2", "--grid", str(folder / "grid.png"))


def figures(value: Any) -> Any:
    """Without what a clock says and what the run was called."""
    changing = {"seconds", "exact_seconds", "time_ratio", "machine", "command", "file"}
    if isinstance(value, dict):
        return {name: figures(inner) for name, inner in value.items() if name not in changing}
    return [figures(inner) for inner in value] if isinstance(value, list) else value


def test_the_same_command_gives_the_same_figures(folder: Path, results: dict[str, Any]):
    assert figures(run(folder, folder / "two.json", "--prompts", "2")) == figures(results)


def test_a_run_to_the_end_is_whole_and_says_what_it_was(results: dict[str, Any]):
    assert results["partial"] is False
    assert results["exact"]["check"] == {"repeated": 4, "identical": 4}
    assert results["configuration"]["model"]["name"] == "model"
    assert results["configuration"]["dtype"] == "float32"
    assert "/" not in "".join(results["command"])
    assert len(results["configuration"]["prompts"]) == 2


def test_easycache_leaves_the_stage_without_it_alone_and_changes_the_other(
    results: dict[str, Any],
):
    option = results["options"]["easycache"]
    small, large = option["stages"]["small"], option["stages"]["large"]
    assert option["skips"]["small"][0] == 0 < option["skips"]["large"][0]
    assert small["identical"] == 2
    assert small["psnr_db"]["median"] is None
    assert 0 < large["latent_l2"]["median"] < results["another_seed"]["stages"]["large"][
        "latent_l2"
    ]["median"]  # fmt: skip
    assert 0 < large["of_another_seed"]["latent_l2"]["median"] < 1
    assert option["time_ratio"]["pairs"] == results["another_seed"]["time_ratio"]["pairs"] == 2


def test_figures_are_those_of_the_pictures_beside_the_results(
    folder: Path, results: dict[str, Any]
):
    pictures = results["options"]["easycache"]["pictures"]
    for number, entry in enumerate(pictures):
        exact = load_picture(folder / "one.json", results["exact"]["pictures"][number])
        found = compare_pictures(load_picture(folder / "one.json", entry), exact)
        assert found.items() <= entry["stages"]["large"].items()


def test_pictures_are_those_of_the_engine_with_the_option(folder: Path, results: dict[str, Any]):
    engine = Engine.from_pretrained(folder / "model", plan=PLAN, device="cpu", dtype="float32")
    prompt = results["configuration"]["prompts"][0]
    plans = {"exact": without_easycache(PLAN), "easycache": PLAN}
    for name, plan in plans.items():
        found = results["exact"] if name == "exact" else results["options"][name]
        kept = load_picture(folder / "one.json", found["pictures"][0])
        assert engine.generate(prompt, seed=42, plan=plan).image.tobytes() == kept.tobytes()


def test_the_table_has_a_line_for_every_option_and_stage(results: dict[str, Any]):
    lines = list(table(results))
    assert [line.split()[0] for line in lines[1:-1:2]] == ["easycache", "float16", "another"]
    assert [line.split()[0] for line in lines[2:-1:2]] == ["large"] * 3
    assert "nothing here is about Z-Image" not in title(results)


def test_left_out_stages_are_compared_where_both_have_them(folder: Path, tmp_path: Path):
    more = ("--prompts", "1", "--options", "last stage alone")
    entry = run(folder, tmp_path / "r.json", *more)["options"]["last stage alone"]
    assert [*entry["stages"]] == ["large"]
    assert entry["settings"]["easycache"] == {}
    engine = Engine.from_pretrained(folder / "model", device="cpu", dtype="float32")
    prompt = read_prompts(None, 1)[0]
    alone = replace(STAGES[1], denoise=1.0, cfg=2.0, easycache=None)
    made = engine.generate(prompt, seed=42, plan=Plan(stages=(alone,))).image
    assert load_picture(tmp_path / "r.json", entry["pictures"][0]).tobytes() == made.tobytes()


def test_plans_without_a_middle_stage_keep_the_first_and_the_last():
    made = without_middle_stages(DEFAULT_PLAN)
    assert [stage.name for stage in made.stages] == ["stage1", "stage3"]
    assert without_middle_stages(PLAN) == without_easycache(PLAN)


def test_pictures_are_judged_by_what_the_prompts_say(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ("--prompts", "2", "--options", "easycache", "--judge")
    data = run(folder, tmp_path / "r.json", *more)
    prompts = held_out_prompts(2)
    assert data["configuration"]["prompts"] == [prompt for prompt, _ in prompts]
    for name in ("exact", "easycache", "another seed"):
        found = data["options"].get(name) or data[name.replace(" ", "_")]
        for (_, scene), one in zip(prompts, found["pictures"]):
            picture = np.asarray(load_picture(tmp_path / "r.json", one))
            verdict = judge_one(picture, scene)
            assert one["judged"] == asdict(verdict) | {"whole": verdict.whole}
        shares = [one["judged"]["background"] for one in found["pictures"]]
        assert found["judged"]["background"] == sum(shares) / 2
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [line[0] for line in lines] == ["as", "exact", "easycache", "another"]


def test_a_judge_and_prompts_of_ones_own_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert quality.main(["--judge", "--prompts-file", str(tmp_path / "p.txt")]) == 2
    assert "--judge has prompts of its own" in capsys.readouterr().err


def test_the_grid_has_a_row_for_each_prompt(folder: Path, results: dict[str, Any]):
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 4 * WIDTH
        assert grid.height > 2 * 2 * 256  # of 64 x 48 pixels, 192 wide


def test_the_built_in_model_is_judged_and_said_to_paint_simple_scenes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = write_plan(folder / "one.yaml", Plan(stages=(replace(STAGES[1], denoise=1.0),)))
    command = ["--plan", str(plan), "--prompts", "1", "--options", "easycache", "--device", "cpu"]
    assert quality.main([*command, "-o", str(tmp_path / "r.json")]) == 0
    out = capsys.readouterr().out
    assert "trained to paint simple scenes alone, so nothing here is about Z-Image itself" in out
    assert "as the prompt says" in out
    data = read_results(tmp_path / "r.json", ["quality"])
    model = data["configuration"]["model"]
    assert (model["built_in"], model.pop("paints")) == (True, "scenes")
    assert data["configuration"]["prompts"] == [prompt for prompt, _ in held_out_prompts(1)]
    assert "of random weights, so nothing here is about Z-Image itself" in title(data)  # an old one
    own = tmp_path / "prompts.txt"
    own.write_text("a cat\n")
    square = write_plan(folder / "square.yaml", Plan(stages=(replace(STAGES[0], denoise=1.0),)))
    other = ["--plan", str(square), "--options", "float16"]
    for more in (["--no-judge"], ["--prompts-file", str(own)], other):
        assert quality.main([*command, *more]) == 0
        assert "as the prompt says" not in capsys.readouterr().out


def test_an_option_that_changes_nothing_is_identical(folder: Path, tmp_path: Path):
    never = replace(STAGES[1], easycache=EasyCache(threshold=0.0))
    plan = write_plan(tmp_path / "plan.yaml", replace(PLAN, stages=(STAGES[0], never)))
    data = run(folder, tmp_path / "r.json", "--plan", str(plan), "--prompts", "1")
    entry = data["options"]["easycache"]["pictures"][0]
    assert entry["skips"]["large"][0] == 0
    assert entry["stages"]["large"]["identical"] is True
    assert entry["stages"]["large"]["of_another_seed"] == {"rmse": 0, "ssim": 0, "latent_l2": 0}


def test_an_option_whose_picture_is_not_finite_is_withheld_and_the_others_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = make_tiny_model(tmp_path / "model", dtype="float32")
    (file,) = model.glob("**/diffusion_models/*.safetensors")
    weights = load_file(file)
    weights["x_embedder.bias"][0] = 1e5  # more than float16 can hold
    save_file(weights, file)
    data = run(folder, tmp_path / "r.json", "--model", str(model), "--prompts", "1")
    assert "not finite in float16" in data["options"]["float16"]["withheld"]
    assert "pictures" not in data["options"]["float16"]
    assert data["options"]["easycache"]["stages"]["large"]["ssim"]["median"] < 1
    assert "float16         no figures: NonFiniteLatentError" in capsys.readouterr().out


def test_nothing_is_measured_by_an_exact_run_that_is_not_repeatable(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    load = Engine.from_pretrained

    def restless(*inputs: Any, **options: Any) -> Engine:
        engine = load(*inputs, **options)
        network, generator = engine.models.network, torch.Generator().manual_seed(0)

        def noisy(latent: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = network(latent, *more)
            return output + 0.1 * torch.randn(output.shape, generator=generator)

        engine.models.network = noisy
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", restless)
    command = ["--model", str(folder / "model"), "--plan", str(folder / "plan.yaml")]
    output = tmp_path / "r.json"
    assert quality.main([*command, "--options", "easycache", "-o", str(output)]) == 1
    assert "repeated, gave another picture" in capsys.readouterr().err
    data = json.loads(output.read_text())
    assert "gave another picture" in data["options"]["easycache"]["withheld"]
    assert data["error"]["type"] == "FailedCheckError"
    assert data["partial"] is True


def test_two_models_are_in_memory_at_most(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    load, loaded, alive = Engine.from_pretrained, weakref.WeakSet[Any](), []

    def counted(*inputs: Any, **options: Any) -> Engine:
        gc.collect()
        alive.append(len(loaded))
        engine = load(*inputs, **options)
        loaded.add(engine.models.transformer)
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", counted)
    run(folder, tmp_path / "r.json", "--prompts", "1", "--options", "float16,bfloat16")
    assert alive == [0, 1, 1]  # beside the one being loaded


def test_an_interrupted_run_keeps_the_prompts_that_were_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = Study.run

    def stop_at_the_second(study: Study) -> Iterator[None]:
        yield next(whole(study))
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "run", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "r.json", "--prompts", "3")
    data = read_results(tmp_path / "r.json", ["quality"])
    assert data["partial"] is True
    assert data["error"]["type"] == "KeyboardInterrupt"
    assert len(data["options"]["easycache"]["pictures"]) == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--options", "fp4"], "no option 'fp4'; there are easycache, easycache x0.5"),
        (["--options", ""], "no option ''"),
        (["--options", "bfloat16", "--dtype", "bfloat16"], "bfloat16 is the exact run itself"),
        (["--prompts", "0"], "--prompts must be at least 1, got 0"),
        (["--prompts", "1000"], "the judge has 300; ask for fewer"),
        (["--prompts", "1000", "--no-judge"], "ask for fewer, or give more in a --prompts-file"),
        (["--prompts", "many"], "invalid int value"),
        (["--prompts-file", "none.txt"], "none.txt: cannot be read: No such file"),
        (["--prompts-file", "{empty}"], "holds no prompt"),
        (["--prompts-file", "{binary}"], "is no UTF-8 text file"),
        (["--model", "nowhere"], "nowhere"),
        (["--plan", "nowhere.yaml"], "nowhere.yaml"),
        (["--seed", "-1"], "seed"),
        (["--device", "cuda:99"], "cuda:99 is not there"),
        (["--dtype", "float8"], "dtype must be"),
        (["--grid", "grid.jpg"], "--grid must end in .png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], message: str
):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    files = {name: str(tmp_path / f"{name}.txt") for name in ("empty", "binary")}
    try:
        code = quality.main([part.format(**files) for part in command])
    except SystemExit as stopped:  # argparse's own
        code = int(str(stopped.code))
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_thresholds_are_scaled_and_the_rest_of_the_plan_is_kept():
    scaled = with_easycache(0.5)(DEFAULT_PLAN)
    assert [stage.easycache and stage.easycache.threshold for stage in scaled.stages] == [
        None,
        0.185,
        0.06,
    ]
    assert without_easycache(scaled) == without_easycache(DEFAULT_PLAN)
    assert with_easycache()(DEFAULT_PLAN) == DEFAULT_PLAN


def test_all_options_are_compared_but_those_that_are_the_exact_run():
    names = [option.name for option in OPTIONS]
    on_cpu = [option.name for option in choose_options(None, DEFAULT_PLAN, "float32")]
    assert on_cpu == names
    plain = without_easycache(DEFAULT_PLAN)
    same = {"easycache", "easycache x0.5", "easycache x2", "bfloat16"}
    chosen = [option.name for option in choose_options(None, plain, "bfloat16")]
    assert chosen == [name for name in names if name not in same]
    with pytest.raises(BadInputError, match="the plan has no EasyCache"):
        choose_options("easycache", plain, "float32")


def test_only_compiling_keeps_the_picture_but_for_rounding():
    assert [option.name for option in OPTIONS if not option.approximate] == ["compile"]


def test_there_are_a_few_dozen_different_prompts():
    prompts = read_prompts(None, 24)
    assert len(set(prompts)) == 24
    assert not any(prompt.startswith("#") for prompt in prompts)


def test_a_prompts_file_is_read_line_by_line(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n  a  cat \n\n一只猫\n", encoding="utf-8")
    assert read_prompts(file, None) == ["a cat", "一只猫"]
    assert read_prompts(file, 1) == ["a cat"]


def test_a_distance_is_a_share_of_another_seeds():
    ours = {"psnr_db": 40.0, "ssim": 0.9, "latent_l2": 0.1}
    other = {"psnr_db": 20.0, "ssim": 0.5, "latent_l2": 0.8}
    assert _shares(ours, other) == pytest.approx({"rmse": 0.1, "ssim": 0.2, "latent_l2": 0.125})
    assert _shares(other, other) == {"rmse": 1.0, "ssim": 1.0, "latent_l2": 1.0}


def test_a_shown_difference_is_the_mean_difference_eight_times_as_large():
    size = (2 * WIDTH, 2 * WIDTH)
    ours, theirs = (Image.new("RGB", size, (value, 100, 0)) for value in (110, 100))
    assert shown_difference(ours, theirs, WIDTH).getcolors() == [(WIDTH * WIDTH, (80, 0, 0))]


def test_the_grid_shows_a_reason_where_there_is_no_picture():
    picture = shown(Image.new("RGB", (48, 64), (200, 0, 0)), WIDTH)
    row = Row("a prompt", [Cell(picture), Cell(None, note="withheld: not finite")])
    grid = draw_grid("title", ["exact", "float16"], [row])
    colours = {colour for _, colour in grid.getcolors(1 << 20) or []}
    assert {(200, 0, 0), (225, 225, 225)} <= colours
