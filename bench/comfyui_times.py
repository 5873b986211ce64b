"""What a ComfyUI server did in a run, and for how long, read from the events of its WebSocket.

A node's time lasts from its `executing` event to the next node's; the last one's to the end. Nodes
that an answer is given for without computing send no `executing` event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.side import SideError
from turbo.comfyui_workflow import Workflow, picture_node, sampler_nodes
from turbo.plan import Plan

LOADERS = frozenset(
    {
        "CLIPLoader",
        "CLIPLoaderGGUF",
        "CheckpointLoaderSimple",
        "LoraLoader",
        "LoraLoaderModelOnly",
        "LorapathLoader",
        "UNETLoader",
        "UnetLoaderGGUF",
        "VAELoader",
    }
)
TEXT_ENCODERS = frozenset({"CLIPTextEncode", "ConditioningZeroOut"})
COMPUTING = frozenset({"CLIPTextEncode", "KSampler", "SamplerCustom", "VAEDecode"})
"""Nodes whose result must not come from the server's cache."""
PREPARE = "prepare"
"""From the start of a run to its first node: ComfyUI looks through its cache. Part of `total`."""


def node_parts(workflow: Workflow, plan: Plan) -> dict[str, str]:
    """Node id -> the part of a picture that its time belongs to, for `workflow_from_plan`'s nodes.

    Parts: ``load``, ``prompt``, each stage by its name, ``decode`` and ``png`` of the last picture,
    and ``<stage> picture`` for decoding and saving an earlier one.
    """
    parts = {
        node: "load" if entry["class_type"] in LOADERS else "prompt"
        for node, entry in workflow.items()
        if entry["class_type"] in LOADERS | TEXT_ENCODERS
    }
    for sampler, stage in sampler_nodes(plan).items():
        for node in [sampler, *_ancestors(workflow, sampler)]:
            parts.setdefault(node, stage.name)  # a stage before has its nodes already
    for node, entry in workflow.items():
        if entry["class_type"] == "SaveImage":
            decode = entry["inputs"]["images"][0]
            earlier = parts[workflow[decode]["inputs"]["samples"][0]] + " picture"
            last = node == picture_node(plan)
            parts[decode], parts[node] = ("decode", "png") if last else (earlier, earlier)
    return parts


def _ancestors(workflow: Workflow, node: str) -> Iterator[str]:
    for value in workflow[node]["inputs"].values():
        if isinstance(value, list):
            yield value[0]
            yield from _ancestors(workflow, value[0])


class Watch:
    """Takes a run's events as they come; `seconds` tells the result.

    Args:
        workflow: What runs.
        plan: What it was made from.
        on_part: Told which part begins.
    """

    def __init__(
        self, workflow: Workflow, plan: Plan, on_part: Callable[[str], None] | None = None
    ) -> None:
        self.events = 0
        """How many came, each with one look at the clock."""
        self._workflow = workflow
        self._samplers = sampler_nodes(plan)
        self._parts = node_parts(workflow, plan)
        self._on_part = on_part
        self._seconds: dict[str, float] = {}
        self._begin: float | None = None
        self._end: float | None = None
        self._part = PREPARE
        self._since = 0.0
        self._begun: set[str] = set()
        self._cached: set[str] = set()
        self._steps: dict[str, tuple[Any, Any]] = {}

    def __call__(self, event: Mapping[str, Any], moment: float) -> None:
        """Take one event and the moment at which it came."""
        self.events += 1
        kind, data = event["type"], event["data"]
        if kind == "execution_start":
            self._begin = self._since = moment
        elif kind == "execution_cached":
            self._cached.update(data.get("nodes", ()))
        elif kind == "progress":
            self._steps[data.get("node")] = (data.get("value"), data.get("max"))
        elif kind == "executing" and data.get("node") is not None:
            self._next(data["node"], moment)
        elif kind in ("execution_success", "executing"):
            self._book(moment)
            self._end = self._end or moment

    def _next(self, node: str, moment: float) -> None:
        self._book(moment)
        self._begun.add(node)
        self._part = self._parts.get(node, PREPARE)
        if self._on_part is not None:
            self._on_part(self._part)

    def _book(self, moment: float) -> None:
        if self._begin is not None and self._end is None:
            passed = moment - self._since
            self._seconds[self._part] = self._seconds.get(self._part, 0.0) + passed
            self._since = moment

    def seconds(self) -> dict[str, float]:
        """Part -> seconds, and `total`: all but loading, the PNG and earlier stages' pictures.

        Raises:
            SideError: Something came from the server's cache, was not finished, or was not told.
        """
        self._check_computed()
        self._check_told()
        left_out = {"load", "png", *(p for p in self._parts.values() if p.endswith(" picture"))}
        total = sum(s for part, s in self._seconds.items() if part not in left_out)
        return self._seconds | {"total": total}

    def _check_computed(self) -> None:
        cached = [n for n in self._workflow if n in self._cached and self._is_computing(n)]
        if cached:
            named = ", ".join(f"{n} ({self._workflow[n]['class_type']})" for n in cached)
            raise SideError(
                f"ComfyUI took node {named} from its cache instead of computing: its last picture "
                "had the same text; give each round new prompts, the negative one too"
            )

    def _is_computing(self, node: str) -> bool:
        return self._workflow[node]["class_type"] in COMPUTING

    def _check_told(self) -> None:
        if not self.events:
            raise SideError(
                "ComfyUI's WebSocket told nothing, so a picture's parts have no times; "
                "pip install 'turbo[comfyui]' adds the library that listens"
            )
        for node, stage in self._samplers.items():
            step, steps = self._steps.get(node, (0, None))
            if step != steps:
                raise SideError(
                    f"ComfyUI: {stage.name} ended only at step {step} of {steps or 'none'}"
                )
        same = {self._signature(node) for node in self._begun | self._cached}
        missed = [node for node in self._workflow if self._signature(node) not in same]
        if self._begin is None or self._end is None or missed:
            raise SideError(
                "ComfyUI's WebSocket did not tell the whole run (it was cut off on the way), so "
                "this picture has no times; try again"
            )

    def _signature(self, node: str) -> tuple[Any, ...]:
        """Equal for nodes that compute the same: ComfyUI runs one of them."""
        entry = self._workflow[node]
        inputs = (
            (name, (self._signature(value[0]), value[1]) if isinstance(value, list) else value)
            for name, value in sorted(entry["inputs"].items())
        )
        return (entry["class_type"], *inputs)
