from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo.comfyui_reader import WorkflowContents, load_workflow, plan_from_workflow
from turbo.comfyui_workflow import (
    FLOWMATCH_NODE,
    FLOWMATCH_SCHEDULER,
    LoraUse,
    ModelNames,
    picture_node,
    required_nodes,
    sampler_nodes,
    workflow_from_plan,
)
from turbo.errors import BadInputError, WorkflowError
from turbo.plan import (
    DEFAULT_PLAN,
    SAMPLERS,
    SCHEDULERS,
    UPSCALE_METHODS,
    EasyCache,
    LoraSettings,
    Plan,
    Stage,
)

PROMPTS: dict[str, Any] = {
    "prompt": "a lighthouse on a cliff at dawn",
    "negative_prompt": "blurry, low quality",
}
SMALL = Stage(name="stage1", height=128, width=96, steps=4)


def default_workflow(**changes):
    return workflow_from_plan(DEFAULT_PLAN, **{**PROMPTS, "seed": 42, **changes})


def plan_of(*stages: Stage) -> Plan:
    return Plan(stages=stages, num_inference_steps=stages[0].steps, guidance_scale=stages[0].cfg)


# ---------------------------------------------------------------- writing


def test_the_default_plan_is_the_original_workflow_node_for_node(shared):
    original = json.loads((shared / "workflow/zimage-progressive-api.json").read_text())
    assert default_workflow() == original


def test_the_original_workflow_is_the_default_plan(shared):
    contents = load_workflow(shared / "workflow/zimage-progressive-api.json")
    assert contents == WorkflowContents(
        plan=DEFAULT_PLAN, **PROMPTS, seed=42, loras=(), models=ModelNames()
    )


def test_the_default_plan_needs_the_originals_node_packs():
    assert set(required_nodes(default_workflow())) == {
        "CLIPLoaderGGUF",
        "LorapathLoader",
        "Seed (rgthree)",
        FLOWMATCH_NODE,
        FLOWMATCH_SCHEDULER,
    }


def test_standard_nodes_leave_only_what_has_no_equal():
    workflow = default_workflow(standard_nodes=True)
    assert set(required_nodes(workflow)) == {FLOWMATCH_NODE, FLOWMATCH_SCHEDULER}
    assert plan_from_workflow(workflow).plan == DEFAULT_PLAN


def test_another_plan_runs_on_a_server_without_node_packs():
    stages = (SMALL, replace(SMALL, name="stage2", height=256, width=192, denoise=0.5))
    workflow = workflow_from_plan(plan_of(*stages), **PROMPTS, loras=["a.safetensors"])
    assert required_nodes(workflow) == {}


def test_an_unknown_node_is_reported_as_required():
    workflow = {"1": {"class_type": "Sparkle", "inputs": {}}}
    assert required_nodes(workflow) == {"Sparkle": "a pack that is not known here"}


def test_a_uniform_enlargement_is_written_as_a_factor_and_another_as_a_size():
    workflow = default_workflow()
    assert workflow["303"]["inputs"]["scale_by"] == 2.0
    assert workflow["321"]["class_type"] == "LatentUpscale"
    larger = replace(DEFAULT_PLAN.stages[-1], width=688)
    plan = replace(DEFAULT_PLAN, stages=(*DEFAULT_PLAN.stages[:2], larger))
    assert workflow_from_plan(plan, prompt="")["303"]["class_type"] == "LatentUpscale"


def test_a_size_that_the_upscale_node_would_change_is_refused():
    tiny = replace(SMALL, name="stage2", height=48, width=32)
    with pytest.raises(WorkflowError, match=r"stage2 is 32x48 .* nothing below 64"):
        workflow_from_plan(plan_of(SMALL, tiny), prompt="")


def test_each_shift_is_set_once():
    stages = [replace(SMALL, name=f"stage{n}", shift=shift) for n, shift in enumerate((3, 2, 3))]
    workflow = workflow_from_plan(plan_of(*stages), prompt="")
    nodes = [node for node in workflow.values() if node["class_type"] == "ModelSamplingAuraFlow"]
    assert [node["inputs"]["shift"] for node in nodes] == [3, 2]


def test_a_partial_schedule_of_the_flowmatch_node_is_a_longer_one_begun_late():
    stage = replace(
        SMALL, name="stage2", steps=7, scheduler="flowmatch_node", denoise=0.7, shift=2.0
    )
    workflow = workflow_from_plan(plan_of(SMALL, stage), prompt="")
    [inputs] = [n["inputs"] for n in workflow.values() if n["class_type"] == FLOWMATCH_NODE]
    assert (inputs["steps"], inputs["start_at_step"], inputs["shift"]) == (10, 3, 2.0)


def test_one_stage_is_written_for_a_plan_that_is_not_progressive():
    plan = replace(DEFAULT_PLAN, progressive=False)
    assert workflow_from_plan(plan, prompt="") == workflow_from_plan(
        DEFAULT_PLAN.single_stage(), prompt=""
    )


def test_only_the_last_picture_is_made_when_the_others_are_not_wanted():
    workflow = default_workflow(save_stages=False, filename_prefix="turbo")
    saves = {i: node for i, node in workflow.items() if node["class_type"] == "SaveImage"}
    assert list(saves) == [picture_node(DEFAULT_PLAN)] == ["307"]
    assert saves["307"]["inputs"]["filename_prefix"] == "turbo_stage3"


def test_sampler_nodes_lead_to_their_stages():
    assert sampler_nodes(DEFAULT_PLAN) == dict(
        zip(("316", "276", "325"), DEFAULT_PLAN.stages, strict=True)
    )


def test_a_seed_beyond_the_seed_nodes_range_goes_straight_into_the_sampler():
    workflow = default_workflow(seed=2**64 - 1)
    assert workflow["316"]["inputs"]["noise_seed"] == 2**64 - 1
    assert workflow["276"]["inputs"]["seed"] == ["226", 0]  # the offset wraps around to 0
    assert workflow["226"]["inputs"]["seed"] == 0


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(BadInputError, match="seed must be 0 to"):
        default_workflow(seed=seed)


def test_a_prompt_that_is_no_text_is_refused():
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(BadInputError, match=f"{name} must be a string, got int"):
            default_workflow(**{name: 5})


@pytest.mark.parametrize("lora", ["", ("a", float("nan")), ("a", 1.0, float("inf"))])
def test_impossible_loras_are_refused(lora):
    with pytest.raises(BadInputError):
        default_workflow(loras=[lora])


def test_gguf_files_get_their_loaders():
    names = ModelNames(diffusion_model="z.gguf", text_encoder="q.GGUF")
    workflow = default_workflow(models=names, standard_nodes=True)
    assert {workflow["1"]["class_type"], workflow["2"]["class_type"]} == {
        "UnetLoaderGGUF",
        "CLIPLoaderGGUF",
    }
    assert plan_from_workflow(workflow).models == names


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("standard_nodes", [True, False])
@pytest.mark.parametrize(
    "loras",
    [
        (),
        (LoraUse("a.safetensors", 0.7),),
        (LoraUse("a", 1.0, 0.25), LoraUse("b", -0.5, folder="/loras"), LoraUse("c", 0.3, 0.0)),
    ],
)
def test_loras_come_back_in_order_with_both_strengths(standard_nodes, loras):
    workflow = default_workflow(loras=loras, standard_nodes=standard_nodes)
    assert plan_from_workflow(workflow).loras == loras


def test_a_lora_without_a_strength_gets_the_plans():
    plan = replace(DEFAULT_PLAN, lora=LoraSettings(default_strength=0.6))
    workflow = workflow_from_plan(plan, prompt="", loras=["a", ("b", 0.2)])
    assert plan_from_workflow(workflow).loras == (LoraUse("a", 0.6), LoraUse("b", 0.2))


def test_a_checkpoint_comes_back():
    names = ModelNames(checkpoint="all.safetensors")
    assert plan_from_workflow(default_workflow(models=names)).models == names


numbers = st.floats(0, 1).map(lambda x: round(x, 3))
caches = st.builds(
    lambda threshold, a, b: EasyCache(threshold=threshold, start=min(a, b), end=max(a, b)),
    numbers,
    numbers,
    numbers,
)


@st.composite
def plans(draw) -> Plan:
    stages = []
    for number in range(1, draw(st.integers(1, 5)) + 1):
        scheduler = draw(st.sampled_from(SCHEDULERS))
        steps = draw(st.integers(2, 30))
        # The flow-match node holds a denoise only as a number of steps.
        denoise = draw(st.sampled_from([1.0, 0.9, 0.7, 0.55, 0.3]))
        if scheduler == "flowmatch_node" and int(steps / denoise) != round(steps / denoise, 9):
            denoise = 1.0
        stage = Stage(
            name=f"stage{number}",
            height=16 * draw(st.integers(4, 40)),
            width=16 * draw(st.integers(4, 40)),
            steps=steps,
            cfg=draw(st.sampled_from([1.0, 1.5, 2.0])),
            sampler=draw(st.sampled_from(SAMPLERS)),
            scheduler=scheduler,
            node="custom"
            if scheduler == "flowmatch_node"
            else draw(st.sampled_from(["ksampler", "custom"])),
            shift=draw(st.sampled_from([1.0, 2.5, 3.0])),
            denoise=1.0 if number == 1 else denoise,
            seed_offset=0 if number == 1 else draw(st.integers(0, 1000)),
            upscale="nearest-exact" if number == 1 else draw(st.sampled_from(UPSCALE_METHODS)),
            easycache=draw(st.none() | caches),
        )
        stages.append(stage)
    return plan_of(*stages)


@settings(max_examples=150, deadline=None)
@given(plans(), st.booleans(), st.booleans(), st.integers(0, 2**64 - 2000))
def test_any_plan_comes_back_from_its_workflow(plan, standard_nodes, save_stages, seed):
    written = workflow_from_plan(
        plan, **PROMPTS, seed=seed, standard_nodes=standard_nodes, save_stages=save_stages
    )
    contents = plan_from_workflow(json.loads(json.dumps(written)))
    unguided = all(stage.cfg == 1 for stage in plan.stages)
    assert contents.seed == seed
    assert (contents.prompt, contents.negative_prompt) == tuple(PROMPTS.values()) or unguided
    for stage, read in zip(plan.stages, contents.plan.stages, strict=True):
        if stage.scheduler == "flowmatch_node":  # kept as a number of steps
            assert int(read.steps / read.denoise) == int(stage.steps / stage.denoise)
            read = replace(read, denoise=stage.denoise)
        assert read == stage


# ---------------------------------------------------------------- reading what others wrote


def changed(node: str, **inputs):
    workflow = copy.deepcopy(default_workflow())
    workflow[node]["inputs"].update(inputs)
    return workflow


def replaced(node: str, class_type: str, **inputs):
    workflow = copy.deepcopy(default_workflow())
    workflow[node] = {"class_type": class_type, "inputs": inputs}
    return workflow


def without(node: str):
    workflow = default_workflow()
    del workflow[node]
    return workflow


def test_other_ids_and_an_unused_node_change_nothing():
    renamed = json.loads(json.dumps(default_workflow()).replace('"3', '"x3'))
    renamed["note"] = {"class_type": "Note", "inputs": {}}
    assert plan_from_workflow(renamed).plan == DEFAULT_PLAN


def test_numbers_may_come_from_value_nodes_or_as_text():
    workflow = changed("316", noise_seed=["900", 0], cfg="2.0")
    workflow["900"] = {"class_type": "PrimitiveInt", "inputs": {"value": ["322", 0]}}
    contents = plan_from_workflow(workflow)
    assert (contents.seed, contents.plan) == (42, DEFAULT_PLAN)


def test_the_smallest_seed_is_the_pictures():
    contents = plan_from_workflow(changed("226", seed=7))
    assert contents.seed == 7
    assert [stage.seed_offset for stage in contents.plan.stages] == [35, 0, 37]


def test_a_model_without_a_sampling_node_has_the_models_own_shift():
    workflow = json.loads(json.dumps(without("11")).replace('["11", 0]', '["343", 0]'))
    assert plan_from_workflow(workflow).plan == DEFAULT_PLAN


def test_two_samplers_without_an_upscale_have_the_same_size():
    workflow = changed("325", latent_image=["276", 0])
    last = plan_from_workflow(workflow).plan.stages[-1]
    assert (last.height, last.width) == (432, 336)


def test_sampler_nodes_with_the_default_settings_are_known():
    sde = {"eta": 1.0, "s_noise": 1.0, "r": 0.5, "noise_device": "cpu"}
    assert plan_from_workflow(replaced("323", "SamplerDPMPP_SDE", **sde)).plan == DEFAULT_PLAN
    with pytest.raises(WorkflowError, match=r"node 323 \(SamplerDPMPP_SDE\): r must be 0.5"):
        plan_from_workflow(replaced("323", "SamplerDPMPP_SDE", **{**sde, "r": 0.4}))


def test_a_lora_on_the_model_alone_has_no_strength_on_the_text_encoder():
    workflow = replaced(
        "343", "LoraLoaderModelOnly", lora_name="a", strength_model=0.5, model=["1", 0]
    )
    for node in ("6", "7"):
        workflow[node]["inputs"]["clip"] = ["2", 0]
    assert plan_from_workflow(workflow).loras == (LoraUse("a", 0.5, 0.0),)


def test_a_zeroed_negative_prompt_is_fine_where_it_is_never_evaluated():
    plan = plan_of(replace(SMALL, cfg=1.0))
    workflow = workflow_from_plan(plan, prompt="a cat")
    workflow["7"] = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}}
    assert plan_from_workflow(workflow).negative_prompt == ""
    guided = workflow_from_plan(plan_of(replace(SMALL, cfg=2.0)), prompt="a cat")
    guided["7"] = workflow["7"]
    with pytest.raises(WorkflowError, match=r"node 7 \(ConditioningZeroOut\)"):
        plan_from_workflow(guided)


def test_the_editors_format_is_told_how_to_export():
    with pytest.raises(WorkflowError, match=r"Export \(API\)"):
        plan_from_workflow({"nodes": [], "links": [], "version": 0.4})


@pytest.mark.parametrize(
    ("workflow", "said"),
    [
        ({}, "a workflow is a JSON object"),
        ([], "a workflow is a JSON object"),
        ({"1": 5}, "node '1' has no class_type and inputs"),
        ({"1": {"class_type": "VAELoader", "inputs": {}}}, "it has no SaveImage node"),
        (replaced("11", "ModelSamplingFlux", model=["343", 0]), r"node 11 \(ModelSamplingFlux\)"),
        (replaced("303", "LatentRotate", samples=["276", 0]), r"node 303 \(LatentRotate\)"),
        (replaced("328", "VAEDecodeTiled", samples=["325", 0]), r"node 328 \(VAEDecodeTiled\)"),
        (replaced("324", "KarrasScheduler", steps=9), r"node 324 \(KarrasScheduler\)"),
        (replaced("323", "SamplerLMS", order=4), r"node 323 \(SamplerLMS\)"),
        (replaced("2", "DualCLIPLoader"), r"node 2 \(DualCLIPLoader\)"),
        (replaced("3", "TAESDLoader"), r"node 3 \(TAESDLoader\)"),
        (replaced("6", "CLIPTextEncodeFlux", clip=["343", 1]), r"node 6 \(CLIPTextEncodeFlux\)"),
        (replaced("322", "RandomInt"), r"node 316 .* noise_seed is computed by node 322"),
        (changed("322", seed=-1), r"node 316 .* which means a random one"),
        (changed("322", seed=1.5), r"node 316 .* must be a whole number, got 1.5"),
        (changed("322", seed=["322", 0]), r"is computed by node 322"),
        (changed("316", cfg=True), r"node 316 .* cfg must be a number, got True"),
        (changed("316", cfg="x" * 1000), r"node 316 .* cfg must be a number, got 'xxx"),
        (changed("316", cfg=float("nan")), "cfg must be a number"),
        (changed("316", add_noise=False), "add_noise must be true"),
        (changed("316", latent_image=["325", 0]), "its latent depends on itself"),
        (changed("316", latent_image=["999", 0]), "which is not there"),
        (changed("316", latent_image=7), "latent_image must be connected to a node, got 7"),
        (changed("303", samples=["276", 1]), "not denoised_output"),
        (changed("303", scale_by=1e308), "scale_by must be above 0 and at most 8"),
        (changed("303", scale_by=1.3), "must be a multiple of 16"),
        (changed("321", crop="center"), "crop must be disabled, got 'center'"),
        (changed("321", width=0), "must be at least 64"),
        (changed("317", batch_size=2), "batch_size must be 1, got 2"),
        (changed("323", sampler_name="lms"), r"node 325 \(SamplerCustom\): stage3.sampler must"),
        (changed("276", denoise=0), r"node 276 \(KSampler\): stage2.denoise must"),
        (changed("320", start_percent=2), r"node 320 \(EasyCache\): easycache.start must"),
        (changed("339", use_karras_sigmas="enable"), "use_karras_sigmas must be disable"),
        (changed("339", end_at_step=5), "end_at_step must be at least 9"),
        (changed("339", start_at_step=9), "start_at_step must be 0 to 8"),
        (changed("339", start_at_step=3), "stage1.denoise must be 1"),
        (changed("1", weight_dtype="fp8_e4m3fn"), "weight_dtype must be default"),
        (changed("276", model=["1", 0]), "the same model file and LoRAs"),
        (changed("276", positive=["7", 0]), "a plan has one prompt"),
        (changed("7", clip=["2", 0]), "the same text encoder and LoRAs"),
        (changed("328", vae=["4", 0]), "which is not there"),
        (changed("343", model=["11", 0]), "its model depends on itself"),
        (changed("210", images=["337", 0]), r"node 337 \(SaveImage\)"),
    ],
)
def test_what_a_plan_cannot_express_is_refused_by_the_nodes_name(workflow, said):
    with pytest.raises(WorkflowError, match=said) as caught:
        plan_from_workflow(workflow)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_easycache_counts_with_the_samplers_shift():
    workflow = changed("339", shift=2.0)
    assert plan_from_workflow(workflow).plan.stages[0].shift == 2.0  # euler_ancestral ignores it
    workflow["316"]["inputs"]["model"] = ["320", 0]
    with pytest.raises(WorkflowError, match=r"its shift is 2\.0 and the model's 3\.0"):
        plan_from_workflow(workflow)


def test_a_sigmas_node_with_another_shift_than_the_sampler_is_refused():
    workflow = changed("324", model=["900", 0])
    shifted = {"shift": 2.0, "model": ["1", 0]}
    workflow["900"] = {"class_type": "ModelSamplingAuraFlow", "inputs": shifted}
    with pytest.raises(WorkflowError, match=r"node 324 .* its model has shift 2\.0"):
        plan_from_workflow(workflow)


def test_two_separate_pictures_are_refused():
    workflow = default_workflow()
    workflow["900"] = copy.deepcopy(workflow["316"])
    workflow["901"] = {
        "class_type": "VAEDecode",
        "inputs": {"samples": ["900", 0], "vae": ["3", 0]},
    }
    workflow["902"] = {"class_type": "SaveImage", "inputs": {"images": ["901", 0]}}
    with pytest.raises(WorkflowError, match=r"node 900 .* do not build on each other"):
        plan_from_workflow(workflow)


def test_two_caches_before_one_sampler_are_refused():
    with pytest.raises(WorkflowError, match=r"node 304 .* second EasyCache"):
        plan_from_workflow(changed("320", model=["304", 0]))


def test_loras_in_two_orders_are_refused():
    workflow = default_workflow(loras=["a", "b"])
    workflow["344"]["inputs"]["clip"] = ["2", 0]
    workflow["343"]["inputs"]["clip"] = ["344", 1]
    for node in ("6", "7"):
        workflow[node]["inputs"]["clip"] = ["343", 1]
    with pytest.raises(WorkflowError, match="different orders"):
        plan_from_workflow(workflow)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
node_ids = st.sampled_from(sorted(default_workflow()))
links = st.tuples(node_ids, st.integers(-1, 2)).map(list)


@settings(max_examples=300, deadline=None)
@given(node_ids, st.data())
def test_a_damaged_workflow_is_read_or_refused_in_one_line(node, data):
    workflow = copy.deepcopy(default_workflow())
    inputs = workflow[node]["inputs"]
    inputs[data.draw(st.sampled_from(sorted(inputs)))] = data.draw(values | links)
    refusal = ""
    try:
        plan_from_workflow(workflow)
    except WorkflowError as error:
        refusal = str(error)
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the workflow"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "a workflow is a JSON object"),
        (b" " * (16 * 2**20 + 1), "is larger than any workflow"),
    ],
    ids=["missing", "cut", "binary", "deep", "list", "large"],
)
def test_a_file_that_is_no_workflow_is_refused(tmp_path, content, said):
    path = tmp_path / "workflow.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkflowError, match=said):
        load_workflow(path)
