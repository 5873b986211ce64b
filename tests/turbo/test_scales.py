"""Float8 files with scales: applied in each form in which they exist, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbo.checkpoint import Checkpoint, open_file, open_folder
from turbo.engine import Engine
from turbo.errors import CheckpointError
from turbo.model_files import find_model_files
from turbo.names import NETWORK, TEXT_ENCODER
from turbo.plan import Plan, Stage
from turbo.testing import make_tiny_model

QKV = "layers.0.attention.qkv"
OUT = "layers.0.attention.out"
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


def network(dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """One float8 matrix of known values among bfloat16 ones."""
    matrix = torch.tensor([[1.0, -2.0], [0.5, 4.0], [3.0, 0.0]] * 2)
    return {
        "x_pad_token": torch.ones(1, 2).bfloat16(),
        f"{QKV}.weight": matrix.to(dtype),
        f"{OUT}.weight": torch.full((2, 2), 7.0).bfloat16(),
    }


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def read(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(checkpoint.shapes[name], dtype=dtype)
    checkpoint.copy_into(name, out)
    return out


def settings(**content: Any) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def layers(**formats: Any) -> dict[str, str]:
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}


Extras = dict[str, Tensor]
MARK: Extras = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
THREE = torch.tensor(3.0)


def forms(dtype: torch.dtype) -> dict[str, tuple[Extras, dict[str, str] | None]]:
    """Every way to say that the matrix is to be multiplied by three."""
    said = {"format": FORMATS[dtype]}
    unused = {f"{QKV}.input_scale": torch.tensor(0.25)}
    return {
        "first": (MARK | {f"{QKV}.scale_weight": THREE}, None),
        "first with input": (
            MARK | {f"{QKV}.scale_weight": THREE[None], f"{QKV}.scale_input": torch.ones(1)},
            None,
        ),
        "settings": ({f"{QKV}.weight_scale": THREE, f"{QKV}.comfy_quant": settings(**said)}, None),
        "full": (
            {
                f"{QKV}.weight_scale": THREE,
                f"{QKV}.comfy_quant": settings(**said, full_precision_matrix_mult=True),
                **unused,
            },
            None,
        ),
        "metadata": ({f"{QKV}.weight_scale": THREE}, layers(**{QKV: said})),
        "bare": ({f"{QKV}.weight_scale": THREE.reshape(1, 1).bfloat16()} | unused, None),
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("form", forms(FLOAT8[0]))
@pytest.mark.parametrize("dtype", FLOAT8)
def test_a_scale_of_the_whole_tensor_is_applied(dtype, form: str, prefix: str, tmp_path: Path):
    extras, metadata = forms(dtype)[form]
    tensors = {prefix + name: tensor for name, tensor in (network(dtype) | extras).items()}
    checkpoint = open_file(NETWORK, write(tmp_path / "fp8.safetensors", tensors, metadata))
    assert checkpoint.shapes.keys() == network().keys()
    expected = torch.tensor([[3.0, -6.0], [1.5, 12.0], [9.0, 0.0]] * 2)
    assert torch.equal(read(checkpoint, f"{QKV}.weight"), expected)
    assert torch.equal(read(checkpoint, f"{OUT}.weight"), torch.full((2, 2), 7.0))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_scale_of_each_row_is_applied(shape: tuple[int, ...], tmp_path: Path):
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).reshape(shape)
    path = write(tmp_path / "fp8.safetensors", network() | {f"{QKV}.weight_scale": scale})
    expected = [[1.0, -2.0], [1.0, 8.0], [9.0, 0.0], [4.0, -8.0], [2.5, 20.0], [18.0, 0.0]]
    loaded = read(open_file(NETWORK, path), f"{QKV}.weight")
    assert torch.equal(loaded, torch.tensor(expected))


def test_scaled_values_are_rounded_once_from_float32(tmp_path: Path):
    weight = torch.randn(64, 32).to(torch.float8_e4m3fn)
    scale = torch.rand(64, 1) / 448
    tensors = network() | {f"{QKV}.weight": weight, f"{QKV}.weight_scale": scale}
    checkpoint = open_file(NETWORK, write(tmp_path / "fp8.safetensors", tensors))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = (weight.float() * scale).to(dtype)
        assert torch.equal(read(checkpoint, f"{QKV}.weight", dtype), expected)


def test_rows_beyond_one_reading_meet_their_own_scales(tmp_path: Path):
    weight = torch.randn(5000, 1000).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 5001.0)
    tensors = network() | {f"{QKV}.weight": weight, f"{QKV}.weight_scale": scale}
    checkpoint = open_file(NETWORK, write(tmp_path / "fp8.safetensors", tensors))
    assert torch.equal(read(checkpoint, f"{QKV}.weight"), weight.float() * scale[:, None])


def test_each_part_of_a_fused_tensor_has_a_scale_of_its_own(tmp_path: Path):
    tensors = {"x_pad_token": torch.ones(1, 2)}
    for factor, letter in enumerate("qkv", start=1):
        name = f"layers.0.attention.to_{letter}"
        tensors[f"{name}.weight"] = torch.ones(2, 2).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.tensor(float(factor))
    loaded = read(open_file(NETWORK, write(tmp_path / "fp8.safetensors", tensors)), f"{QKV}.weight")
    assert loaded[:, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_a_scale_may_lie_in_another_shard_than_its_weight(tmp_path: Path):
    scale = {f"{QKV}.weight_scale": THREE}
    for number, tensors in enumerate((network(), scale), start=1):
        write(tmp_path / f"model-{number:05}-of-00002.safetensors", tensors)
    assert read(open_folder(NETWORK, tmp_path), f"{QKV}.weight")[0, 0] == 3


def test_the_mark_of_an_all_in_one_file_may_stand_above_the_text_encoder(tmp_path: Path):
    prefix = "text_encoders.qwen3_4b.transformer.model."
    norm = {f"{prefix}layers.0.self_attn.q_norm.weight": torch.ones(2).to(torch.float8_e4m3fn)}
    path = write(tmp_path / "all.safetensors", norm)
    assert read(open_file(TEXT_ENCODER, path), "model.layers.0.self_attn.q_norm.weight").sum() == 2
    write(path, norm | {"text_encoders.qwen3_4b.scaled_fp8": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"1 quantised tensors have none .*q_norm"):
        open_file(TEXT_ENCODER, path)


def test_a_mark_without_any_float8_tensor_changes_nothing(tmp_path: Path):
    tensors = network(torch.float32) | {"scaled_fp8": torch.zeros(2)}
    path = write(tmp_path / "marked.safetensors", tensors)
    assert read(open_file(NETWORK, path), f"{QKV}.weight")[0, 1] == -2


@pytest.mark.parametrize(
    ("extras", "metadata", "message"),
    [
        (MARK, None, rf"1 quantised tensors have none \({QKV}\.weight\)"),
        ({f"{QKV}.comfy_quant": settings(format="float8_e4m3fn")}, None, "have none"),
        ({}, layers(**{QKV: {"format": "float8_e4m3fn"}}), "have none"),
        ({f"{QKV}.weight_scale": torch.ones(2)}, None, r"has the shape \[2\], must be .*\[6, 1\]"),
        ({f"{QKV}.weight_scale": torch.ones(1, 2)}, None, r"has the shape \[1, 2\]"),
        ({f"{QKV}.weight_scale": torch.ones(3, 1)}, None, r"has the shape \[3, 1\]"),
        ({f"{QKV}.weight_scale": torch.ones(6, 2)}, None, r"has the shape \[6, 2\]"),
        ({f"{QKV}.weight_scale": torch.ones(6).byte()}, None, "has dtype U8, must be F32"),
        (
            {f"{QKV}.weight_scale": THREE, f"{QKV}.scale_weight": torch.ones(1)},
            None,
            "scale the same weight",
        ),
        ({f"{OUT}.weight_scale": THREE}, None, rf"belongs to {OUT}\.weight of dtype BF16"),
        ({"layers.1.w.scale_weight": THREE}, None, r"layers\.1\.w\.scale_weight stands beside no"),
        ({"layers.1.w.input_scale": THREE}, None, r"layers\.1\.w\.input_scale stands beside no"),
        ({f"{QKV}.comfy_quant": settings(format="nvfp4")}, None, "is quantised as 'nvfp4'"),
        ({f"{QKV}.comfy_quant": settings(format=["x"])}, None, r"is quantised as \['x'\]"),
        ({f"{QKV}.comfy_quant": settings()}, None, "is quantised as None"),
        ({f"{QKV}.comfy_quant": settings(format="float8_e5m2")}, None, "dtype F8_E4M3, but its"),
        (
            {f"{QKV}.comfy_quant": settings(format="float8_e4m3fn", rotation=1)},
            None,
            "unknown quantisation settings: rotation",
        ),
        ({f"{QKV}.comfy_quant": torch.ones(4)}, None, "must hold JSON as bytes"),
        ({f"{QKV}.comfy_quant": torch.ones(4).byte()}, None, "not readable as JSON"),
        ({f"{QKV}.comfy_quant": torch.tensor([91, 93]).byte()}, None, "no JSON object"),
        ({}, layers(**{OUT: {"format": "float8_e4m3fn"}}), "dtype BF16, but its settings say"),
        ({}, layers(**{"layers.7.w": {"format": "float8_e4m3fn"}}), r"names layers\.7\.w, which"),
        ({}, {"_quantization_metadata": "{"}, "not readable as JSON"),
        ({}, {"_quantization_metadata": "[" * 100_000}, "not readable as JSON"),
        ({}, {"_quantization_metadata": "[]"}, "has no object of layers"),
        ({}, {"_quantization_metadata": "{}"}, "has no object of layers"),
        ({f"{QKV}.weight_scale_2": THREE}, None, "in a way that is not read .*weight_scale_2"),
        ({f"{QKV}.weight_scale_inv": THREE}, None, "in a way that is not read .*weight_scale_inv"),
        ({f"{QKV}.weight.absmax": THREE}, None, r"in a way that is not read .*weight\.absmax"),
        ({f"{QKV}.pre_quant_scale": THREE}, None, "in a way that is not read .*pre_quant_scale"),
    ],
)
def test_scales_that_cannot_be_applied_are_refused_by_name(extras, metadata, message, tmp_path):
    path = write(tmp_path / "fp8.safetensors", network() | extras, metadata)
    with pytest.raises(CheckpointError, match=rf"fp8\.safetensors: .*{message}") as caught:
        open_file(NETWORK, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused_when_it_is_read(value: float, tmp_path: Path):
    scale = {f"{QKV}.weight_scale": torch.tensor(value)}
    checkpoint = open_file(NETWORK, write(tmp_path / "fp8.safetensors", network() | scale))
    with pytest.raises(CheckpointError, match="weight_scale holds NaN or infinity"):
        read(checkpoint, f"{QKV}.weight")


# --- a whole engine ------------------------------------------------------------------------------


def quantise(path: Path, form: str) -> None:
    """Make a file's matrices float8 with scales, and write what they stand for to another file."""
    plain, quantised, named = {}, {}, {}
    for name, tensor in load_file(path).items():
        if tensor.dim() < 2 or name.endswith("pad_token") or "embed" in name:
            plain[name] = quantised[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        scale = tensor.float().abs().amax() / 448
        quantised[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        quantised[f"{layer}.{'scale_weight' if form == 'first' else 'weight_scale'}"] = scale
        named[layer] = {"format": "float8_e4m3fn"}
        plain[name] = quantised[name].float() * scale
    write(path.with_name("plain.st"), plain)
    if form == "first":
        write(path, quantised | MARK)
    else:
        write(path, quantised, layers(**named))


@pytest.mark.parametrize("form", ["first", "metadata"])
def test_an_engine_works_with_scaled_files_as_with_what_they_stand_for(form: str, tmp_path: Path):
    models = make_tiny_model(tmp_path / "tiny") / "models"
    files = find_model_files(models)
    for path in (files.network, files.text_encoder):
        quantise(path, form)
    scaled = engine(models)
    weights = scaled.models.transformer.native_tensors()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    picture = scaled.generate("a red apple", seed=1).image.tobytes()
    lora = {f"diffusion_model.{OUT}.diff": torch.ones_like(weights[f"{OUT}.weight"])}
    scaled.set_loras([(write(tmp_path / "lora.safetensors", lora), 1.0)])
    assert torch.equal(weights[f"{OUT}.weight"], before[f"{OUT}.weight"] + 1)
    scaled.set_loras([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())
    for path in (files.network, files.text_encoder):
        shutil.move(path.with_name("plain.st"), path)
    assert engine(models).generate("a red apple", seed=1).image.tobytes() == picture


def engine(models: Path) -> Engine:
    plan = Plan(stages=(Stage(name="only", height=48, width=32, steps=2),))
    return Engine.from_pretrained(models, plan=plan, device="cpu", dtype="float32")
