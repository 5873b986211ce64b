"""GGUF files: what they hold arrives, whatever is damaged is one clear error."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.turbo.gguf_model import (
    convert,
    mostly,
    random_blocks,
    write_gguf,
    write_network,
    write_text_encoder,
)
from turbo.checkpoint import Checkpoint, open_file, open_folder, open_header
from turbo.engine import Engine
from turbo.errors import CheckpointError, LoraError
from turbo.gguf_file import is_readable, read_gguf_header
from turbo.info import collect_info
from turbo.lora import read_lora
from turbo.memory import count_memory, weight_dtypes
from turbo.model_files import find_model_files
from turbo.names import NETWORK, TEXT_ENCODER
from turbo.plan import DEFAULT_PLAN, Plan, Stage
from turbo.testing import make_tiny_model
from turbo.text_encoder import TextEncoderConfig

ANY_FILE = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PLAN = Plan(stages=(Stage(name="only", height=48, width=32, steps=2),))
NETWORK_FILE = "diffusion_models/z_image_turbo_bf16.safetensors"
TEXT_FILE = "text_encoders/qwen_3_4b.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("original") / "tiny") / "models"


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    """A models folder of its own to change."""
    return Path(shutil.copytree(tiny, tmp_path / "models"))


def values(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in checkpoint.shapes.items()}
    for name, tensor in tensors.items():
        checkpoint.copy_into(name, tensor)
    return tensors


def small_network() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "x_pad_token": torch.randn(1, 64, generator=generator),
        "cap_embedder.1.weight": torch.randn(64, 32, generator=generator),
        "layers.0.attention.qkv.weight": torch.randn(192, 64, generator=generator),
    }


def same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


# --- what a file holds arrives -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.F16])
def test_a_network_arrives_bit_equal_to_its_safetensors_file(kind: Kind, tiny: Path, tmp_path):
    source = tiny / NETWORK_FILE
    path = write_network(tmp_path / "network.gguf", source, kind)
    assert len(open_header(path).tensors["x_pad_token"].shape) == 1
    stored = {name: tensor.float() for name, tensor in load_file(source).items()}
    if kind == Kind.F16:
        stored = {name: tensor.half().float() for name, tensor in stored.items()}
    assert same(values(open_file(NETWORK, path)), stored)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_a_text_encoder_arrives_bit_equal_to_its_safetensors_file(kind: Kind, tiny: Path, tmp_path):
    path = write_text_encoder(tmp_path / "qwen.gguf", tiny / TEXT_FILE, kind)
    single = open_file(TEXT_ENCODER, tiny / TEXT_FILE)
    checkpoint = open_file(TEXT_ENCODER, path)
    assert checkpoint.config["rope_theta"] == 1e6
    assert same(values(checkpoint, torch.bfloat16), values(single, torch.bfloat16))


def test_transformers_reads_the_same_text_encoder_from_the_file(tiny: Path, tmp_path: Path):
    """It knows for itself of which architectures rows of q and k are stored in another order."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = tiny / TEXT_FILE
    sizes = TextEncoderConfig.from_shapes(open_file(TEXT_ENCODER, source).shapes)
    path = write_text_encoder(
        tmp_path / "qwen.gguf",
        source,
        Kind.F32,
        **{
            "qwen3.block_count": sizes.num_layers,
            "qwen3.embedding_length": sizes.hidden_size,
            "qwen3.feed_forward_length": sizes.intermediate_size,
            "qwen3.attention.head_count": sizes.num_heads,
            "qwen3.attention.head_count_kv": sizes.num_kv_heads,
            "qwen3.attention.key_length": sizes.head_dim,
        },
    )
    theirs = gguf_tensors_of_transformers(path, load_gguf_checkpoint)
    ours = values(open_file(TEXT_ENCODER, path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].float(), ours[name]) for name in ours)


def gguf_tensors_of_transformers(path: Path, load: Callable[..., Any]) -> dict[str, Tensor]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    parsed = load(str(path))["config"]
    known = {key: value for key, value in parsed.items() if value is not None}
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**known))
    tensors = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


QUANTISATIONS = [
    *(Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ2_XXS, Kind.IQ2_S, Kind.IQ1_S),
]


@pytest.mark.parametrize("kind", QUANTISATIONS, ids=lambda kind: kind.name)
def test_quantised_blocks_become_what_the_package_makes_of_them(kind: Kind, tmp_path: Path):
    blocks = random_blocks(kind, 40, 256 // gguf.GGML_QUANT_SIZES[kind][0])
    path = write_gguf(tmp_path / "network.gguf", {"x_pad_token": blocks}, kind=kind)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    checkpoint = open_file(NETWORK, path)
    assert checkpoint.shapes == {"x_pad_token": (40, 256)}
    assert torch.equal(values(checkpoint)["x_pad_token"], expected)
    half = values(checkpoint, torch.bfloat16)["x_pad_token"]
    assert torch.equal(half, expected.bfloat16())


def test_a_quantised_tensor_larger_than_one_reading_arrives_whole(tmp_path: Path):
    blocks = random_blocks(Kind.Q8_0, 5000, 32)
    path = write_gguf(tmp_path / "n.gguf", {"x_pad_token": blocks}, kind=Kind.Q8_0)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, Kind.Q8_0))
    assert torch.equal(values(open_file(NETWORK, path))["x_pad_token"], expected)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("architecture", ["lumina2", None])
def test_networks_with_and_without_prefix_and_architecture_are_read(
    prefix: str, architecture: str | None, tmp_path: Path
):
    tensors = {prefix + name: tensor for name, tensor in small_network().items()}
    path = write_gguf(tmp_path / "network.safetensors", tensors, architecture)
    assert same(values(open_file(NETWORK, path)), small_network())


def test_the_header_says_what_the_packages_own_reader_says(tiny: Path, tmp_path: Path):
    path = write_text_encoder(tmp_path / "q.gguf", tiny / TEXT_FILE, mostly(Kind.Q8_0))
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert entry.dtype == tensor.tensor_type.name
        assert entry.offset == tensor.data_offset
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
    assert header.metadata["qwen3.rope.freq_base"] == 1e6
    assert "tokenizer.ggml.tokens" not in header.metadata


# --- a whole engine ------------------------------------------------------------------------------


def load(path: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(path, plan=PLAN, device="cpu", dtype="float32", **options)


def picture(engine: Engine) -> bytes:
    return engine.generate("a red apple", seed=1).image.tobytes()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_unquantised_gguf_files_give_the_pictures_of_the_safetensors_model(
    kind: Kind, tiny: Path, models: Path
):
    files = find_model_files(convert(models, kind))
    assert (files.network.suffix, files.text_encoder.suffix) == (".gguf", ".gguf")
    assert picture(load(models)) == picture(load(tiny))


def test_quantised_gguf_files_give_the_pictures_of_their_dequantised_values(
    tiny: Path, models: Path, tmp_path: Path
):
    convert(models, mostly(Kind.Q8_0))
    plain = Path(shutil.copytree(tiny, tmp_path / "plain"))
    for component, file in ((NETWORK, NETWORK_FILE), (TEXT_ENCODER, TEXT_FILE)):
        path = find_model_files(models).open()[component].files[0]
        save_file(values(open_file(component, path)), plain / file)
    assert picture(load(models)) == picture(load(plain))
    assert picture(load(models)) != picture(load(tiny))


def test_a_lora_on_quantised_files_is_taken_out_bit_for_bit(models: Path, tmp_path: Path):
    engine = load(convert(models, mostly(Kind.Q4_0)))
    weights = engine.models.transformer.native_tensors() | (
        engine.models.text_encoder.native_tensors()
    )
    before = {name: tensor.clone() for name, tensor in weights.items()}
    name = "layers.0.attention.out"
    change = {f"diffusion_model.{name}.diff": torch.full_like(before[f"{name}.weight"], 0.5)}
    save_file(change, tmp_path / "lora.safetensors")
    engine.set_loras([(tmp_path / "lora.safetensors", 1.0)])
    assert torch.equal(weights[f"{name}.weight"], before[f"{name}.weight"] + 0.5)
    engine.set_loras([])
    assert same(weights, before)


def test_memory_and_info_count_gguf_files_like_others(tiny: Path, models: Path):
    convert(models, mostly(Kind.Q8_0))
    dtypes = weight_dtypes("float32", "cpu")
    need, plain = (
        count_memory(find_model_files(folder).open(), DEFAULT_PLAN, dtypes)
        for folder in (models, tiny)
    )
    assert replace(need, low=None) == plain
    network = collect_info(models)["model"]["components"]["network"]
    assert network["files"] == [str(models / "unet" / "z_image_turbo.gguf")]
    assert network["tensors"] == len(load_file(tiny / NETWORK_FILE))


def test_a_name_without_suffix_is_looked_up_as_a_gguf_file_too(models: Path):
    convert(models, Kind.BF16)
    assert find_model_files(models, diffusion_model="z_image_turbo").network.suffix == ".gguf"


def test_gguf_files_in_a_diffusers_folder_give_the_pictures_of_its_safetensors(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "diffusers", layout="diffusers")
    expected = picture(load(folder))
    sources = make_tiny_model(tmp_path / "comfyui") / "models"
    for name in ("transformer", "text_encoder"):
        for file in (folder / name).glob("*.safetensors*"):
            file.unlink()
    write_network(folder / "transformer" / "network.gguf", sources / NETWORK_FILE, Kind.BF16)
    write_text_encoder(folder / "text_encoder" / "q.gguf", sources / TEXT_FILE, Kind.BF16)
    assert picture(load(folder)) == expected


def test_several_gguf_files_in_a_component_folder_are_refused(tmp_path: Path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, small_network())
    with pytest.raises(CheckpointError, match=r"several GGUF files \(a\.gguf, b\.gguf\); keep one"):
        open_folder(NETWORK, tmp_path)


def test_safetensors_in_a_component_folder_win_over_gguf(tmp_path: Path):
    save_file(small_network(), tmp_path / "model.safetensors")
    write_gguf(tmp_path / "model.gguf", small_network(), kind=mostly(Kind.Q8_0))
    assert open_folder(NETWORK, tmp_path).files == (tmp_path / "model.safetensors",)


def test_what_a_gguf_file_says_in_a_component_folder_is_checked_too(tiny: Path, tmp_path: Path):
    said = {"qwen3.rope.freq_base": 1e4}
    write_text_encoder(tmp_path / "q.gguf", tiny / TEXT_FILE, Kind.BF16, **said)
    with pytest.raises(CheckpointError, match=r"rope_theta is 10000\.0, must be 1000000\.0"):
        open_folder(TEXT_ENCODER, tmp_path)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "flux", "qwen3moe", "qwen2vl"])
def test_another_architecture_is_refused_by_name(architecture: str, tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", small_network(), architecture)
    message = rf"GGUF file of the architecture {architecture}; readable are lumina2 .*qwen3"
    with pytest.raises(CheckpointError, match=message):
        open_file(NETWORK, path)


def test_a_network_given_as_the_text_encoder_is_refused(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", small_network())
    with pytest.raises(CheckpointError, match=r"no Qwen3 text encoder .*x_pad_token"):
        open_file(TEXT_ENCODER, path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qwen3.rope.freq_base": 1e4}, "rope_theta is 10000.0, must be 1000000.0"),
        ({"qwen3.rope.scaling.type": "yarn"}, "rope_type is 'yarn', must be default"),
        ({"qwen3.attention.layer_norm_rms_epsilon": 1e-5}, "rms_norm_eps is"),
    ],
)
def test_a_text_encoder_that_computes_otherwise_is_refused(settings, message, tiny, tmp_path):
    path = write_text_encoder(tmp_path / "q.gguf", tiny / TEXT_FILE, Kind.BF16, **settings)
    with pytest.raises(CheckpointError, match=message):
        open_file(TEXT_ENCODER, path)


def test_a_text_encoder_without_rope_scaling_may_say_so(tiny: Path, tmp_path: Path):
    said = {"qwen3.rope.scaling.type": "none"}
    path = write_text_encoder(tmp_path / "q.gguf", tiny / TEXT_FILE, Kind.BF16, **said)
    assert open_file(TEXT_ENCODER, path).config["rope_type"] == "default"


def test_one_part_of_a_split_file_is_refused(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", small_network(), settings={"split.count": 3})
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a GGUF file; join them"):
        open_file(NETWORK, path)


def test_integers_are_refused(tmp_path: Path):
    blocks = np.ones((4, 8), dtype=np.int8)
    path = write_gguf(tmp_path / "m.gguf", {"x_pad_token": blocks}, kind=Kind.I8)
    assert not is_readable("I8")
    with pytest.raises(CheckpointError, match=r"x_pad_token has dtype I8"):
        open_file(NETWORK, path)


def test_scales_beside_quantised_blocks_are_refused(tmp_path: Path):
    tensors = small_network() | {"cap_embedder.1.weight_scale": torch.ones(1)}
    path = write_gguf(tmp_path / "m.gguf", tensors, kind=mostly(Kind.Q8_0))
    with pytest.raises(CheckpointError, match=r"weight_scale belongs to .* of dtype Q8_0"):
        open_file(NETWORK, path)


def test_a_gguf_file_is_no_lora(tmp_path: Path):
    path = write_gguf(tmp_path / "lora.safetensors", small_network())
    with pytest.raises(LoraError, match="is a GGUF file, which cannot be used here"):
        read_lora(path)


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", small_network())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'turbo\[gguf\]'$"):
        open_file(NETWORK, path)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", small_network())
    checkpoint = open_file(NETWORK, path)
    os.truncate(path, path.stat().st_size - 64)
    with pytest.raises(CheckpointError, match="has changed"):
        checkpoint.copy_into("x_pad_token", torch.empty(1, 64))


# --- damaged files: one clear error, never another exception -------------------------------------


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(name: str = "x_pad_token", shape=(2, 2), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return packed(name) + sizes + struct.pack("<IQ", kind, offset)


def setting(key: str = "a", kind: int = 4, value: bytes = bytes(4)) -> bytes:
    return packed(key) + struct.pack("<I", kind) + value


STRINGS = struct.pack("<IQ", 8, 2) + packed("first") + packed("second")


def whole(
    settings: tuple[bytes, ...] = (setting(), setting("b", 9, STRINGS)),
    entries: tuple[bytes, ...] = (entry(), entry("cap_pad_token", (4,), 1, 32)),
    data: bytes = bytes(range(40)),
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors, pairs = counts or (len(entries), len(settings))
    start = b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)
    start += b"".join(settings) + b"".join(entries)
    return start + bytes(-len(start) % 32) + data


CONTENTS = len(whole(data=b"").rstrip(b"\0")) + 7
"""Bytes up to the end of the list of tensors, whose last one is an offset of 32."""


def put(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


def test_the_file_that_is_damaged_below_is_whole_before(tmp_path: Path):
    loaded = values(open_file(NETWORK, put(tmp_path / "whole.gguf", whole())))
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        "x_pad_token": (2, 2),
        "cap_pad_token": (1, 4),
    }


@given(cut=st.integers(4, len(whole()) - 1))
@ANY_FILE
def test_a_truncated_file_is_refused_wherever_it_was_cut(cut: int, tmp_path: Path):
    path = put(tmp_path / "cut.gguf", whole()[:cut])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: is a truncated or damaged GGUF file"):
        open_file(NETWORK, path)


@pytest.mark.parametrize(
    ("cut", "section"),
    [
        (10, "header"),
        (90, "metadata"),
        (140, "list of tensors"),
        (CONTENTS + 1, "or before x_pad_token"),  # what aligns the data
        (len(whole()) - 39, "x_pad_token"),
        (len(whole()) - 1, "cap_pad_token"),
    ],
)
def test_the_message_says_in_which_section_the_file_ends(cut: int, section: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"it ends within .*{section}"):
        open_file(NETWORK, put(tmp_path / "cut.gguf", whole()[:cut]))


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (whole(version=1), "its version is 1, readable are 2 and 3"),
        (whole(version=3 << 24), "its version is big-endian"),
        (whole(counts=(HUGE, 0)), "claims 1152921504606846976 entries in its header"),
        (whole(counts=(2, HUGE)), "claims 1152921504606846976 entries in its header"),
        (whole((setting("a", 9, struct.pack("<IQ", 4, HUGE)),)), "entries in its metadata"),
        (whole((setting("a", 9, struct.pack("<IQ", 8, HUGE)),)), "entries in its metadata"),
        (whole((setting("a", 9, struct.pack("<IQ", 9, 1)),)), "array .* of the unknown type 9"),
        (whole((setting("a", 9, struct.pack("<IQQ", 8, 1, HUGE)),)), "ends within its metadata"),
        (whole((setting("a", 8, struct.pack("<Q", HUGE)),)), "ends within its metadata"),
        (whole((setting("a", 77),)), "a of its metadata is of the unknown type 77"),
        (whole((setting(), setting())), "a comes twice in its metadata"),
        (
            whole((setting("general.alignment", 4, struct.pack("<I", 24)),)),
            "is 24, must be",
        ),
        (whole((setting("general.alignment", 4, bytes(4)),)), "is 0, must be a power of two"),
        (whole((setting("general.alignment", 8, packed("x")),)), "is 'x', must be"),
        (whole(entries=(entry(), entry())), r"a tensor comes twice \(x_pad_token\)"),
        (whole(entries=(entry(kind=99),)), "x_pad_token: the type 99 is not known"),
        (whole(entries=(entry(kind=4),)), "x_pad_token: the type 4 is not known"),
        (whole(entries=(entry(shape=(1,) * 5),)), "5 dimensions, 4 are the most"),
        (whole(entries=(entry(shape=(HUGE, HUGE)),)), "is impossible"),
        (whole(entries=(entry(shape=(2, 33), kind=8),)), r"not made of Q8_0 blocks of 32"),
        (whole(entries=(entry(offset=HUGE),)), "ends within or before x_pad_token"),
        (whole(entries=(entry(offset=4),)), "offset 4 of x_pad_token is not aligned"),
        (whole(entries=(entry(), entry("cap_pad_token", (4,), 0, 0))), "cap_pad_token overlaps"),
        (whole(entries=(packed("")[:-1] + b"\x02" + b"\xff\xfe" + entry()[19:],)), "."),
    ],
)
def test_what_is_damaged_is_named(content: bytes, message: str, tmp_path: Path):
    path = put(tmp_path / "damaged.gguf", content)
    with pytest.raises(CheckpointError, match=rf"damaged\.gguf: .*{message}") as caught:
        open_file(NETWORK, path)
    assert "\n" not in str(caught.value)


def test_a_tensor_without_values_is_refused(tmp_path: Path):
    path = put(tmp_path / "empty.gguf", whole(entries=(entry(shape=(0, 2)),)))
    with pytest.raises(CheckpointError, match=r"x_pad_token of shape \[0, 2\] has no values"):
        open_file(NETWORK, path)


def assert_reads_or_is_refused(path: Path) -> None:
    message = str(path)
    try:
        values(open_file(NETWORK, path))
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message


@given(flips=st.dictionaries(st.integers(4, len(whole()) - 1), st.integers(0, 255), min_size=1))
@ANY_FILE
def test_flipped_bytes_never_raise_anything_else(flips: dict[int, int], tmp_path: Path):
    damaged = bytearray(whole())
    for place, value in flips.items():
        damaged[place] = value
    assert_reads_or_is_refused(put(tmp_path / "flipped.gguf", damaged))


@given(content=st.binary(max_size=200))
@ANY_FILE
def test_any_bytes_never_raise_anything_else(content: bytes, tmp_path: Path):
    assert_reads_or_is_refused(put(tmp_path / "noise.gguf", b"GGUF\3\0\0\0" + content))


@given(
    shape=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 4), max_size=5),
    kind=st.integers(0, 45) | st.integers(0, 2**32 - 1),
    offset=st.integers(0, 2**64 - 1) | st.just(0),
)
@ANY_FILE
def test_any_shape_type_and_offset_never_raise_anything_else(shape, kind, offset, tmp_path: Path):
    content = whole(entries=(entry("x_pad_token", tuple(shape), kind, offset),))
    assert_reads_or_is_refused(put(tmp_path / "shape.gguf", content))


@given(data=st.binary(min_size=144 * 2, max_size=144 * 2))
@ANY_FILE
def test_any_quantised_blocks_become_some_numbers(data: bytes, tmp_path: Path):
    content = whole(entries=(entry(shape=(2, 256), kind=Kind.Q4_K.value),), data=data)
    assert values(open_file(NETWORK, put(tmp_path / "blocks.gguf", content)))["x_pad_token"].numel()


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
import gguf
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
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_K, Kind.BF16], ids=lambda kind: kind.name)
def test_loading_takes_little_more_memory_than_the_weights(kind: Kind, tmp_path: Path):
    def blocks(rows: int) -> np.ndarray:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return np.zeros((rows, 2048 // block * size), dtype=np.uint8)

    tensors = {"x_pad_token": blocks(1), "layers.0.feed_forward.w1.weight": blocks(8192)}
    for layer in range(5):
        for name in ("qkv", "out"):
            tensors[f"layers.{layer}.attention.{name}.weight"] = blocks(4096)
    path = write_gguf(tmp_path / "network.gguf", tensors, kind=kind)
    command = [sys.executable, "-c", MEASURE, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    extra, size, largest = map(int, out.split())
    assert size > 190 << 20
    assert extra <= 1.1 * size + largest
