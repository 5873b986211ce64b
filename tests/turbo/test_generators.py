from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import turbo
from tests.turbo.fake_comfyui import FakeComfyUI, fake_comfyui, play_end, play_steps, png
from turbo.comfyui_reader import plan_from_workflow
from turbo.comfyui_workflow import LoraUse, ModelNames
from turbo.errors import BackendError, BadInputError, CheckpointError, LoraError, PlanError
from turbo.generators import (
    ComfyUIImageGenerator,
    NativeImageGenerator,
    create_image_generator,
)
from turbo.plan import DEFAULT_PLAN, Plan, Stage, dump_plan
from turbo.testing import make_tiny_model

PLAN = Plan(
    stages=(
        Stage(name="stage1", height=64, width=48, steps=2, cfg=2.0),
        Stage(name="stage2", height=96, width=64, steps=2, denoise=0.6, seed_offset=1),
    )
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("generators") / "models")


@pytest.fixture(scope="module")
def generator(model) -> NativeImageGenerator:
    return NativeImageGenerator(model, device="cpu", torch_dtype="float32", plan=PLAN)


@pytest.fixture(scope="module")
def lora(generator, tmp_path_factory):
    """A LoRA that changes the tiny model's pictures a lot."""
    weight = generator.load().models.transformer.native_tensors()["layers.0.attention.out.weight"]
    rows, columns = weight.shape
    path = tmp_path_factory.mktemp("lora") / "wild.safetensors"
    name = "diffusion_model.layers.0.attention.out"
    factors = {
        f"{name}.lora_A.weight": torch.randn(2, columns, generator=torch.manual_seed(0)),
        f"{name}.lora_B.weight": torch.randn(rows, 2, generator=torch.manual_seed(1)),
    }
    save_file(factors, path)
    return path


@pytest.fixture
def fake() -> Iterator[FakeComfyUI]:
    with fake_comfyui() as server:
        server.picture = png(64, 96)
        yield server


# ---------------------------------------------------------------- native


def test_the_native_generator_gives_the_engines_picture(generator, model):
    engine = turbo.Engine.from_pretrained(model, device="cpu", dtype="float32", plan=PLAN)
    request: dict[str, Any] = {"negative_prompt": "blurry", "trigger_word": "sunway", "seed": 5}
    picture = generator.generate("a cat", **request)
    assert isinstance(picture, Image.Image)
    assert (picture.size, picture.mode) == ((64, 96), "RGB")
    assert picture.tobytes() == engine.generate("a cat", **request).image.tobytes()
    assert generator.last_seed == 5


def test_weights_are_loaded_by_the_first_picture_not_before(model):
    generator = NativeImageGenerator(model, device="cpu", plan=PLAN)
    assert generator._engine is None
    assert generator.load() is generator.load()


def test_speed_options_reach_the_engine(model, tmp_path, monkeypatch):
    given: dict[str, Any] = {
        "compile": False,
        "capture": "replay",
        "kernels": False,
        "cache_dir": str(tmp_path),
        "strict_speed": True,
    }
    seen: dict[str, Any] = {}
    monkeypatch.setattr(turbo.Engine, "from_pretrained", lambda path, **all: seen.update(all))
    NativeImageGenerator(model, **{**given, "cache_dir": tmp_path}).load()
    assert {name: seen[name] for name in given} == given
    NativeImageGenerator(model, cache_dir=None).load()
    assert (seen["cache_dir"], seen["compile"]) == (None, "auto")


def test_steps_and_guidance_are_those_of_the_first_stage(generator):
    steps = []
    generator.generate(
        "a cat",
        num_inference_steps=3,
        guidance_scale=1.0,
        seed=1,
        on_progress=lambda *step: steps.append(step),
    )
    assert steps[-4:] == [("stage1", 3, 3), ("stage2", 0, 2), ("stage2", 1, 2), ("stage2", 2, 2)]


def test_one_stage_has_the_last_size_and_the_given_steps(generator):
    steps = []
    picture = generator.generate(
        "a cat",
        num_inference_steps=3,
        progressive=False,
        on_progress=lambda *step: steps.append(step),
    )
    assert picture.size == (64, 96)
    assert steps == [("stage1", n, 3) for n in (0, 1, 2, 3)]
    assert generator.last_seed is not None


def test_a_lora_holds_for_one_picture(generator, lora):
    plain = generator.generate("a cat", seed=1).tobytes()
    changed = generator.generate("a cat", seed=1, lora_path=lora, lora_strength=2.0).tobytes()
    assert changed != plain
    assert generator.generate("a cat", seed=1).tobytes() == plain


def test_a_lora_without_a_strength_gets_the_plans(generator, lora):
    given = generator.generate("a cat", seed=1, lora_path=str(lora), lora_strength=0.8).tobytes()
    assert generator.generate("a cat", seed=1, lora_path=lora).tobytes() == given


def test_a_lora_is_taken_out_when_the_picture_fails(generator, lora):
    def fail(*_):
        raise KeyboardInterrupt

    weight = generator.load().models.transformer.native_tensors()["layers.0.attention.out.weight"]
    before = weight.clone()
    with pytest.raises(KeyboardInterrupt):
        generator.generate("a cat", lora_path=lora, lora_strength=2.0, on_progress=fail)
    assert generator.load().loras == ()
    assert torch.equal(weight, before)


def test_a_lora_that_does_not_exist_is_refused(generator):
    with pytest.raises(LoraError):
        generator.generate("a cat", lora_path="absent.safetensors")


@pytest.mark.parametrize("option", ["model_path", "vae_path", "clip_path", "tokenizer_path"])
def test_a_path_that_does_not_exist_is_refused_at_once(tmp_path, option):
    with pytest.raises(CheckpointError, match=f"{option} .*absent does not exist"):
        NativeImageGenerator(**{option: tmp_path / "absent"})


def test_a_plan_file_is_read_at_once(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(PLAN))
    assert NativeImageGenerator(plan=path).plan == PLAN
    path.write_text("generation: {stage1: {steps: -1}}")
    with pytest.raises(PlanError, match="steps"):
        ComfyUIImageGenerator(plan=path)


# ---------------------------------------------------------------- ComfyUI


def asked(fake: FakeComfyUI):
    """What the workflow that the server got says."""
    return plan_from_workflow(fake.posted[0][1]["prompt"])


def play_two_stages(fake: FakeComfyUI, prompt_id: str) -> None:
    play_steps(fake, prompt_id, "316", 2)
    play_steps(fake, prompt_id, "336", 1)  # a node that is no stage
    play_steps(fake, prompt_id, "276", 2)
    play_end(fake, prompt_id, node="210")


def test_the_servers_picture_comes_back_as_the_same_type(fake):
    fake.play = play_two_stages
    steps = []
    generator = ComfyUIImageGenerator(fake.url, plan=PLAN)
    picture = generator.generate(
        "a cat", "blurry", seed=5, on_progress=lambda *step: steps.append(step)
    )
    assert (picture.size, picture.mode) == ((64, 96), "RGB")
    assert steps == [(f"stage{stage}", step, 2) for stage in (1, 2) for step in (1, 2)]
    assert generator.last_seed == 5


def test_the_server_is_asked_for_the_same_plan(fake):
    fake.play = play_end
    options: dict[str, Any] = {
        "diffusion_model": "z.gguf",
        "text_encoder": "q.safetensors",
        "vae": "v.safetensors",
    }
    ComfyUIImageGenerator(fake.url, **options).generate(
        "a cat", "blurry", "x.safetensors", 0.5, "sunway", 12, 3.0, 7
    )
    contents = asked(fake)
    first = contents.plan.stages[0]
    assert (contents.prompt, contents.negative_prompt, contents.seed) == (
        "sunway, a cat",
        "blurry",
        7,
    )
    assert contents.loras == (LoraUse("x.safetensors", 0.5),)
    assert contents.models == ModelNames(**options)
    assert (first.steps, first.cfg) == (12, 3.0)
    assert contents.plan.stages[1:] == DEFAULT_PLAN.stages[1:]


def test_a_plain_request_to_the_server_is_the_default_plan(fake):
    fake.play = play_end
    generator = ComfyUIImageGenerator(fake.url)
    generator.generate("a cat")
    assert asked(fake).plan == DEFAULT_PLAN
    assert asked(fake).seed == generator.last_seed


def test_one_stage_on_the_server_is_the_plans_single_stage(fake):
    fake.play = lambda fake, prompt_id: play_end(fake, prompt_id, node="337")
    ComfyUIImageGenerator(fake.url).generate(
        "a cat", num_inference_steps=4, guidance_scale=1.5, progressive=False
    )
    assert asked(fake).plan.stages == DEFAULT_PLAN.single_stage(4, 1.5).stages


def test_a_server_that_finishes_without_the_picture_is_an_error(fake):
    fake.play = lambda fake, prompt_id: play_end(fake, prompt_id, node="9")
    with pytest.raises(BackendError, match="finished without a picture"):
        ComfyUIImageGenerator(fake.url).generate("a cat")


def test_a_server_that_is_away_is_one_line(fake):
    fake.close()
    with pytest.raises(BackendError, match=r"no answer from ComfyUI at .*; start it"):
        ComfyUIImageGenerator(fake.url).generate("a cat")


# ---------------------------------------------------------------- either


def test_both_generators_have_one_signature():
    native, server = (
        inspect.signature(kind.generate) for kind in (NativeImageGenerator, ComfyUIImageGenerator)
    )
    assert native == server
    assert list(native.parameters)[1:10] == [
        "prompt",
        "negative_prompt",
        "lora_path",
        "lora_strength",
        "trigger_word",
        "num_inference_steps",
        "guidance_scale",
        "seed",
        "progressive",
    ]


def test_a_generator_is_made_by_its_name(model):
    assert isinstance(create_image_generator(model_path=model), NativeImageGenerator)
    made = create_image_generator("comfyui", url="http://localhost:1", timeout=3)
    assert isinstance(made, ComfyUIImageGenerator)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backend": "diffusers"}, "backend must be one of native, comfyui; got 'diffusers'"),
        ({"url": "http://a"}, r"url is no option of the native .* \(it belongs to comfyui\)"),
        ({"backend": "comfyui", "vae_path": "a"}, r"vae_path is .* \(it belongs to native\)"),
        ({"backend": "comfyui", "speed": 11}, "speed is no option of the comfyui backend; it has"),
        ({"backend": "comfyui", "url": "localhost"}, "is no server address"),
    ],
)
def test_backends_and_options_that_do_not_exist_are_refused(arguments, said):
    with pytest.raises(BadInputError, match=said):
        create_image_generator(**arguments)
