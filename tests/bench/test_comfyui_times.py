from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from bench.comfyui_times import Watch, node_parts
from bench.side import SideError
from turbo.comfyui_workflow import Workflow, sampler_nodes, workflow_from_plan
from turbo.plan import DEFAULT_PLAN, EasyCache, Plan, Stage

SMALL = Plan(stages=(Stage(name="only", height=64, width=64, steps=2),))


def workflow_of(plan: Plan, **options: Any) -> Workflow:
    options = {"prompt": "a lighthouse", "negative_prompt": "blurry"} | options
    return workflow_from_plan(plan, standard_nodes=True, **options)


def events_of(workflow: Workflow, plan: Plan, cached: tuple[str, ...] = ()) -> Iterator[Any]:
    """What a server sends for a workflow."""
    yield "execution_start", {}
    yield "execution_cached", {"nodes": list(cached)}
    for node in workflow:
        if node not in cached:
            yield "executing", {"node": node}
            if node in sampler_nodes(plan):
                yield "progress", {"node": node, "value": 1, "max": 2}
                yield "progress", {"node": node, "value": 2, "max": 2}
    yield "execution_success", {}
    yield "executing", {"node": None}


def watched(workflow: Workflow, plan: Plan, events: Any, step: float = 1.0) -> Watch:
    watch = Watch(workflow, plan)
    for number, (kind, data) in zip(count(), events):
        watch({"type": kind, "data": data}, 100 + number * step)
    return watch


def test_every_node_of_the_workflow_belongs_to_a_part():
    workflow = workflow_of(DEFAULT_PLAN, loras=["style.safetensors"])
    parts = node_parts(workflow, DEFAULT_PLAN)
    assert set(parts) == set(workflow)
    assert (parts["1"], parts["343"], parts["6"], parts["7"]) == (
        "load",
        "load",
        "prompt",
        "prompt",
    )
    assert [parts[node] for node in ("317", "339", "315", "11", "316")] == ["stage1"] * 5
    assert [parts[node] for node in ("321", "320", "276")] == ["stage2"] * 3
    assert [parts[node] for node in ("303", "304", "323", "324", "325")] == ["stage3"] * 5
    assert [parts[node] for node in ("336", "337", "328", "307")] == [
        *("stage1 picture", "stage1 picture", "decode", "png")
    ]


def test_parts_add_up_to_the_whole_run_and_total_leaves_out_what_is_no_part_of_it():
    workflow = workflow_of(DEFAULT_PLAN)
    seconds = watched(workflow, DEFAULT_PLAN, events_of(workflow, DEFAULT_PLAN)).seconds()
    total = seconds.pop("total")
    assert seconds["load"] == 3
    assert seconds["prompt"] == 2
    assert seconds["png"] == seconds["decode"] == 1
    assert seconds["stage1 picture"] == 2
    assert seconds["stage2"] == 3 + 2  # latent, cache, sampler and the sampler's two steps
    assert seconds["prepare"] == 2
    assert sum(seconds.values()) == 2 + len(workflow) + 6
    assert total == sum(seconds.values()) - 3 - 1 - 2 - 2


@pytest.mark.parametrize("class_type", ["CLIPTextEncode", "SamplerCustom", "VAEDecode"])
def test_a_result_from_the_cache_is_refused(class_type):
    workflow = workflow_of(SMALL)
    node = next(n for n, entry in workflow.items() if entry["class_type"] == class_type)
    watch = watched(workflow, SMALL, events_of(workflow, SMALL, cached=(node,)))
    with pytest.raises(SideError, match=f"took node {node} \\({class_type}\\) from its cache"):
        watch.seconds()


def test_loaders_may_come_from_the_cache():
    workflow = workflow_of(SMALL)
    events = events_of(workflow, SMALL, cached=("1", "2", "3"))
    assert "load" not in watched(workflow, SMALL, events).seconds()


def test_a_sampler_that_did_not_reach_its_last_step_is_refused():
    workflow = workflow_of(SMALL)
    events = [e for e in events_of(workflow, SMALL) if e[1].get("value") != 2]
    with pytest.raises(SideError, match="ended only at step 1 of 2"):
        watched(workflow, SMALL, events).seconds()


def test_a_run_whose_events_were_cut_off_has_no_times():
    workflow = workflow_of(SMALL)
    events = list(events_of(workflow, SMALL))
    with pytest.raises(SideError, match="did not tell the whole run"):
        watched(workflow, SMALL, events[:-2]).seconds()
    without_decode = [
        e for e in events if workflow.get(e[1].get("node"), {}).get("class_type") != "VAEDecode"
    ]
    with pytest.raises(SideError, match="did not tell the whole run"):
        watched(workflow, SMALL, without_decode).seconds()


def test_a_run_without_any_event_says_what_to_install():
    with pytest.raises(SideError, match="turbo\\[comfyui\\]"):
        watched(workflow_of(SMALL), SMALL, []).seconds()


def test_nodes_that_compute_the_same_run_once():
    """Two stages with the same sampler and step cache: ComfyUI makes each such node once."""
    cache = EasyCache(threshold=0.1)
    first = Stage(name="first", height=64, width=64, steps=2, easycache=cache)
    second = Stage(name="second", height=128, width=128, steps=2, denoise=0.5, easycache=cache)
    plan = Plan(stages=(first, second))
    workflow = workflow_of(plan, negative_prompt="a lighthouse", save_stages=False)
    twice = ("CLIPTextEncode", "EasyCache", "SamplerEulerAncestral")
    doubles = {[n for n in workflow if workflow[n]["class_type"] == name][1] for name in twice}
    events = [e for e in events_of(workflow, plan) if e[1].get("node") not in doubles]
    assert watched(workflow, plan, events).seconds()["second"] > 0


def test_the_part_that_begins_is_told():
    workflow = workflow_of(SMALL)
    told: list[str] = []
    watch = Watch(workflow, SMALL, told.append)
    for kind, data in events_of(workflow, SMALL):
        watch({"type": kind, "data": data}, 0.0)
    assert list(dict.fromkeys(told)) == ["load", "prompt", "only", "decode", "png"]
