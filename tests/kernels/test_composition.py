"""The operations inside compiled functions: no break in the graph, and only what they say changes.

Without a GPU the functions are traced with tensors that hold nothing, for a GPU that is not there;
this shows all that comes before Inductor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from tests.kernels.conftest import INTERPRETED

triton = pytest.importorskip("triton", reason="the kernels need Triton")

from turbo.kernels.easycache import (  # noqa: E402
    STATE_SIZE,
    Place,
    easycache_compare,
    easycache_observe,
)
from turbo.kernels.latent_upscale import latent_upscale  # noqa: E402


def upscale(latent: Tensor, noise: Tensor) -> Tensor:
    start: Tensor = latent_upscale(2 * latent, noise, 0.5, 6, 10, scale=2.0)
    return start + 1


def compare(latent: Tensor, last_input: Tensor, state: Tensor) -> Tensor:
    easycache_compare(2 * latent, last_input, state, 0.3, parity=True)
    return state[Place.SKIP] + 1


def observe(
    latent: Tensor,
    output: Tensor,
    last_input: Tensor,
    last_output: Tensor,
    difference: Tensor,
    state: Tensor,
) -> Tensor:
    kept = (last_input, last_output, difference)
    easycache_observe(latent, 2 * output, *kept, state, 0, measured=True)
    return latent + difference


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "upscale": (upscale, [(1, 4, 3, 5), (1, 4, 6, 10)]),
    "compare": (compare, [(1, 4, 9, 20), (1, 4, 2, 3), (STATE_SIZE,)]),
    "observe": (
        observe,
        [*[(2, 4, 9, 20)] * 2, *[(1, 4, 2, 3)] * 2, (2, 4, 9, 20), (STATE_SIZE,)],
    ),
}
CHANGED = {
    "upscale": ["out_ptr"],
    "compare": ["state_ptr"],
    "observe": ["last_input_ptr", "last_output_ptr", "difference_ptr", "state_ptr"],
}


class AbsentGpu:
    """As much of a driver as tracing asks for."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's kernels cannot be traced")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_traced_whole_and_changes_what_it_says(
    monkeypatch: pytest.MonkeyPatch, name: str, dynamic: bool
):
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu())
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function, shapes = FUNCTIONS[name]
    compiled = torch.compile(
        function, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=keep)
    )
    arguments = [torch.empty(shape, device="meta") for shape in shapes]
    got = compiled(*arguments)
    want = function(*arguments)
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    launches = [node for node in graphs[0].graph.nodes if "triton_kernel" in str(node.target)]
    assert [node.kwargs["tensors_to_clone"] for node in launches] == [CHANGED[name]]


def example(name: str, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in FUNCTIONS[name][1]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_registered_as_it_behaves(device: str, name: str):
    operations = {
        "upscale": (latent_upscale, (0.5, 6, 10), {}),
        "compare": (easycache_compare, (0.3,), {}),
        "observe": (easycache_observe, (0,), {"measured": True}),
    }
    operation, numbers, options = operations[name]
    checks = ["test_schema", "test_autograd_registration"]
    if not INTERPRETED:
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operation, (*example(name, device), *numbers), options, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_operation_computes_the_same(name: str):
    function = FUNCTIONS[name][0]
    eager, compiled = example(name, "cuda"), example(name, "cuda")
    want = function(*eager)
    torch._dynamo.reset()
    got = torch.compile(function, fullgraph=True)(*compiled)
    for one, other in zip([got, *compiled], [want, *eager]):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
