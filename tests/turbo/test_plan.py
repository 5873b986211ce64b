"""The plan: its table, its checks, reading and writing it."""

from __future__ import annotations

import json
import math
import re
import string
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import REPOSITORY
from turbo.errors import BadInputError, PlanError
from turbo.plan import (
    DEFAULT_PLAN,
    DTYPES,
    NODES,
    SAMPLERS,
    SCHEDULERS,
    TAKEN_NAMES,
    UPSCALE_METHODS,
    EasyCache,
    LoraSettings,
    ModelSettings,
    Performance,
    Plan,
    Stage,
    dump_plan,
    load_plan,
    plan_from_dict,
    plan_to_dict,
)


def stage(**changes: Any) -> Stage:
    values: dict[str, Any] = {"name": "s", "height": 64, "width": 96, "steps": 4}
    return Stage(**(values | changes))


def settings_of(kind: Any, **values: Any) -> Any:
    """A dataclass from values that need not be of its types."""
    return kind(**values)


def read(tmp_path: Path, text: str) -> Plan:
    file = tmp_path / "plan.yaml"
    file.write_text(text, encoding="utf-8")
    return load_plan(file)


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(PlanError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(str(tmp_path / "plan.yaml"))


# The default plan.


def test_the_default_plan_is_the_reference_workflow(shared: Path):
    nodes = json.loads((shared / "workflow" / "zimage-progressive-api.json").read_text())
    inputs = {number: node["inputs"] for number, node in nodes.items()}
    first, second, third = DEFAULT_PLAN.stages

    assert (first.width, first.height) == (inputs["317"]["width"], inputs["317"]["height"])
    assert (first.steps, first.cfg) == (inputs["339"]["steps"], inputs["316"]["cfg"])
    assert (first.node, first.scheduler, first.sampler) == (
        "custom",
        "flowmatch_node",
        "euler_ancestral",
    )
    assert first.easycache is None

    assert (second.width, second.height) == (inputs["321"]["width"], inputs["321"]["height"])
    ksampler = inputs["276"]
    assert (second.node, second.sampler) == ("ksampler", ksampler["sampler_name"])
    assert (second.scheduler, second.steps) == (ksampler["scheduler"], ksampler["steps"])
    assert (second.denoise, second.cfg) == (ksampler["denoise"], ksampler["cfg"])
    assert second.easycache == easycache_of(inputs["320"])

    assert (third.width, third.height) == (2 * second.width, 2 * second.height)
    basic = inputs["324"]
    assert (third.node, third.sampler) == ("custom", inputs["323"]["sampler_name"])
    assert (third.scheduler, third.steps, third.denoise) == (
        basic["scheduler"],
        basic["steps"],
        basic["denoise"],
    )
    assert third.easycache == easycache_of(inputs["304"])

    assert {s.shift for s in DEFAULT_PLAN.stages} == {inputs["11"]["shift"]}
    assert {s.upscale for s in DEFAULT_PLAN.stages} == {inputs["303"]["upscale_method"]}
    seeds = [inputs[number]["seed"] for number in ("322", "226", "305")]
    assert [s.seed_offset for s in DEFAULT_PLAN.stages] == [s - seeds[0] for s in seeds]
    assert DEFAULT_PLAN.lora.default_strength == inputs["343"]["strength_model"]


def easycache_of(inputs: dict[str, Any]) -> EasyCache:
    return EasyCache(
        threshold=inputs["reuse_threshold"],
        start=inputs["start_percent"],
        end=inputs["end_percent"],
    )


def test_a_plan_cannot_be_changed_by_accident():
    with pytest.raises(FrozenInstanceError):
        DEFAULT_PLAN.stages[0].steps = 10  # type: ignore[misc]
    assert hash(DEFAULT_PLAN) == hash(plan_from_dict(plan_to_dict(DEFAULT_PLAN)))


def test_the_single_stage_has_the_last_size_and_the_first_sampler():
    plan = DEFAULT_PLAN.single_stage()
    first = DEFAULT_PLAN.stages[0]
    (only,) = plan.stages
    assert (only.width, only.height) == (672, 864)
    assert only == replace(first, width=672, height=864)
    assert (only.steps, only.cfg, only.denoise) == (9, 2.0, 1.0)
    assert not plan.progressive
    assert plan.single_stage() == plan


def test_the_single_stage_takes_steps_and_cfg():
    plan = DEFAULT_PLAN.single_stage(num_inference_steps=12, guidance_scale=1)
    assert (plan.stages[0].steps, plan.stages[0].cfg) == (12, 1.0)
    assert plan.single_stage() == plan
    with pytest.raises(PlanError, match=r"num_inference_steps must be a whole number from 1"):
        DEFAULT_PLAN.single_stage(num_inference_steps=0)
    with pytest.raises(PlanError, match=r"guidance_scale must be a number, at least 0, got nan"):
        DEFAULT_PLAN.single_stage(guidance_scale=math.nan)


# What a dataclass refuses.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 1000}, "height must be a multiple of 16 pixels, got 1000; use 992 or 1008"),
        ({"width": 0}, "width must be a multiple of 16 pixels from 16 to 4096, got 0; use 16"),
        ({"width": -16}, "got -16; use 16"),
        ({"width": 4112}, "got 4112; use 4096"),
        ({"width": 64.0}, "width must be a multiple of 16 pixels from 16 to 4096, got 64.0"),
        ({"width": True}, "got true"),
        ({"steps": -1}, "steps must be a whole number from 1 to 1000, got -1"),
        ({"steps": 0}, "got 0"),
        ({"steps": 1001}, "got 1001"),
        ({"steps": 2.5}, "got 2.5"),
        ({"steps": "9"}, "got '9'"),
        ({"steps": 10**5000}, "a number too long to print"),
        ({"cfg": math.nan}, "cfg must be a number, at least 0, got nan"),
        ({"cfg": math.inf}, "got inf"),
        ({"cfg": -1}, "got -1"),
        ({"cfg": False}, "got false"),
        ({"cfg": "2"}, "got '2'"),
        ({"cfg": None}, "got nothing"),
        ({"cfg": 10**400}, "cfg must be a number"),
        ({"denoise": 0}, "denoise must be a number above 0, at most 1, got 0"),
        ({"denoise": 1.01}, "got 1.01"),
        ({"denoise": 1e-6}, "needs a schedule of more than 100000 steps; use at least 4e-05"),
        ({"shift": 0}, "shift must be a number above 0, at most 100, got 0"),
        ({"shift": math.inf}, "got inf"),
        ({"seed_offset": -1}, "seed_offset must be a whole number from 0"),
        ({"sampler": "euler_a"}, "did you mean 'euler_ancestral'?"),
        ({"sampler": "magic"}, f"sampler must be one of {', '.join(SAMPLERS)}; got 'magic'"),
        ({"scheduler": "Karras"}, "did you mean 'karras'?"),
        ({"scheduler": "x"}, f"scheduler must be one of {', '.join(SCHEDULERS)}; got 'x'"),
        ({"upscale": "lanczos"}, f"upscale must be one of {', '.join(UPSCALE_METHODS)}; got"),
        ({"node": "KSampler"}, f"node must be one of {', '.join(NODES)}; got 'KSampler'"),
        ({"node": None}, "got nothing"),
        ({"scheduler": "flowmatch_node", "node": "ksampler"}, "needs node: custom"),
        ({"scheduler": "kl_optimal", "steps": 1}, "steps must be at least 2"),
        ({"name": ""}, "name must be letters, digits, _ and -, got ''"),
        ({"name": "../x"}, "name must be letters"),
        ({"name": 3}, "name must be text"),
        *(
            (
                {"name": name},
                "name must not be one of load, compile, capture, prompt,",
            )
            for name in TAKEN_NAMES
        ),
        ({"easycache": 0.3}, "easycache must be an EasyCache"),
    ],
)
def test_a_stage_refuses_what_cannot_be(changes: dict[str, Any], message: str):
    with pytest.raises(PlanError, match=re.escape(message)):
        stage(**changes)


def test_kl_optimal_with_one_step_is_allowed_where_its_schedule_has_two():
    assert stage(scheduler="kl_optimal", steps=1, denoise=0.5).steps == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": -0.1}, "easycache.threshold must be a number, at least 0, got -0.1"),
        ({"start": 1.1}, "easycache.start must be a number from 0 to 1, got 1.1"),
        ({"end": -1}, "easycache.end must be a number from 0 to 1, got -1"),
        ({"start": 0.9, "end": 0.5}, "easycache.start must not be after end, got 0.9 and 0.5"),
        ({"end": math.nan}, "got nan"),
    ],
)
def test_easycache_refuses_what_cannot_be(changes: dict[str, Any], message: str):
    with pytest.raises(PlanError, match=re.escape(message)):
        EasyCache(**({"threshold": 0.2} | changes))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Plan(stages=()), "stages must be 1 to 16 stages, got 0"),
        (lambda: Plan(stages=(stage(),) * 17), "got 17"),
        (lambda: settings_of(Plan, stages="abc"), "stages must be Stage objects"),
        (lambda: settings_of(Plan, stages=(1,)), "stages must be Stage objects"),
        (
            lambda: Plan(stages=(stage(denoise=0.5),)),
            "generation.stage1.denoise must be 1 in the first stage",
        ),
        (
            lambda: Plan(stages=(stage(), stage())),
            "generation.stage2.name 's' is taken by an earlier stage",
        ),
        (
            lambda: settings_of(Plan, stages=(stage(),), progressive=1),
            "generation.progressive must be true or false, got 1",
        ),
        (
            lambda: settings_of(Plan, stages=(stage(),), lora=None),
            "lora must be a LoraSettings, got nothing",
        ),
        (
            lambda: settings_of(Performance, enable_vae_tiling="no"),
            "performance.enable_vae_tiling must be true or false, got 'no'",
        ),
        (lambda: LoraSettings(default_strength=math.inf), "lora.default_strength must be a finite"),
        (lambda: ModelSettings(path=""), "model.path must be a path or null, got ''"),
        (lambda: ModelSettings(path="a\0b"), "model.path must be a path or null"),
        (lambda: ModelSettings(device="gpu"), "model.device must be auto, cpu, cuda or cuda:N"),
        (
            lambda: ModelSettings(torch_dtype="float8"),
            f"model.torch_dtype must be one of {', '.join(DTYPES)}; got 'float8'",
        ),
    ],
)
def test_a_plan_refuses_what_cannot_be(build: Any, message: str):
    with pytest.raises(PlanError, match=re.escape(message)):
        build()


def test_errors_of_a_plan_are_bad_input_and_value_errors():
    with pytest.raises(BadInputError):
        stage(steps=0)
    with pytest.raises(ValueError, match="steps"):
        stage(steps=0)


def test_numbers_of_other_types_become_plain_ones():
    made = stage(height=np.int64(64), steps=np.int32(4), cfg=np.float32(2), denoise=1)
    assert made == stage(cfg=2.0)
    assert [type(v) for v in (made.height, made.steps, made.cfg, made.denoise)] == [
        int,
        int,
        float,
        float,
    ]
    json.dumps(plan_to_dict(Plan(stages=[made])))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("torch.bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("torch.float32", "float32"),
        (None, "auto"),
    ],
)
def test_dtypes_have_several_spellings(given: str | None, meant: str):
    assert ModelSettings(torch_dtype=given).torch_dtype == meant  # type: ignore[arg-type]


def test_a_path_object_is_a_path():
    assert ModelSettings(path=Path("a", "b")).path == str(Path("a", "b"))  # type: ignore[arg-type]


# Reading.


def test_the_keys_people_have_are_read(tmp_path: Path):
    plan = read(
        tmp_path,
        """\
model:
  path: ~/ComfyUI/models
  vae_path: null
  clip_path: clip.safetensors
  torch_dtype: torch.bfloat16
  device: cuda
generation:
  progressive: true
  num_inference_steps: 12
  guidance_scale: 1.5
  stage1: {height: 256, width: 192, steps: 8, cfg: 1.8}
  stage2: {height: 512, width: 384, steps: 12, cfg: 1.0, denoise: 0.65}
  stage3: {height: 1024, width: 768, steps: 12, cfg: 1.0, denoise: 0.5}
lora:
  default_strength: 1.0
  cache_models: false
performance:
  enable_model_cpu_offload: yes
  enable_vae_slicing: no
  enable_vae_tiling: on
""",
    )
    first, second, third = plan.stages
    assert first == replace(DEFAULT_PLAN.stages[0], height=256, width=192, steps=8, cfg=1.8)
    assert (second.denoise, second.sampler) == (0.65, "euler_ancestral")
    assert third.easycache == DEFAULT_PLAN.stages[2].easycache
    assert plan.model == ModelSettings(
        path="~/ComfyUI/models",
        clip_path="clip.safetensors",
        torch_dtype="bfloat16",
        device="cuda",
    )
    assert (plan.num_inference_steps, plan.guidance_scale) == (12, 1.5)
    assert plan.lora == LoraSettings(default_strength=1.0, cache_models=False)
    assert plan.performance == Performance(enable_model_cpu_offload=True, enable_vae_tiling=True)


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "generation:\n", "lora:\nmodel: {}\n"])
def test_an_empty_plan_is_the_default_one(tmp_path: Path, text: str):
    assert read(tmp_path, text) == DEFAULT_PLAN


def test_a_stage_takes_all_our_keys(tmp_path: Path):
    plan = read(
        tmp_path,
        """\
generation:
  stage2:
    name: middle
    sampler: deis
    scheduler: karras
    node: custom
    shift: 2
    seed_offset: 7
    upscale: bislerp
    easycache: {threshold: 2e-1, end: .9}
""",
    )
    assert plan.stages[1] == replace(
        DEFAULT_PLAN.stages[1],
        name="middle",
        sampler="deis",
        scheduler="karras",
        node="custom",
        shift=2.0,
        seed_offset=7,
        upscale="bislerp",
        easycache=EasyCache(threshold=0.2, start=0.45, end=0.9),
    )


@pytest.mark.parametrize("off", ["false", "null", "no", "~", ""])
def test_easycache_can_be_switched_off(tmp_path: Path, off: str):
    plan = read(tmp_path, f"generation:\n  stage3:\n    easycache: {off}\n")
    assert plan.stages[2].easycache is None


def test_stages_can_be_dropped_and_added(tmp_path: Path):
    assert read(tmp_path, "generation: {stages: 2}").stages == DEFAULT_PLAN.stages[:2]
    longer = read(
        tmp_path, "generation: {stage4: {height: 1024, width: 800, steps: 5, denoise: .3}}"
    )
    assert longer.stages[:3] == DEFAULT_PLAN.stages
    fourth = Stage(name="stage4", height=1024, width=800, steps=5, denoise=0.3, seed_offset=3)
    assert longer.stages[3] == fourth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # keys
        ("generation:\n  stage1:\n    stpes: 3", ", line 3: generation.stage1.stpes is not a key"),
        ("generation: {stage1: {stpes: 3}}", "; did you mean 'steps'?"),
        ("generation:\n\n  stagee1: {}", ", line 3: generation.stagee1 is not a key of a plan"),
        ("perfomance: {}", "allowed: model, generation, lora, performance; did you mean 'perf"),
        ("model:\n  path: a\n  path: b", ", line 3: model.path is given twice, first in line 2"),
        ("model: {}\nmodel: {}", ", line 2: model is given twice"),
        ("1: 2", "1 is not a key"),
        ("[1]: 2", "a key must be a plain word"),
        ("model:\n  <<: {path: x}", ", line 2: merge keys (<<) are not read here"),
        # values
        ("generation:\n  stage1:\n    height: 1000", ", line 3: generation.stage1.height must be"),
        ("generation: {stage1: {height: 1000}}", "got 1000; use 992 or 1008"),
        ("generation: {stage1: {steps: yes}}", "whole number from 1 to 1000, got true"),
        ("generation: {stage1: {cfg: .nan}}", "got nan"),
        ("generation: {stage1: {cfg: -.inf}}", "got -inf"),
        ("generation: {stage1: {cfg: '2'}}", "got '2'"),
        ("generation: {stage1: {steps: 010}}", "'010' is not a plain decimal number"),
        ("generation: {stage1: {steps: 1_0}}", "'1_0' is not a plain decimal number"),
        ("generation: {stage1: {steps: 0x10}}", "'0x10' is not a plain decimal number"),
        ("generation: {stage1: {steps: 1:30}}", "'1:30' is not a plain decimal number"),
        ("generation: {stage1: {cfg: 1_0.5}}", "'1_0.5' is not a plain decimal number"),
        ("generation: {stage1: {cfg: 1:30.5}}", "'1:30.5' is not a plain decimal number"),
        ("generation: {stage2: {easycache: yes}}", "must be an EasyCache (threshold, start, end)"),
        ("generation: {stage1: {easycache: {end: 1}}}", "stage1.easycache.threshold is missing"),
        (
            "generation:\n  stage2:\n    easycache:\n      end: 2",
            ", line 4: generation.stage2.easycache.end must be a number from 0 to 1, got 2",
        ),
        (
            "generation:\n  stage1:\n    denoise: 0.5",
            ", line 3: generation.stage1.denoise must be 1 in the first stage",
        ),
        (
            "generation:\n  stage2:\n    name: stage1",
            ", line 3: generation.stage2.name 'stage1' is taken",
        ),
        (
            "generation:\n  stage2:\n    name: decode",
            ", line 3: generation.stage2.name must not be one of load, compile, capture",
        ),
        ("generation: {guidance_scale: -1}", "generation.guidance_scale must be a number"),
        ("model: {path: 12}", "model.path must be text, got 12; put it in quotes"),
        # shapes
        ("[1, 2]", "a plan must be a mapping of keys to values"),
        ("text", "a plan must be a mapping of keys to values, got 'text'"),
        ("generation: 5", "generation must be a mapping"),
        ("generation: {stage1: [9]}", "generation.stage1 must be a mapping"),
        # numbers of stages
        ("generation:\n  stage3:\n", ", line 2: generation.stage3 is empty; delete the line"),
        ("generation: {stages: 0}", "must be a number of stages from 1 to 16, got 0"),
        ("generation: {stages: true}", "got true"),
        ("generation: {stages: 2, stage3: {}}", "stage3 is given, but generation.stages is 2"),
        ("generation: {stage5: {}}", "generation.stage4 is missing; stage numbers have no gaps"),
        ("generation: {stage4: {width: 64}}", "generation.stage4.height is missing"),
        ("generation: {stage17: {}}", "generation.stage17 is beyond the limit of 16 stages"),
        ("generation: {stage99999999999: {}}", "is not a key of a plan"),
        ("generation: {stage0: {}}", "generation.stage0 is not a key of a plan"),
        # YAML
        ("a: b: c", ", line 1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n b: 2", ", line 2: not valid YAML"),
        ("a: 'x", "not valid YAML: found unexpected end of stream"),
        ("a: \0", "not valid YAML: special characters are not allowed"),
        ("a: *b", "not valid YAML: found undefined alias"),
        ("--- {}\n--- {}", "not valid YAML: but found another document"),
        ("a: !!python/object/apply:os.system [ls]", "the tag 'tag:yaml.org,2002:python/object"),
        ("a: !x y", "the tag '!x' is not allowed here"),
        ("a: !!int x", "'x' is not a plain decimal number"),
        ("a: !!bool x", "'x' is not a plain decimal number"),
        ("a: &a [*a]", "too many or too deeply nested values"),
        ("[" * 5000, "nested too deeply"),
        ("{a: " * 12 + "1" + "}" * 12, "too many or too deeply nested values"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, message: str):
    assert message in problem(tmp_path, text)


def test_a_bomb_of_aliases_is_refused(tmp_path: Path):
    levels = ["a: &a [1,1,1,1,1,1,1,1,1,1]"]
    for before, name in zip("abcdefg", "bcdefgh", strict=True):
        levels.append(f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]")
    assert "fewer aliases" in problem(tmp_path, "\n".join(levels))


def test_an_alias_may_save_typing(tmp_path: Path):
    plan = read(tmp_path, "generation: {stage2: &same {cfg: 1.5}, stage3: *same}")
    assert [s.cfg for s in plan.stages] == [2.0, 1.5, 1.5]


def test_a_large_file_is_refused_unread(tmp_path: Path):
    assert "larger than 256 KiB" in problem(tmp_path, "#" * 300_000)


def test_a_file_that_cannot_be_read_is_bad_input(tmp_path: Path):
    with pytest.raises(PlanError, match=r"cannot read the plan file .*none.yaml': No such file"):
        load_plan(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match=r"cannot read the plan file"):
        load_plan(tmp_path)
    with pytest.raises(PlanError, match=r"cannot read the plan file .*null byte"):
        load_plan("a\0b")
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(b"a: \xff\xfe")
    with pytest.raises(PlanError, match="not valid YAML"):
        load_plan(broken)


def test_text_may_have_any_alphabet(tmp_path: Path):
    assert read(tmp_path, "model: {path: 模型/ü}").model.path == "模型/ü"
    file = tmp_path / "utf16.yaml"
    file.write_text("model: {path: 模型}", encoding="utf-16")
    assert load_plan(file).model.path == "模型"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(alphabet=string.printable, max_size=200).map(str.encode))
def test_any_bytes_are_a_plan_or_a_plan_error(tmp_path_factory: Any, content: bytes):
    file = tmp_path_factory.mktemp("any") / "plan.yaml"
    file.write_bytes(content)
    try:
        load_plan(file)
    except PlanError as error:
        assert "\n" not in str(error)  # noqa: PT017


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "generation", "stage1", "stage4", "steps", "easycache", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["model", "generation", "lora"]), json_values))
def test_any_mapping_is_a_plan_or_a_plan_error(data: dict[str, Any]):
    try:
        plan = plan_from_dict(data)
    except PlanError:
        return
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


# Writing.


numbers = st.floats(0.01, 1) | st.sampled_from([1e-5, 1.0, 0.1, 1 / 3])
caches = st.none() | st.builds(
    lambda threshold, marks: EasyCache(threshold=threshold, start=min(marks), end=max(marks)),
    st.floats(0, 1e6),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
stages = st.builds(
    Stage,
    name=st.just("x"),
    height=st.integers(1, 256).map(lambda n: 16 * n),
    width=st.integers(1, 256).map(lambda n: 16 * n),
    steps=st.integers(2, 1000),
    cfg=st.floats(0, 1e9),
    sampler=st.sampled_from(SAMPLERS),
    scheduler=st.sampled_from([s for s in SCHEDULERS if s != "flowmatch_node"]),
    node=st.sampled_from(NODES),
    shift=numbers,
    denoise=st.floats(0.01, 1),
    seed_offset=st.integers(0, 2**64 - 1),
    upscale=st.sampled_from(UPSCALE_METHODS),
    easycache=caches,
)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True).filter(
    lambda name: name not in TAKEN_NAMES
)
paths = st.none() | st.text(min_size=1).filter(lambda text: "\0" not in text)
plans = st.builds(
    lambda stages, names, **others: Plan(
        stages=tuple(
            replace(s, name=n, denoise=1.0 if i == 0 else s.denoise)
            for i, (s, n) in enumerate(zip(stages, names, strict=False))
        ),
        **others,
    ),
    stages=st.lists(stages, min_size=1, max_size=4),
    names=st.lists(names, min_size=4, max_size=4, unique=True),
    progressive=st.booleans(),
    num_inference_steps=st.integers(1, 1000),
    guidance_scale=st.floats(0, 100),
    model=st.builds(ModelSettings, path=paths, vae_path=paths, torch_dtype=st.sampled_from(DTYPES)),
    lora=st.builds(
        LoraSettings,
        default_strength=st.floats(allow_nan=False, allow_infinity=False),
        cache_models=st.booleans(),
    ),
    performance=st.builds(Performance, enable_vae_tiling=st.booleans()),
)


@settings(max_examples=100, deadline=None)
@given(plans)
def test_writing_and_reading_gives_the_same_plan(tmp_path_factory: Any, plan: Plan):
    file = tmp_path_factory.mktemp("written") / "plan.yaml"
    file.write_text(dump_plan(plan), encoding="utf-8")
    assert load_plan(file) == plan
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path):
    for path in ("1e5", "12", "yes", "null", "010", "2024-01-01", "~", "a: b", "x #y", "a\x85b"):
        plan = replace(DEFAULT_PLAN, model=ModelSettings(path=path))
        assert read(tmp_path, dump_plan(plan)).model.path == path


def test_the_written_plan_names_every_key():
    text = dump_plan(DEFAULT_PLAN)
    for key in ("tokenizer_path", "stage3", "seed_offset", "cache_models", "enable_vae_tiling"):
        assert f"{key}:" in text


def test_a_mistaken_plan_is_found_before_anything_heavy_is_imported(tmp_path: Path):
    file = tmp_path / "plan.yaml"
    file.write_text("generation: {stage1: {steps: -1}}")
    code = (
        "import sys; from turbo.errors import PlanError; from turbo.plan import load_plan\n"
        "light = {'yaml', 'torch', 'numpy', 'PIL'} & set(sys.modules)\n"
        f"try: load_plan({str(file)!r})\n"
        "except PlanError as error: print(error)\n"
        "print(light, {'torch', 'numpy', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.splitlines()[1:] == ["set() set()"]
    assert "steps must be a whole number" in done.stdout
