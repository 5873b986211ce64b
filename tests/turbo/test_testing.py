"""The small models: exact values, exact layouts."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

from turbo.errors import BadInputError, SaveError
from turbo.model_files import find_model_files
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER, diffusers_names
from turbo.testing import (
    TINY_AUTOENCODER,
    TINY_NETWORK,
    TINY_TEXT_ENCODER,
    Shapes,
    autoencoder_shapes,
    initialise,
    make_tiny_model,
    qwen3_shapes,
    zimage_shapes,
)
from turbo.tokenizer import Tokenizer

SHAPES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "dit_tiny": zimage_shapes,
    "dit_mid": zimage_shapes,
    "te_tiny": qwen3_shapes,
    "vae_tiny": autoencoder_shapes,
}


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("comfyui") / "tiny")


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("diffusers") / "tiny", "diffusers")


def reference_weights(shared: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    entry = json.loads((shared / "golden" / "weights.json").read_text())[name]
    config = entry["config"] | {"ffn_hidden": entry.get("ffn_hidden")}
    return entry, initialise(SHAPES[name](config), entry["seed"])


@pytest.mark.parametrize("name", SHAPES)
def test_reference_weights_are_reproduced_from_their_seed(name: str, shared: Path):
    entry, weights = reference_weights(shared, name)
    digest = hashlib.sha256()
    for tensor in sorted(weights):
        digest.update(tensor.encode() + weights[tensor].numpy().tobytes())
    assert digest.hexdigest() == entry["values_sha256"]


@pytest.mark.parametrize("name", ["dit_tiny", "te_tiny", "vae_tiny"])
def test_reference_files_are_reproduced_bit_for_bit(name: str, shared: Path):
    entry, weights = reference_weights(shared, name)
    stored = load_file(shared / "golden" / entry["file"])
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[key].float(), weights[key]) for key in stored)


def test_the_full_size_models_have_the_shapes_of_the_manifest(shared: Path):
    files = json.loads((shared / "manifest" / "state_dict_shapes.json").read_text())
    network = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30}
    text_encoder = {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728}
    counts = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    shapes = (
        zimage_shapes(network | {"cap_feat_dim": 2560, "ffn_hidden": 10240}),
        qwen3_shapes(text_encoder | counts | {"head_dim": 128}),
        autoencoder_shapes(
            {"ch": 128, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 16}
        ),
    )
    for ours, listed in zip(shapes, files.values(), strict=True):
        assert ours == {name: tuple(shape) for name, (shape, _) in listed.items()}


def test_the_same_seed_gives_the_same_files_and_another_does_not(comfyui: Path, tmp_path: Path):
    again = make_tiny_model(tmp_path / "again")
    other = make_tiny_model(tmp_path / "other", seed=1)
    for path in (comfyui / "models").rglob("*.safetensors"):
        content = path.read_bytes()
        assert (again / path.relative_to(comfyui)).read_bytes() == content
        assert (other / path.relative_to(comfyui)).read_bytes() != content


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_hold_the_dtype_asked_for(dtype: str, tmp_path: Path):
    folder = make_tiny_model(tmp_path / "m", dtype=dtype) / "models"
    tensors = load_file(folder / "vae" / "ae.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}


def test_the_comfyui_layout_has_the_workflows_file_names(comfyui: Path):
    files = {path.relative_to(comfyui).as_posix() for path in comfyui.rglob("*.*")}
    assert files >= {
        "models/diffusion_models/z_image_turbo_bf16.safetensors",
        "models/text_encoders/qwen_3_4b.safetensors",
        "models/vae/ae.safetensors",
        "models/tokenizer/vocab.json",
        "models/tokenizer/merges.txt",
    }
    assert (comfyui / "models" / "loras").is_dir()


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_small_model_is_found_and_opened_whole(layout: str, comfyui: Path, diffusers: Path):
    files = find_model_files(comfyui if layout == "comfyui" else diffusers)
    assert files.layout == layout
    opened = files.open()
    assert opened[NETWORK].shapes == zimage_shapes(TINY_NETWORK)
    assert opened[TEXT_ENCODER].shapes == qwen3_shapes(TINY_TEXT_ENCODER)
    assert opened[AUTOENCODER].shapes == autoencoder_shapes(TINY_AUTOENCODER)


def test_the_tokenizer_fits_the_text_encoder(comfyui: Path):
    tokenizer = Tokenizer.from_path(find_model_files(comfyui).require_tokenizer())
    assert tokenizer.vocabulary_size <= TINY_TEXT_ENCODER["vocab_size"]
    assert len(tokenizer.encode("the and ing")) < len("the and ing")


@pytest.mark.parametrize("text", ["a cat", "the rain and the wind", "\0 é 猫 🐈\n", "<|im_end|> x"])
def test_transformers_reads_the_same_tokenizer(text: str, diffusers: Path):
    ours = Tokenizer.from_path(diffusers / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(diffusers / "tokenizer")
    message = [{"role": "user", "content": text}]
    prompt = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert ours.encode_prompt(text) == theirs(prompt).input_ids


def test_diffusers_loads_the_network_without_a_rest(comfyui: Path, diffusers: Path):
    model, info = ZImageTransformer2DModel.from_pretrained(
        diffusers / "transformer", output_loading_info=True
    )
    assert not any(info.values())
    path = comfyui / "models" / "diffusion_models" / "z_image_turbo_bf16.safetensors"
    theirs = model.state_dict()
    for native, names in diffusers_names(NETWORK, native_weights := load_file(path)).items():
        rows = torch.cat([theirs[name] for name in names])
        assert torch.equal(rows, native_weights[native].to(rows.dtype)), native


def test_diffusers_loads_the_autoencoder_without_a_rest(diffusers: Path):
    model, info = AutoencoderKL.from_pretrained(diffusers / "vae", output_loading_info=True)
    assert not any(info.values())
    assert model.config.scaling_factor == 0.3611


def test_transformers_loads_the_text_encoder_without_a_rest(diffusers: Path):
    model, info = Qwen3ForCausalLM.from_pretrained(
        diffusers / "text_encoder", output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.rope_parameters["rope_theta"] == 1_000_000


def test_the_whole_pipeline_of_diffusers_loads_it(diffusers: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, about transformers
        pipeline = ZImagePipeline.from_pretrained(diffusers)
    assert pipeline.scheduler.config.shift == 3.0


@pytest.mark.parametrize("change", [{"layout": "flat"}, {"dtype": "int8"}])
def test_unknown_settings_name_the_allowed_ones(change: dict[str, Any], tmp_path: Path):
    with pytest.raises(BadInputError, match="must be one of"):
        make_tiny_model(tmp_path / "m", **change)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInputError, match="not an empty folder"):
        make_tiny_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert find_model_files(make_tiny_model(tmp_path / "empty"))


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_nothing_is_left_when_writing_fails(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full_disk(*_: object, **__: object) -> None:
        raise kind("No space left on device")

    monkeypatch.setattr("turbo.testing.save_file", full_disk)
    with pytest.raises(SaveError, match="No space left"):
        make_tiny_model(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
