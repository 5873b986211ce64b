"""The graph in a ComfyUI workflow in API format: nodes, and typed access to their inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from turbo.comfyui_workflow import SEED_NODE
from turbo.errors import WorkflowError
from turbo.messages import one_line

# Nodes that only hold a value, and the input it is in.
_VALUE_NODES: Mapping[str, str] = {
    SEED_NODE: "seed",
    "PrimitiveBoolean": "value",
    "PrimitiveFloat": "value",
    "PrimitiveInt": "value",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
}


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a workflow."""

    name: str
    """Its id."""
    class_type: str
    """What it is."""
    inputs: Mapping[str, Any] = field(repr=False)
    """Input name -> value, or [id of the node that feeds it, index of the output]."""

    def __str__(self) -> str:
        return one_line(f"node {self.name} ({self.class_type})", 100)

    def refuse(self, why: str) -> NoReturn:
        """Raise the error for a node that a plan cannot express."""
        raise WorkflowError(f"{self}: {why}")


class Graph:
    """The nodes of a workflow in API format. What cannot be read is a `WorkflowError`."""

    def __init__(self, workflow: Mapping[str, Any]) -> None:
        _check_format(workflow)
        self.nodes = {name: _read_node(name, node) for name, node in workflow.items()}

    def link(self, node: Node, name: str) -> tuple[Node, int]:
        """The node that feeds an input, and which of its outputs it is."""
        value = node.inputs.get(name)
        if value is None:
            node.refuse(f"input {name} is missing")
        if not _is_link(value):
            node.refuse(f"input {name} must be connected to a node, got {_short(value)}")
        source = self.nodes.get(str(value[0]))
        if source is None:
            node.refuse(f"input {name} is connected to node {_short(value[0])}, which is not there")
        return source, value[1]

    def value(self, node: Node, name: str) -> Any:
        """An input's value, also when a node that only holds a value feeds it."""
        seen = 0
        while _is_link(node.inputs.get(name)):
            source, _ = self.link(node, name)
            seen += 1
            if source.class_type not in _VALUE_NODES or seen > len(self.nodes):
                node.refuse(f"input {name} is computed by {source}; put the value itself there")
            node, name = source, _VALUE_NODES[source.class_type]
        if name not in node.inputs:
            node.refuse(f"input {name} is missing")
        return node.inputs[name]

    def text(self, node: Node, name: str) -> str:
        """An input's value as text."""
        value = self.value(node, name)
        if not isinstance(value, str):
            node.refuse(f"{name} must be text, got {_short(value)}")
        return value

    def number(self, node: Node, name: str) -> float:
        """An input's value as a finite number."""
        value = self.value(node, name)
        try:
            number = float(value)  # ComfyUI takes numbers written as text, too
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number):
            node.refuse(f"{name} must be a number, got {_short(value)}")
        return number

    def integer(self, node: Node, name: str) -> int:
        """An input's value as a whole number."""
        value = self.value(node, name)
        if type(value) is int and abs(value) < 2**64:
            return value
        number = self.number(node, name)
        if number != int(number) or abs(number) > 2**53:  # beyond that a float is not exact
            node.refuse(f"{name} must be a whole number, got {_short(value)}")
        return int(number)

    def expect(self, node: Node, values: Mapping[str, Any]) -> None:
        """Refuse inputs that have another value than the one we can reproduce."""
        for name, wanted in values.items():
            if name not in node.inputs:
                continue
            numeric = isinstance(wanted, int | float) and not isinstance(wanted, bool)
            got = self.number(node, name) if numeric else self.value(node, name)
            if got != wanted:
                node.refuse(f"{name} must be {wanted}, got {_short(got)}")


def _check_format(workflow: object) -> None:
    if not isinstance(workflow, Mapping) or not workflow:
        raise WorkflowError("a workflow is a JSON object of nodes in ComfyUI's API format")
    if isinstance(workflow.get("nodes"), list):
        raise WorkflowError(
            "this workflow is in the editor's format; in ComfyUI choose Workflow > Export (API) "
            "(older versions: Save (API Format), with the dev mode switched on) and give that file"
        )


def _read_node(name: object, node: object) -> Node:
    inputs = node.get("inputs") if isinstance(node, Mapping) else None
    class_type = node.get("class_type") if isinstance(node, Mapping) else None
    if not isinstance(inputs, Mapping) or not isinstance(class_type, str):
        raise WorkflowError(
            f"node {_short(name)} has no class_type and inputs; "
            "give a workflow exported in API format"
        )
    return Node(str(name), class_type, inputs)


def _is_link(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str | int)
        and type(value[1]) is int
    )


def _short(value: object) -> str:
    return one_line(repr(value), 60)
