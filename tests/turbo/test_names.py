"""Names of tensors in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from turbo.names import (
    AUTOENCODER,
    COMPONENTS,
    NETWORK,
    TEXT_ENCODER,
    Place,
    diffusers_names,
    find_components,
    find_prefix,
    native_network_place,
    native_places,
    select_names,
)
from turbo.testing import (
    TINY_AUTOENCODER,
    TINY_NETWORK,
    TINY_TEXT_ENCODER,
    autoencoder_shapes,
    qwen3_shapes,
    zimage_shapes,
)

NATIVE = {
    NETWORK: list(zimage_shapes(TINY_NETWORK)),
    TEXT_ENCODER: list(qwen3_shapes(TINY_TEXT_ENCODER)),
    AUTOENCODER: list(autoencoder_shapes(TINY_AUTOENCODER)),
}


@pytest.fixture(scope="module")
def manifest(shared: Path) -> dict[str, set[str]]:
    files = json.loads((shared / "manifest" / "state_dict_shapes.json").read_text())
    return dict(zip(COMPONENTS, map(set, files.values()), strict=True))


def test_q_k_and_v_of_diffusers_are_rows_of_one_native_matrix():
    assert [native_network_place(f"layers.3.attention.to_{x}.weight") for x in "qkv"] == [
        Place("layers.3.attention.qkv.weight", part, 3) for part in range(3)
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("noise_refiner.0.attention.to_out.0.weight", "noise_refiner.0.attention.out.weight"),
        ("layers.9.attention.norm_q.weight", "layers.9.attention.q_norm.weight"),
        ("layers.9.attention.norm_k.weight", "layers.9.attention.k_norm.weight"),
        ("all_x_embedder.2-1.bias", "x_embedder.bias"),
        ("all_final_layer.2-1.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight"),
        ("layers.0.adaLN_modulation.0.weight", "layers.0.adaLN_modulation.0.weight"),
    ],
)
def test_a_network_name_of_diffusers_becomes_native(theirs: str, ours: str):
    assert native_network_place(theirs) == Place(ours)


def test_decoder_levels_count_from_the_other_end_in_diffusers():
    names = [f"decoder.up_blocks.{level}.resnets.0.conv_shortcut.bias" for level in range(4)]
    places = native_places(AUTOENCODER, names)
    assert [places[name].name for name in names] == [
        f"decoder.up.{level}.block.0.nin_shortcut.bias" for level in (3, 2, 1, 0)
    ]


@pytest.mark.parametrize("attention", ["query", "to_q"])
def test_old_and_new_attention_names_of_diffusers_are_the_same_tensor(attention: str):
    name = f"encoder.mid_block.attentions.0.{attention}.weight"
    assert native_places(AUTOENCODER, [name])[name] == Place("encoder.mid.attn_1.q.weight")


def test_a_text_encoder_may_lack_the_model_prefix():
    places = native_places(TEXT_ENCODER, ["layers.0.mlp.up_proj.weight", "lm_head.weight"])
    assert [place.name for place in places.values()] == [
        "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("component", COMPONENTS)
def test_native_names_survive_the_way_to_diffusers_and_back(component: str):
    there = diffusers_names(component, NATIVE[component])
    back = native_places(component, [name for names in there.values() for name in names])
    for native, names in there.items():
        assert [back[name] for name in names] == [
            Place(native, part, len(names)) for part in range(len(names))
        ]


@pytest.mark.parametrize("component", COMPONENTS)
def test_native_names_stay_as_they_are(component: str):
    places = native_places(component, NATIVE[component])
    assert all(place == Place(name) for name, place in places.items())


def test_the_full_network_of_diffusers_has_the_names_of_the_single_file(manifest):
    with torch.device("meta"):
        names = ZImageTransformer2DModel().state_dict()
    assert {p.name for p in native_places(NETWORK, names).values()} == manifest[NETWORK]


def test_the_full_autoencoder_of_diffusers_has_the_names_of_the_single_file(manifest):
    with torch.device("meta"):
        names = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).state_dict()
    assert {p.name for p in native_places(AUTOENCODER, names).values()} == manifest[AUTOENCODER]


def test_the_full_text_encoder_of_transformers_has_the_names_of_the_single_file(manifest):
    config = Qwen3Config(num_hidden_layers=36, hidden_size=64, intermediate_size=64, vocab_size=8)
    with torch.device("meta"):
        names = Qwen3ForCausalLM(config).state_dict()
    native = {place.name for place in native_places(TEXT_ENCODER, names).values()}
    assert native - {"lm_head.weight"} == manifest[TEXT_ENCODER]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_network_is_found_behind_every_usual_prefix(prefix: str):
    names = [prefix + name for name in NATIVE[NETWORK]]
    assert find_prefix(NETWORK, names) == prefix
    assert find_components(names) == {NETWORK: prefix}


def test_an_all_in_one_file_holds_three_components():
    prefixes = {
        NETWORK: "model.diffusion_model.",
        TEXT_ENCODER: "text_encoders.qwen3_4b.transformer.",
        AUTOENCODER: "vae.",
    }
    names = [prefix + name for part, prefix in prefixes.items() for name in NATIVE[part]]
    assert find_components(names) == prefixes
    for component, prefix in prefixes.items():
        assert list(select_names(names, prefix).values()) == NATIVE[component]


def test_a_name_that_belongs_to_nobody_is_not_dropped():
    names = ["model.diffusion_model.x_pad_token", "vae.decoder.conv_in.weight", "optimizer.step"]
    assert select_names(names, "model.diffusion_model.") == {
        "model.diffusion_model.x_pad_token": "x_pad_token",
        "optimizer.step": "optimizer.step",
    }


def test_another_model_holds_no_component():
    assert find_components(["double_blocks.0.img_attn.qkv.weight", "img_in.weight"]) == {}
