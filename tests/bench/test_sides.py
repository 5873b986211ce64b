"""turbo and diffusers as sides, on small models and stages."""

from __future__ import annotations

import json
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import compare, run
from bench.arithmetic import PictureArithmetic
from bench.cold_start import STEP, ColdStart
from bench.described import fingerprint
from bench.diffusers_modules import diffusers_network
from bench.diffusers_side import DiffusersSide
from bench.model import main as write_model
from bench.options import Subject
from bench.random_model import SMALL
from bench.side import Request, Round, SideError
from bench.turbo_side import LoadedModel, TurboSide
from turbo.acceleration import SpeedUps
from turbo.engine import Engine
from turbo.plan import DEFAULT_PLAN, Plan, dump_plan
from turbo.testing import make_tiny_model

EXACT = replace(
    SMALL.plan, stages=tuple(replace(stage, easycache=None) for stage in SMALL.plan.stages)
)
REQUEST = Request(prompt="a lighthouse", negative_prompt="blurry", seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("sides") / "model")


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return LoadedModel.load(model, device="cpu")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(SMALL.plan))
    return path


def turbo_side(loaded: LoadedModel, plan: Plan = EXACT, **speed_ups: Any) -> TurboSide:
    side = TurboSide("turbo", loaded, plan, SpeedUps(**speed_ups))
    side.start()
    return side


def paint(side: Any) -> Round:
    made: Round = side.paint(REQUEST)
    side.close()
    return made


def test_diffusers_pipeline_makes_turbos_picture(loaded: LoadedModel):
    theirs = DiffusersSide(loaded, EXACT)
    theirs.start()
    ours, other = paint(turbo_side(loaded)), paint(theirs)
    torch.testing.assert_close(ours.latents["stage3"], other.latents["stage3"], atol=1e-4, rtol=0)
    difference = np.abs(np.asarray(ours.image).astype(int) - np.asarray(other.image))
    assert difference.max() <= 1
    assert {"prompt", "stage1", "stage2", "stage3", "decode", "total"} <= set(other.seconds)
    assert [len(other.network_s[stage.name]) for stage in EXACT.stages] == [4, 4, 7]


def test_diffusers_shares_turbos_weights(loaded: LoadedModel):
    transformer = loaded.engine.models.transformer
    theirs = dict(diffusers_network(transformer).named_parameters())
    ours = transformer.native_tensors()["x_embedder.weight"]
    assert theirs["all_x_embedder.2-1.weight"].data_ptr() == ours.data_ptr()


def test_diffusers_gives_no_time_of_a_picture_beside_which_it_compiled(loaded: LoadedModel):
    longer = replace(REQUEST, prompt="a lighthouse " * 20)  # padded to another length
    one_stage = replace(EXACT, stages=EXACT.stages[:1])
    for warm_up in ([], [longer]):
        torch._dynamo.reset()  # what was compiled serves every side in this process
        side = DiffusersSide(loaded, one_stage, compiled=True, warm_up=warm_up, backend="eager")
        side.start()
        side.paint(REQUEST)
        side.paint(REQUEST)
        if warm_up:
            assert side.paint(longer).seconds["total"] > 0
        else:
            with pytest.raises(SideError, match="were compiled in a picture that was timed"):
                side.paint(longer)


def test_warming_up_asks_once_for_every_pair_of_lengths_that_the_first_picture_lacks(
    loaded: LoadedModel,
):
    prompt = "a lighthouse on a cliff at dawn, waves below"  # longer than 32 tokens
    while len(loaded.engine.models.tokenizer.encode_prompt(f"{prompt}, take 9")) % 32:
        prompt += "x"  # until one character more makes the padded length larger
    options = Namespace(prompt=prompt, negative="", seed=1, rounds=12)
    subject = Subject(options=options, loaded=loaded, plan=EXACT)
    assert [one.prompt for one in subject.warm_up_requests()] == [f"{prompt}, take 10"]
    assert len(subject.buckets()) == 3  # the negative prompt's, and two of the prompt
    options.rounds = 9
    assert subject.warm_up_requests() == []


def test_no_sampler_thread_outlives_a_picture_that_fails(loaded: LoadedModel):
    side = DiffusersSide(loaded, EXACT)
    side.start()
    before = set(threading.enumerate())

    def fail(*_: Any) -> None:
        raise ValueError("network broken")

    side._pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="network broken"):
        side.paint(REQUEST)
    started = set(threading.enumerate()) - before
    assert [one for one in started if one.name != "tqdm_monitor"] == []  # a progress bar's


def test_a_round_has_every_part_every_call_and_the_picture_of_the_engine(loaded: LoadedModel):
    made = paint(turbo_side(loaded, SMALL.plan))
    alone = loaded.engine.generate(
        "a lighthouse", negative_prompt="blurry", seed=3, plan=SMALL.plan
    )
    assert made.image.tobytes() == alone.image.tobytes()
    assert made.skips == alone.skips
    called = {name: len(seconds) for name, seconds in made.network_s.items()}
    assert called == {name: wanted - saved for name, (saved, wanted) in made.skips.items()}
    assert set(made.seconds) == {"prompt", "stage1", "stage2", "stage3", "decode", "total", "png"}
    parts = sum(made.seconds[part] for part in set(made.seconds) - {"total", "png"})
    assert parts <= made.seconds["total"]


def test_wrong_arithmetic_is_found_before_anything_is_timed(loaded: LoadedModel):
    side = turbo_side(loaded)
    assert side.check()["stage3"]["diffusers_distance_to_float32"] < 1e-5
    right = side._models.network
    side._models.network = lambda *inputs: right(*inputs) * 1.01
    with pytest.raises(SideError, match=r"a network call of stage1: check failed"):
        side.check()


def test_captured_sides_pass_the_same_check(loaded: LoadedModel):
    side = turbo_side(loaded, capture="replay")
    assert side.check()["stage2"]["distance_to_float32"] == 0
    assert paint(side).image.tobytes() == paint(turbo_side(loaded)).image.tobytes()


def test_skipped_calls_and_guidance_are_counted_as_they_are(loaded: LoadedModel):
    counting = PictureArithmetic(loaded.engine.models, SMALL.plan)
    skips = {"stage1": (0, 8), "stage2": (2, 4), "stage3": (0, 7)}
    found = counting.of("a", "b", skips)
    both_at_once = counting.of("a", "b", {**skips, "stage1": (0, 4)})
    assert both_at_once["stage1"] == found["stage1"]
    everything = counting.of("a", "b", {**skips, "stage2": (0, 4)})
    assert found["stage2"] == everything["stage2"] / 2
    assert found["total"] == sum(value for part, value in found.items() if part != "total")
    assert "total" not in counting.of("a", "b", {"stage1": (0, 8)})


def test_the_fingerprint_changes_with_the_weights(loaded: LoadedModel, model: Path):
    models = loaded.engine.models
    before = fingerprint(models)
    assert fingerprint(Engine.from_pretrained(model, device="cpu").models) == before
    token = models.transformer.x_pad_token
    kept = token.detach().clone()
    try:
        token.detach().add_(1)
        assert fingerprint(models) != before
    finally:
        token.detach().copy_(kept)


# ---------------------------------------------------------------- the commands


def test_run_keeps_a_whole_results_file(
    plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "run.json"
    code = run.main(["--plan", str(plan_file), "--rounds", "1", "-o", str(output)])
    kept = json.loads(output.read_text())
    side = kept["sides"]["turbo"]
    assert (code, kept["partial"], kept["format"]) == (0, False, "turbo-bench/1")
    assert side["check"]["repeated"]["identical"]
    assert side["times"]["upscale to stage2"]["median_ms"] > 0
    if "withheld" in kept["limit"]:  # as where something else kept the machine busy meanwhile
        assert "share_of_limit" not in side
    else:
        assert set(side["share_of_limit"]) == set(side["tflop"])
    assert kept["command"] == [
        "run", "--plan", "plan.yaml", "--rounds", "1", "-o", "run.json"
    ]  # fmt: skip
    assert "of the limit" in capsys.readouterr().out


def test_compare_with_a_file_of_its_own(plan_file: Path, tmp_path: Path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    common = ["--plan", str(plan_file), "--rounds", "1"]
    assert run.main([*common, "-o", str(first)]) == 0
    assert compare.main([*common, "--baseline", str(first), "-o", str(second)]) == 0
    kept = json.loads(second.read_text())
    assert kept["pictures"]["turbo, recorded / turbo"][-1]["identical"]
    assert kept["ratios"]["turbo / turbo, recorded"]["total"]["pairs"] == 1
    assert compare.main([*common, "--baseline", str(first), "--seed", "7"]) == 2


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("comfyui", "give --comfyui-url"),
        ("sdcpp", "give --sdcpp"),
        ("sglang", "give --sglang-url"),
        ("comfyui --comfyui-url http://127.0.0.1:9", "127.0.0.1:9"),
        ("sdcpp --sdcpp nowhere/sd", "nowhere"),
    ],
)
def test_a_rival_that_was_not_given_is_asked_for_in_one_line(
    baseline: str, message: str, capsys: pytest.CaptureFixture[str]
):
    assert compare.main(["--baseline", *baseline.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert all(": starting" in line or " runs with euler" in line for line in said[:-1])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rounds", "0"],
        ["--model", "nowhere"],
        ["--plan", "nowhere.yaml"],
        ["--device", "tpu"],
        ["--dtype", "int3"],
        ["--threads", "0"],
    ],
)
def test_bad_input_ends_with_code_2_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    try:
        code: Any = run.main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_unknown_sides_and_baselines_are_refused_with_the_known_ones(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        compare.main(["--baseline", "photoshop"])
    assert "must be one of comfyui, diffusers, sdcpp, sglang" in capsys.readouterr().err
    given = ["--plan", str(plan_file), "--baseline", "diffusers", "--only", "turbo", "gimp"]
    assert compare.main(given) == 2
    assert "there is no side 'gimp'; --only takes 'turbo', 'turbo, compiled'" in (
        capsys.readouterr().err
    )


def test_a_sampler_that_draws_noise_gives_way_to_euler_beside_other_programs(
    capsys: pytest.CaptureFixture[str],
):
    plan = DEFAULT_PLAN.single_stage()
    assert [stage.sampler for stage in plan.stages] == ["euler_ancestral"]
    found = compare.without_drawn_noise(plan)
    assert found == replace(plan, stages=(replace(plan.stages[0], sampler="euler"),))
    assert "stage1 runs with euler: euler_ancestral draws noise" in capsys.readouterr().err
    assert compare.without_drawn_noise(found) == found
    assert capsys.readouterr().err == ""


def test_the_fastest_settings_are_measured_in_a_lower_dtype_as_well(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compare, "_fastest", lambda subject: SpeedUps())  # compiles nothing here
    path, lower = tmp_path / "a.json", "turbo, compiled, bfloat16"
    given = ["--plan", str(plan_file), "--baseline", "diffusers", "--best-dtype", "bfloat16"]
    assert compare.main([*given, "--rounds", "1", "--only", lower, "-o", str(path)]) == 0
    kept = json.loads(path.read_text())
    assert [*kept["sides"]] == ["turbo", lower]
    side = kept["sides"][lower]
    assert (side["best"], side["approximate"]) == (True, True)
    assert side["settings"]["dtype"] == "bfloat16"
    assert kept["sides"]["turbo"]["settings"]["dtype"] == "float32"
    assert kept["ratios"][f"turbo / {lower}"]["total"]["pairs"] == 1
    assert not kept["pictures"][f"{lower} / turbo"][-1]["identical"]


def test_diffusers_names_a_dtype_that_the_others_do_not_have(model: Path):
    lower = LoadedModel.load(model, device="cpu", dtype=torch.bfloat16)
    side = DiffusersSide(lower, EXACT, compiled=True, approximate=True)
    assert (side.name, side.approximate) == ("diffusers, compiled, bfloat16", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "sdcpp"], "needs --baseline comfyui or diffusers, got sdcpp"),
        (["--baseline", "diffusers", "--dtype", "bfloat16"], "is what all sides calculate in"),
    ],
)
def test_a_lower_dtype_that_cannot_be_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert compare.main([*arguments, "--best-dtype", "bfloat16"]) == 2
    assert message in capsys.readouterr().err


def test_a_process_to_its_picture_is_timed(plan_file: Path):
    options = Namespace(
        device="cpu", dtype="auto", model=None, tokenizer=None, plan=str(plan_file), quantize="auto"
    )
    asked = Request(prompt="a red circle on a blue background", negative_prompt="b", seed=1)
    made = ColdStart(options, 600).paint(asked)
    assert made.seconds[STEP] > 0
    assert made.image.mode == "RGB"
    with pytest.raises(SideError, match=r"no picture within 0\.01 s; allow more with --timeout"):
        ColdStart(options, 0.01).paint(asked)
    options.plan = "nowhere.yaml"
    with pytest.raises(SideError, match=r"^failed: turbo: .*nowhere"):
        ColdStart(options, 600).paint(asked)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ["comfyui"]),
        ("--comfyui-best-flags=--fast", ["comfyui", "comfyui, fastest"]),
        ("--best-dtype=bfloat16", ["comfyui", "comfyui, fastest"]),
    ],
)
def test_comfyui_has_a_side_of_its_own_for_its_fastest_settings(
    flags: str, names: list[str], tmp_path: Path, plan_file: Path
):
    given = ["--baseline", "comfyui", "--comfyui-dir", str(tmp_path), *filter(None, [flags])]
    options = compare._parser().parse_args([*given, "--plan", str(plan_file), "--device", "cpu"])
    sides = compare._sides(Subject.load(options), given)
    rivals = [side for side in sides if side.name.startswith("comfyui")]
    assert [side.name for side in rivals] == names
    assert [(side.best, side.approximate) for side in rivals[1:]] == [(True, True)] * (
        len(names) - 1
    )
    if "dtype" in flags:
        assert [side.settings()["dtype"] for side in rivals] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--best-dtype bfloat16 --comfyui-command {port}", "--best-dtype needs --comfyui-dir"),
        (
            "--comfyui-best-flags=--fast --comfyui-url http://127.0.0.1:1",
            "is for a ComfyUI to start",
        ),
        ('--comfyui-flags=" --comfyui-dir x', "is no command line: No closing quotation"),
        ("--seed -1 --comfyui-dir x", "seed must be an integer from 0"),
    ],
)
def test_what_a_comparison_with_comfyui_cannot_do_is_refused(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
):
    given = ["--baseline", "comfyui", *arguments.split()]
    try:
        code = compare.main(given)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err


def test_weights_that_do_not_stay_in_memory_are_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan = tmp_path / "plan.yaml"
    plan.write_text("performance: {memory: balanced}\n")
    assert run.main(["--plan", str(plan), "--device", "cpu"]) == 2
    assert "memory 'balanced' moves it; give a plan with" in capsys.readouterr().err


def test_the_medium_model_is_written_in_both_layouts_with_equal_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for layout in ("comfyui", "diffusers"):
        folder = tmp_path / layout
        assert write_model([str(folder), "--size", "tiny", "--layout", layout]) == 0
    prints = [
        fingerprint(Engine.from_pretrained(tmp_path / layout, device="cpu").models)
        for layout in ("comfyui", "diffusers")
    ]
    assert prints[0] == prints[1]
    assert write_model([str(tmp_path / "comfyui"), "--size", "tiny"]) == 2
