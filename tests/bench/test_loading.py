"""``bench loading``: each form is the same network, and what it measures is of that network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import loading
from bench.random_model import FULL
from turbo.checkpoint import load_weights, open_checkpoint
from turbo.names import NETWORK
from turbo.testing import initialise, zimage_shapes
from turbo.transformer import Transformer, TransformerConfig

SMALL = {
    "dim": 64,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 32,
    "ffn_hidden": 96,
}
linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's memory figures"
)


def tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(NETWORK, path)
    network = Transformer(TransformerConfig.from_shapes(checkpoint.shapes), dtype=torch.bfloat16)
    load_weights(network, checkpoint)
    return network.native_tensors()


@pytest.mark.parametrize("form", loading.FORMS)
def test_each_form_holds_the_network(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "SHARD_BYTES", 20_000)
    pytest.importorskip("gguf")
    weights = {
        name: tensor.bfloat16() for name, tensor in initialise(zimage_shapes(SMALL), 0).items()
    }
    found = tensors(loading.FORMS[form](tmp_path, weights))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        off = (found[name].float() - weight.float()).abs().max() / weight.abs().max()
        assert off <= (0.01 if form == "gguf" else 0)  # 8 bits a value


def test_the_made_up_network_is_as_large_as_asked():
    shapes = zimage_shapes(loading.sizes_of(2.0))
    assert 2e9 <= 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) < 2.4e9


@linux
def test_a_reading_is_measured_in_a_process_of_its_own(tmp_path: Path):
    sizes = {**FULL.network, "dim": 960, "n_layers": 2, "n_refiner_layers": 1}
    [found] = loading.measure(["diffusers"], tmp_path, sizes=sizes, threads=[1])
    assert (found["form"], found["threads"]) == ("diffusers", 1)
    # The weights are written to, so they are in the peak.
    assert found["weight_bytes"] <= found["peak_bytes"]
    assert found["seconds"] > 0
    assert found["allowed_bytes"] == int(1.1 * found["weight_bytes"] + found["largest_bytes"])
    assert list(tmp_path.iterdir()) == []
