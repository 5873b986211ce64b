"""Reading weights: both layouts, refused formats, damaged files, memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbo.autoencoder import Autoencoder, AutoencoderConfig
from turbo.checkpoint import (
    Checkpoint,
    check_fit,
    describe_misfit,
    load_weights,
    open_checkpoint,
    open_file,
    open_folder,
)
from turbo.errors import CheckpointError
from turbo.header import read_header
from turbo.names import AUTOENCODER, COMPONENTS, NETWORK, TEXT_ENCODER
from turbo.testing import make_tiny_model
from turbo.text_encoder import TextEncoder, TextEncoderConfig
from turbo.transformer import Transformer, TransformerConfig

ANY_FILE = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SINGLE_FILES = {
    NETWORK: "diffusion_models/z_image_turbo_bf16.safetensors",
    TEXT_ENCODER: "text_encoders/qwen_3_4b.safetensors",
    AUTOENCODER: "vae/ae.safetensors",
}
FOLDERS = {NETWORK: "transformer", TEXT_ENCODER: "text_encoder", AUTOENCODER: "vae"}
MODULES: dict[str, tuple[Any, Any]] = {
    NETWORK: (TransformerConfig, Transformer),
    TEXT_ENCODER: (TextEncoderConfig, TextEncoder),
    AUTOENCODER: (AutoencoderConfig, Autoencoder),
}


class Weights:
    """The smallest thing that can be loaded: named tensors."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> None:
        self.tensors = {name: torch.empty(*shape, dtype=dtype) for name, shape in shapes.items()}

    def native_tensors(self) -> dict[str, Tensor]:
        return self.tensors

    def ignored_keys(self, shapes: Mapping[str, Sequence[int]]) -> set[str]:
        return {"norm_final.weight"} & shapes.keys()


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("comfyui") / "tiny") / "models"


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("diffusers") / "tiny", "diffusers")


@pytest.fixture
def network_file(tmp_path: Path) -> Path:
    return write(tmp_path / "network.safetensors", small_network())


def small_network() -> dict[str, Tensor]:
    return {
        "x_pad_token": torch.randn(1, 8).bfloat16(),
        "cap_embedder.1.weight": torch.randn(8, 4).bfloat16(),
        "layers.0.attention.qkv.weight": torch.randn(24, 8).bfloat16(),
    }


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def read_all(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    loaded = Weights(checkpoint.shapes, dtype)
    load_weights(loaded, checkpoint)
    return loaded.tensors


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what a file holds arrives -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("component", COMPONENTS)
def test_both_layouts_give_bit_equal_weights(component, dtype, comfyui: Path, diffusers: Path):
    single = read_all(open_checkpoint(component, comfyui / SINGLE_FILES[component]), dtype)
    folder = read_all(open_checkpoint(component, diffusers / FOLDERS[component]), dtype)
    assert single.keys() == folder.keys()
    assert all(torch.equal(single[name], folder[name]) for name in single)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_module_holds_what_the_file_holds(component: str, comfyui: Path):
    path = comfyui / SINGLE_FILES[component]
    checkpoint = open_file(component, path)
    config, build = MODULES[component]
    module = build(config.from_shapes(checkpoint.shapes), dtype=torch.float32)
    load_weights(module, checkpoint)
    stored = load_file(path)
    for name, tensor in module.native_tensors().items():
        assert torch.equal(tensor, stored[name].float()), name


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_key_of_the_full_size_files_finds_its_place_and_none_is_left(component, shared: Path):
    files = json.loads((shared / "manifest" / "state_dict_shapes.json").read_text())
    listed = list(files.values())[COMPONENTS.index(component)]
    shapes = {name: tuple(shape) for name, (shape, _) in listed.items()}
    config, build = MODULES[component]
    module = build(config.from_shapes(shapes), device="meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in module.native_tensors().items()}
    assert describe_misfit(wanted, shapes, module.ignored_keys(shapes)) == ""


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_is_cast_up(dtype: torch.dtype, tmp_path: Path):
    tensors = {name: tensor.to(dtype) for name, tensor in small_network().items()}
    path = write(tmp_path / "fp8.safetensors", tensors)
    loaded = read_all(open_file(NETWORK, path), torch.bfloat16)
    assert all(torch.equal(loaded[name], tensors[name].bfloat16()) for name in tensors)


def test_values_are_cast_once_from_the_dtype_of_the_file(tmp_path: Path):
    values = {"x_pad_token": torch.randn(1, 4096)}
    path = write(tmp_path / "network.safetensors", values)
    loaded = read_all(open_file(NETWORK, path), torch.float16)
    assert torch.equal(loaded["x_pad_token"], values["x_pad_token"].half())


def test_a_tensor_larger_than_one_reading_arrives_whole(tmp_path: Path):
    values = {"x_pad_token": torch.arange(5_000_000, dtype=torch.float32).reshape(5000, 1000)}
    path = write(tmp_path / "network.safetensors", values)
    assert torch.equal(read_all(open_file(NETWORK, path))["x_pad_token"], values["x_pad_token"])


def test_a_weight_can_be_read_again_after_it_was_overwritten(network_file: Path):
    checkpoint = open_file(NETWORK, network_file)
    loaded = read_all(checkpoint)["x_pad_token"]
    original = loaded.clone()
    loaded.zero_()
    checkpoint.copy_into("x_pad_token", loaded)
    assert torch.equal(loaded, original)


def test_progress_counts_the_tensors(network_file: Path):
    checkpoint, seen = open_file(NETWORK, network_file), []
    weights = Weights(checkpoint.shapes, torch.float32)
    load_weights(weights, checkpoint, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- what does not fit is named ------------------------------------------------------------------


def test_missing_left_over_and_misshapen_tensors_are_counted_and_named(network_file: Path):
    checkpoint = open_file(NETWORK, network_file)
    shapes = checkpoint.shapes | {"x_pad_token": (1, 9), "cap_pad_token": (1, 8)}
    del shapes["layers.0.attention.qkv.weight"]
    with pytest.raises(CheckpointError) as caught:
        check_fit(Weights(shapes, torch.float32), checkpoint)
    message = str(caught.value)
    assert "1 missing (cap_pad_token)" in message
    assert "1 left over (layers.0.attention.qkv.weight)" in message
    assert "x_pad_token is [1, 8] instead of [1, 9]" in message


def test_only_the_first_few_names_are_listed():
    misfit = describe_misfit({f"layer.{i}": (1,) for i in range(9)}, {})
    assert misfit == "9 missing (layer.0, layer.1, layer.2, ...)"


def test_the_unused_final_norm_of_some_network_files_is_ignored(tmp_path: Path):
    tensors = small_network()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    path = write(tmp_path / "n.safetensors", tensors | {"norm_final.weight": torch.ones(8)})
    load_weights(Weights(shapes, torch.float32), open_file(NETWORK, path))


def test_nothing_is_written_when_the_names_do_not_fit(network_file: Path):
    weights = Weights({"x_pad_token": (1, 8), "cap_pad_token": (1, 8)}, torch.float32)
    weights.tensors["x_pad_token"].fill_(7)
    with pytest.raises(CheckpointError):
        load_weights(weights, open_file(NETWORK, network_file))
    assert weights.tensors["x_pad_token"].eq(7).all()


def test_a_file_of_another_model_is_refused_with_its_first_names(tmp_path: Path):
    path = write(tmp_path / "other.safetensors", {"double_blocks.0.img_in.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"no Z-Image network .*double_blocks\.0\.img_in"):
        open_file(NETWORK, path)


def test_one_of_three_fused_parts_is_not_enough(tmp_path: Path):
    tensors = small_network() | {"layers.1.attention.to_q.weight": torch.ones(8, 8)}
    path = write(tmp_path / "network.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"qkv\.weight is made of 3 tensors"):
        open_file(NETWORK, path)


def test_the_same_tensor_under_two_names_is_refused(tmp_path: Path):
    tensors = small_network() | {"model.diffusion_model.x_pad_token": torch.ones(1, 8)}
    path = write(tmp_path / "network.safetensors", tensors)
    with pytest.raises(CheckpointError, match="same tensor under two names"):
        open_file(NETWORK, path)


def test_a_layer_number_beyond_reason_is_refused(tmp_path: Path):
    tensors = small_network() | {"layers.99999999.attention.out.weight": torch.ones(1)}
    path = write(tmp_path / "network.safetensors", tensors)
    with pytest.raises(CheckpointError, match="number beyond"):
        open_file(NETWORK, path)


# --- formats that are refused by content ---------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_whatever_its_suffix(protocol: int, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"weight": [1.0] * 100}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a pickle"):
        open_file(NETWORK, path)


def test_a_zipped_pickle_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    with pytest.raises(CheckpointError, match="is a pickle"):
        open_file(NETWORK, path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PNG and nothing else", "no safetensors file"),
        (b"\0\1", "no safetensors file"),
    ],
)
def test_other_files_are_called_what_they_are(content: bytes, word: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        open_file(NETWORK, path)


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x04"])
def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(start: bytes, tmp_path: Path):
    length = int.from_bytes(start, "little")
    header = b'{"x_pad_token":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    path = write_raw(tmp_path / "model.safetensors", header, bytes(4))
    assert path.read_bytes().startswith(start)
    assert open_file(NETWORK, path).shapes == {"x_pad_token": (1,)}


def test_integer_weights_are_refused(tmp_path: Path):
    tensors = small_network() | {"cap_pad_token": torch.ones(1, 8, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"1 quantised tensors have none \(cap_pad_token\)"):
        open_file(NETWORK, write(tmp_path / "q.safetensors", tensors))


def test_a_weight_without_values_is_refused(tmp_path: Path):
    tensors = small_network() | {"cap_pad_token": torch.ones(0, 8)}
    path = write(tmp_path / "empty.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"cap_pad_token of shape \[0, 8\] has no values"):
        open_file(NETWORK, path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        open_file(NETWORK, tmp_path / "gone.safetensors")


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: Any):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "mine.safetensors", small_network())
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: cannot be read: .*denied$"):
        open_file(NETWORK, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_file(NETWORK, tmp_path / "pipe")


def test_a_file_that_changes_after_opening_is_noticed(network_file: Path):
    checkpoint = open_file(NETWORK, network_file)
    checkpoint.check_unchanged()
    os.utime(network_file, ns=(0, 0))
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.check_unchanged()
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.copy_into("x_pad_token", torch.empty(1, 8))


# --- component folders ---------------------------------------------------------------------------


def shard(folder: Path, tensors: Mapping[str, Tensor], count: int = 2) -> dict[str, str]:
    """Spread tensors over files with an index, as diffusers does."""
    weight_map: dict[str, str] = {}
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::count]}
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("has_index", [True, False])
def test_shards_give_the_same_weights_as_one_file(has_index: bool, tmp_path: Path):
    tensors = small_network()
    shard(tmp_path, tensors)
    if not has_index:
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    loaded = read_all(open_folder(NETWORK, tmp_path))
    assert all(torch.equal(loaded[name], tensors[name].float()) for name in tensors)


def test_one_shard_alone_is_no_component(tmp_path: Path):
    shard(tmp_path, small_network())
    alone = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    with pytest.raises(CheckpointError, match="is one of 2 files of a component; give the folder"):
        open_file(NETWORK, alone)


def test_shards_may_be_links_to_elsewhere(tmp_path: Path):
    shard(tmp_path / "blobs", small_network())
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    assert len(open_folder(NETWORK, snapshot).shapes) == 3


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named(has_index: bool, tmp_path: Path):
    shard(tmp_path, small_network(), count=3)
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    if not has_index:
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"shard .*00002-of-00003\.safetensors is missing"):
        open_folder(NETWORK, tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    weight_map = shard(tmp_path, small_network())
    first = next(iter(weight_map.values()))
    write(tmp_path / first, small_network())
    with pytest.raises(CheckpointError, match="is also in"):
        open_folder(NETWORK, tmp_path)


def test_a_shard_that_lacks_what_its_index_promises_is_refused(tmp_path: Path):
    weight_map = shard(tmp_path, small_network())
    write_index(tmp_path, weight_map | {"cap_pad_token": next(iter(weight_map.values()))})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of its index \(cap_pad_token\)"):
        open_folder(NETWORK, tmp_path)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a\\b", "..", "", "\0", 3, None]
)
def test_an_index_cannot_point_outside_its_folder(file: object, tmp_path: Path):
    write(tmp_path / "x.safetensors", small_network())
    folder = tmp_path / "transformer"
    folder.mkdir()
    write_index(folder, {"x_pad_token": file})
    with pytest.raises(CheckpointError, match="must name files of its own folder"):
        open_folder(NETWORK, folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_a_broken_index_is_refused(content: str, tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    write(tmp_path / "x.safetensors", small_network())
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_folder(NETWORK, tmp_path)


def test_a_folder_with_pickles_alone_says_what_is_there(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    message = r"no \.safetensors or \.gguf file \(there: pytorch_model\.bin\)"
    with pytest.raises(CheckpointError, match=message):
        open_folder(NETWORK, tmp_path)


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        (NETWORK, "rope_theta", 10000.0),
        (NETWORK, "t_scale", 1.0),
        (NETWORK, "t_scale", "1000"),
        (NETWORK, "norm_eps", float("nan")),
        (NETWORK, "axes_dims", [10, 10, 12]),
        (TEXT_ENCODER, "rope_theta", 10**400),
        (TEXT_ENCODER, "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        (TEXT_ENCODER, "rope_scaling", {"type": "yarn", "factor": 4.0}),
        (TEXT_ENCODER, "rms_norm_eps", 1e-5),
        (AUTOENCODER, "scaling_factor", 0.18215),
        (AUTOENCODER, "shift_factor", None),
        (AUTOENCODER, "norm_num_groups", 0),
    ],
)
def test_a_config_that_contradicts_the_model_is_refused(component, key, value, tmp_path: Path):
    folder = make_tiny_model(tmp_path / "m", "diffusers") / FOLDERS[component]
    assert open_folder(component, folder).config
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=r"config\.json: .* must be"):
        open_folder(component, folder)


def test_a_text_encoder_with_fewer_layers_than_its_config_says_is_refused(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "m", "diffusers") / FOLDERS[TEXT_ENCODER]
    edit_json(folder / "config.json", num_hidden_layers=36)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 36, but .* holds 4 layers; a"):
        open_folder(TEXT_ENCODER, folder)


def test_the_config_of_transformers_5_is_understood(diffusers: Path, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes((diffusers / "text_encoder" / "config.json").read_bytes())
    edit_json(path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    (tmp_path / "model.safetensors").symlink_to(diffusers / "text_encoder" / "model.safetensors")
    assert open_folder(TEXT_ENCODER, tmp_path).config["rope_theta"] is None


# --- damaged files: one clear error, never another exception -------------------------------------

WHOLE_HEADER: dict[str, Any] = {
    "x_pad_token": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "cap_pad_token": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def whole_file() -> bytes:
    header = json.dumps(WHOLE_HEADER).encode()
    return struct.pack("<Q", len(header)) + header + bytes(range(24))


def assert_reads_or_is_refused(path: Path) -> None:
    message = str(path)
    try:
        read_all(open_file(NETWORK, path))
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message


@given(cut=st.integers(0, len(whole_file()) - 1))
@ANY_FILE
def test_a_truncated_file_is_refused_wherever_it_was_cut(cut: int, tmp_path: Path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole_file()[:cut])
    with pytest.raises(CheckpointError):
        open_file(NETWORK, path)


@given(
    flips=st.dictionaries(st.integers(0, len(whole_file()) - 1), st.integers(0, 255), min_size=1)
)
@ANY_FILE
def test_flipped_bytes_never_raise_anything_else(flips: dict[int, int], tmp_path: Path):
    damaged = bytearray(whole_file())
    for place, value in flips.items():
        damaged[place] = value
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(damaged)
    assert_reads_or_is_refused(path)


@given(content=st.binary(max_size=200))
@ANY_FILE
def test_any_bytes_never_raise_anything_else(content: bytes, tmp_path: Path):
    path = tmp_path / "noise.safetensors"
    path.write_bytes(content)
    assert_reads_or_is_refused(path)


@given(length=st.integers(0, 2**64 - 1).filter(lambda n: n != len(json.dumps(WHOLE_HEADER))))
@ANY_FILE
def test_a_wrong_header_length_is_refused(length: int, tmp_path: Path):
    header = json.dumps(WHOLE_HEADER).encode()
    path = write_raw(tmp_path / "length.safetensors", header, bytes(24), length)
    with pytest.raises(CheckpointError):
        open_file(NETWORK, path)


@given(
    offsets=st.lists(st.integers(-(2**65), 2**65), max_size=3).filter(lambda o: o != [0, 16]),
)
@ANY_FILE
def test_wrong_offsets_are_refused(offsets: list[int], tmp_path: Path):
    entry = WHOLE_HEADER["x_pad_token"] | {"data_offsets": offsets}
    header = json.dumps(WHOLE_HEADER | {"x_pad_token": entry}).encode()
    with pytest.raises(CheckpointError):
        open_file(NETWORK, write_raw(tmp_path / "offsets.safetensors", header, bytes(24)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(entry=JSON, name=st.sampled_from(["x_pad_token", "__metadata__", "a\nb\0"]))
@ANY_FILE
def test_any_json_in_the_header_never_raises_anything_else(entry, name: str, tmp_path: Path):
    header = json.dumps(WHOLE_HEADER | {name: entry}).encode()
    path = write_raw(tmp_path / "json.safetensors", header, bytes(24))
    assert_reads_or_is_refused(path)


@given(
    shape=st.lists(st.integers(0, 2**64), max_size=4),
    dtype=st.sampled_from(["F32", "F64", "I64", "U8", "F4", "F8_E8M0", "BOOL", "C64", "X"]),
)
@ANY_FILE
def test_any_shape_and_dtype_never_raise_anything_else(shape, dtype: str, tmp_path: Path):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0 if 0 in shape else 16]}
    header = json.dumps({"x_pad_token": entry}).encode()
    data = bytes(entry["data_offsets"][1])
    assert_reads_or_is_refused(write_raw(tmp_path / "shape.safetensors", header, data))


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON at all ",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[]",
        b'{"x_pad_token": {"dtype": "F32", "shape": [0, 99999999999], "data_offsets": [0, 0]}}',
        b'{"x_pad_token": {"dtype": "F32", "shape": [0, 4294967296, 4294967296], '
        b'"data_offsets": [0, 0]}}',
        b'{"x_pad_token": {"dtype": "F32", "shape": ['
        + b"0, " * 64
        + b'0], "data_offsets": [0, 0]}}',
        b'{"\xff": 1}',
    ],
)
def test_a_header_that_is_no_table_of_contents_is_refused(header: bytes, tmp_path: Path):
    path = write_raw(tmp_path / "header.safetensors", header)
    with pytest.raises(CheckpointError, match=r"header\.safetensors"):
        open_file(NETWORK, path)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path):
    entry = b'"x_pad_token":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    path = write_raw(tmp_path / "twice.safetensors", b"{" + entry + b"," + entry + b"}", bytes(4))
    with pytest.raises(CheckpointError, match=r"comes twice .*x_pad_token"):
        read_header(path)


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from turbo.checkpoint import load_weights, open_checkpoint

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

class Weights:
    def __init__(self, shapes):
        self.tensors = {n: torch.empty(s, dtype=torch.bfloat16) for n, s in shapes.items()}
    def native_tensors(self):
        return self.tensors
    def ignored_keys(self, shapes):
        return set()

torch.set_num_threads(1)
before = peak()
checkpoint = open_checkpoint("network", sys.argv[1])
weights = Weights(checkpoint.shapes)
load_weights(weights, checkpoint)
sizes = [t.nbytes for t in weights.tensors.values()]
print(peak() - before, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory figures")
@pytest.mark.parametrize("layout", ["file", "shards"])
def test_loading_takes_little_more_memory_than_the_weights(layout: str, tmp_path: Path):
    piece = torch.ones(2048, 2048, dtype=torch.bfloat16)
    tensors = {
        "x_pad_token": torch.ones(1, 2048, dtype=torch.bfloat16),
        "layers.0.feed_forward.w1.weight": torch.ones(8192, 2048, dtype=torch.bfloat16),
    }
    for layer in range(5):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            tensors[f"layers.{layer}.attention.{name}.weight"] = piece.clone()
    if layout == "file":
        path = write(tmp_path / "network.safetensors", tensors)
    else:
        shard(tmp_path, tensors, count=3)
        path = tmp_path
    command = [sys.executable, "-c", MEASURE, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    extra, size, largest = map(int, out.split())
    assert size > 190 << 20
    assert extra <= 1.1 * size + largest
