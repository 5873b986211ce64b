"""The three modules of a model, built from the headers of its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from turbo.checkpoint import Checkpoint
from turbo.components import Components, component_dtypes
from turbo.errors import CheckpointError
from turbo.model_files import find_model_files
from turbo.names import COMPONENTS
from turbo.testing import make_tiny_model


@pytest.fixture
def checkpoints(tmp_path: Path) -> Mapping[str, Checkpoint]:
    return find_model_files(make_tiny_model(tmp_path / "model")).open()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_modules_are_built_where_and_how_they_are_wanted(
    checkpoints: Mapping[str, Checkpoint], device: str
):
    dtypes = component_dtypes(torch.float16)
    modules = Components.build(checkpoints, device, dtypes).by_name()
    assert set(modules) == set(COMPONENTS)
    for component, module in modules.items():
        held = {(weight.device.type, weight.dtype) for weight in module.parameters()}
        assert held == {(device, dtypes[component])}


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_outline_is_refused_for_files_that_do_not_fit(
    checkpoints: Mapping[str, Checkpoint], component: str
):
    dtypes = component_dtypes(torch.bfloat16)
    outline = Components.outline(checkpoints, dtypes)
    assert all(weight.is_meta for weight in outline.by_name()[component].parameters())
    checkpoints[component].shapes["extra.weight"] = (1,)
    with pytest.raises(CheckpointError, match=r"1 left over \(extra\.weight\)"):
        Components.outline(checkpoints, dtypes)


@pytest.mark.parametrize("component", COMPONENTS)
def test_sizes_beyond_64_bits_are_refused(checkpoints: Mapping[str, Checkpoint], component: str):
    shapes = checkpoints[component].shapes
    shapes.update({name: (2**32,) * len(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match="shapes that no module can have: Storage size") as e:
        Components.outline(checkpoints, component_dtypes(torch.float32))
    assert "\n" not in str(e.value)


def test_only_the_autoencoder_does_not_work_in_float16():
    assert list(component_dtypes(torch.bfloat16).values()) == [torch.bfloat16] * 3
    assert component_dtypes(torch.float16)["autoencoder"] == torch.float32
