"""LoRA files: which keys mean which weight, what they do to it, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from turbo.errors import LoraError
from turbo.lora import (
    Difference,
    Lora,
    LowRank,
    Patch,
    apply_patches,
    match_lora,
    read_lora,
    require_match,
)
from turbo.names import diffusers_names

WIDTH = 6
NETWORK_SHAPES: dict[str, tuple[int, ...]] = {
    "x_pad_token": (1, WIDTH),
    "cap_pad_token": (1, WIDTH),
    "x_embedder.weight": (WIDTH, 4),
    "x_embedder.bias": (WIDTH,),
    "layers.0.attention.qkv.weight": (3 * WIDTH, WIDTH),
    "layers.0.attention.out.weight": (WIDTH, WIDTH),
    "layers.0.attention.q_norm.weight": (2,),
    "layers.0.feed_forward.w1.weight": (8, WIDTH),
    "layers.0.adaLN_modulation.0.weight": (4 * WIDTH, 4),
    "layers.0.adaLN_modulation.0.bias": (4 * WIDTH,),
    "final_layer.linear.weight": (4, WIDTH),
    "final_layer.linear.bias": (4,),
}
TEXT_ENCODER_SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.self_attn.q_proj.weight": (4, 3),
    "model.layers.1.self_attn.q_proj.weight": (4, 3),
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "network": NETWORK_SHAPES,
    "text_encoder": TEXT_ENCODER_SHAPES,
}

PAIRS = [
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B", ".lora_A"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B.default", ".lora_A.default"),
]

# Module as trainers name it -> native tensor and the rows that it means.
NETWORK_MODULES = {
    "layers.0.attention.qkv": ("layers.0.attention.qkv.weight", (0, 18)),
    "layers.0.attention.to_q": ("layers.0.attention.qkv.weight", (0, 6)),
    "layers.0.attention.to_k": ("layers.0.attention.qkv.weight", (6, 12)),
    "layers.0.attention.to_v": ("layers.0.attention.qkv.weight", (12, 18)),
    "layers.0.attention.out": ("layers.0.attention.out.weight", (0, 6)),
    "layers.0.attention.to_out.0": ("layers.0.attention.out.weight", (0, 6)),
    "layers.0.attention.to_out": ("layers.0.attention.out.weight", (0, 6)),
    "layers.0.feed_forward.w1": ("layers.0.feed_forward.w1.weight", (0, 8)),
    "layers.0.adaLN_modulation.0": ("layers.0.adaLN_modulation.0.weight", (0, 24)),
    "x_embedder": ("x_embedder.weight", (0, 6)),
    "all_x_embedder.2-1": ("x_embedder.weight", (0, 6)),
    "final_layer.linear": ("final_layer.linear.weight", (0, 4)),
    "all_final_layer.2-1.linear": ("final_layer.linear.weight", (0, 4)),
}
DOTTED_PREFIXES = [
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "unet.",
    "base_model.model.",
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
]
FLAT_PREFIXES = ["lora_unet_", "lora_transformer_", "lycoris_"]

TEXT_ENCODER_NAMES = [
    "text_encoders.qwen3_4b.transformer.model.layers.0.self_attn.q_proj",
    "text_encoders.qwen3_4b.model.layers.0.self_attn.q_proj",
    "text_encoder.model.layers.0.self_attn.q_proj",
    "text_encoder.layers.0.self_attn.q_proj",
    "text_encoder.base_model.model.model.layers.0.self_attn.q_proj",
    "te.model.layers.0.self_attn.q_proj",
    "te1.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "base_model.model.model.layers.0.self_attn.q_proj",
    "lora_te_model_layers_0_self_attn_q_proj",
    "lora_te_layers_0_self_attn_q_proj",
    "lora_te1_model_layers_0_self_attn_q_proj",
    "lora_te2_model_layers_0_self_attn_q_proj",
    "lora_te3_qwen3_4b_transformer_model_layers_0_self_attn_q_proj",
]


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_patch(tensors, target):
    """The only patch of a file of which every key must count."""
    match = match_lora(Lora("a.safetensors", tensors), SHAPES)
    assert match.unused == ()
    assert list(match.patches) == [target]
    (patch,) = match.patches[target]
    return patch


def fuse(weight, *loras_and_strengths, target):
    patches = [
        (patch, strength)
        for lora, strength in loras_and_strengths
        for patch in match_lora(lora, SHAPES).patches.get(target, ())
    ]
    return apply_patches(weight.clone(), patches)


def fuse_into_w1(tensors, strength=1.0, module="diffusion_model.layers.0.feed_forward.w1"):
    """(weight, the same after a LoRA whose keys are these suffixes) for w1, 8 x 6."""
    weight = random_tensor(8, WIDTH)
    lora = Lora("a.safetensors", {module + suffix: value for suffix, value in tensors.items()})
    assert match_lora(lora, SHAPES).unused == ()
    target = ("network", "layers.0.feed_forward.w1.weight")
    return weight, fuse(weight, (lora, strength), target=target)


def factors_of(kind, rows):
    """(suffix -> tensor, the update they make) for a weight [rows, WIDTH]; rank 2."""
    left, right = random_tensor(rows, 2, seed=1), random_tensor(2, WIDTH, seed=2)
    first, low = random_tensor(2, 3, seed=3), left[: rows // 2]
    return {
        "lora": ({".lora_up.weight": left, ".lora_down.weight": right}, left @ right),
        "loha": (
            {
                ".hada_w1_a": left,
                ".hada_w1_b": right,
                ".hada_w2_a": left + 1,
                ".hada_w2_b": right - 1,
            },
            (left @ right) * ((left + 1) @ (right - 1)),
        ),
        "lokr": (
            {".lokr_w1": first, ".lokr_w2_a": low, ".lokr_w2_b": right[:, :2]},
            torch.kron(first, low @ right[:, :2]),
        ),
        "diff": ({".diff": left @ right}, left @ right),
        "set": ({".set_weight": left @ right}, left @ right),
    }[kind]


def names_of_network_modules():
    for module, prefix in itertools.product(NETWORK_MODULES, DOTTED_PREFIXES):
        yield prefix + module, module
    for module, prefix in itertools.product(NETWORK_MODULES, FLAT_PREFIXES):
        yield prefix + module.replace(".", "_"), module


# --- Names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[1])
def test_every_prefix_module_and_suffix_reaches_the_rows_it_means(pair):
    up_suffix, down_suffix = pair
    for name, module in names_of_network_modules():
        tensor, (start, stop) = NETWORK_MODULES[module]
        shape = NETWORK_SHAPES[tensor]
        up, down = random_tensor(stop - start, 2, seed=1), random_tensor(2, shape[1], seed=2)
        patch = one_patch({name + up_suffix: up, name + down_suffix: down}, ("network", tensor))
        weight = random_tensor(*shape)
        expected = weight.clone()
        expected[start:stop] += 0.8 * (up @ down)
        torch.testing.assert_close(apply_patches(weight, [(patch, 0.8)]), expected)


@pytest.mark.parametrize("name", TEXT_ENCODER_NAMES)
def test_every_text_encoder_name_reaches_the_text_encoder(name):
    target = ("text_encoder", "model.layers.0.self_attn.q_proj.weight")
    tensors = {f"{name}.lora_B.weight": torch.ones(4, 1), f"{name}.lora_A.weight": torch.ones(1, 3)}
    weight = apply_patches(torch.zeros(4, 3), [(one_patch(tensors, target), 0.5)])
    torch.testing.assert_close(weight, torch.full((4, 3), 0.5))


def test_a_text_encoder_prefix_never_reaches_the_network():
    lora = Lora("a", {"text_encoder.layers.0.attention.out.diff": torch.ones(WIDTH, WIDTH)})
    assert match_lora(lora, SHAPES).patches == {}


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff", "set"])
@pytest.mark.parametrize("module", ["lora_unet_layers_0_attention_to_k", "layers.0.attention.to_k"])
def test_every_kind_works_on_a_slice_of_qkv(kind, module):
    tensors, update = factors_of(kind, WIDTH)
    patch = one_patch(
        {module + suffix: value for suffix, value in tensors.items()},
        ("network", "layers.0.attention.qkv.weight"),
    )
    weight = random_tensor(18, WIDTH)
    expected = weight.clone()
    expected[6:12] = update if kind == "set" else expected[6:12] + update
    torch.testing.assert_close(apply_patches(weight, [(patch, 1.0)]), expected)


def test_every_module_of_the_full_model_is_found_under_all_its_names(shared):
    manifest = json.loads((shared / "manifest/state_dict_shapes.json").read_text())
    files = ("z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors")
    network, text_encoder = (
        {name: tuple(shape) for name, (shape, _) in manifest[file].items()} for file in files
    )
    tensors = {}
    for prefix, names in (
        ("diffusion_model.", {name: (name,) for name in network}),
        ("transformer.", diffusers_names("network", network)),
        ("text_encoders.qwen3_4b.transformer.", diffusers_names("text_encoder", text_encoder)),
    ):
        shapes = network | text_encoder
        for native, others in names.items():
            for other in others:
                rows, *columns = shapes[native]
                shape = (rows // len(others), *columns)
                value = torch.empty(shape, device="meta")
                tensors[f"{prefix}{other.removesuffix('.weight')}.diff"] = value
    lora = Lora("a", tensors)
    match = match_lora(lora, {"network": network, "text_encoder": text_encoder})
    assert len(tensors) > 1300
    assert match.unused == ()
    pad_tokens = {("network", "x_pad_token"), ("network", "cap_pad_token")}
    wanted = {("network", n) for n in network} | {("text_encoder", n) for n in text_encoder}
    assert set(match.patches) == wanted - pad_tokens


# --- Arithmetic ----------------------------------------------------------------------------------


def test_scale_is_alpha_over_rank_and_one_without_alpha():
    up, down = random_tensor(8, 4, seed=1), random_tensor(4, WIDTH, seed=2)
    factors = {".lora_up.weight": up, ".lora_down.weight": down}
    weight, plain = fuse_into_w1(factors, strength=-0.5)
    torch.testing.assert_close(plain, weight - 0.5 * (up @ down))
    weight, scaled = fuse_into_w1({**factors, ".alpha": torch.tensor(2.0)}, strength=-0.5)
    torch.testing.assert_close(scaled, weight - 0.5 * (2 / 4) * (up @ down))


def test_factors_of_a_1x1_convolution_are_taken_as_matrices():
    up, down = random_tensor(8, 2, seed=1), random_tensor(2, WIDTH, seed=2)
    factors = {
        ".lora_up.weight": up.reshape(8, 2, 1, 1),
        ".lora_down.weight": down.reshape(2, WIDTH, 1, 1),
    }
    weight, fused = fuse_into_w1(factors)
    torch.testing.assert_close(fused, weight + up @ down)


def test_loha_is_the_elementwise_product_scaled_by_alpha_over_the_rows_of_w1_b():
    w1_a, w1_b = random_tensor(8, 3, seed=1), random_tensor(3, WIDTH, seed=2)
    w2_a, w2_b = random_tensor(8, 2, seed=3), random_tensor(2, WIDTH, seed=4)
    factors = {".hada_w1_a": w1_a, ".hada_w1_b": w1_b, ".hada_w2_a": w2_a, ".hada_w2_b": w2_b}
    weight, fused = fuse_into_w1({**factors, ".alpha": torch.tensor(6.0)}, strength=0.8)
    torch.testing.assert_close(fused, weight + 0.8 * (6 / 3) * (w1_a @ w1_b) * (w2_a @ w2_b))


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [("full", "full", None), ("low", "full", 3), ("full", "low", 2), ("low", "low", 2)],
)
def test_lokr_is_scaled_by_the_rank_of_the_second_factor_that_is_low_rank(first, second, rank):
    left, right = random_tensor(4, 3, seed=1), random_tensor(3, 2, seed=2)
    above, below = random_tensor(2, 2, seed=3), random_tensor(2, 3, seed=4)
    tensors = {".alpha": torch.tensor(8.0)}
    tensors |= (
        {".lokr_w1": left @ right} if first == "full" else {".lokr_w1_a": left, ".lokr_w1_b": right}
    )
    tensors |= (
        {".lokr_w2": above @ below}
        if second == "full"
        else {".lokr_w2_a": above, ".lokr_w2_b": below}
    )
    weight, fused = fuse_into_w1(tensors, strength=0.5)
    scale = 1 if rank is None else 8 / rank
    expected = weight + 0.5 * scale * torch.kron(left @ right, above @ below)
    torch.testing.assert_close(fused, expected)


def test_differences_are_added_with_the_strength_to_weights_biases_and_norms():
    tensors = {
        "diffusion_model.x_embedder.diff": torch.ones(WIDTH, 4),
        "diffusion_model.x_embedder.diff_b": torch.ones(WIDTH),
        "lora_unet_layers_0_attention_q_norm.w_norm": torch.ones(2),
        "transformer.layers.0.adaLN_modulation.0.b_norm": torch.ones(24),
        "diffusion_model.final_layer.linear.bias.diff": torch.ones(4),
    }
    match = match_lora(Lora("a", tensors), SHAPES)
    assert match.used == set(tensors)
    assert {name for _, name in match.patches} == {
        "x_embedder.weight",
        "x_embedder.bias",
        "layers.0.attention.q_norm.weight",
        "layers.0.adaLN_modulation.0.bias",
        "final_layer.linear.bias",
    }
    for (_, name), (patch,) in match.patches.items():
        fused = apply_patches(torch.zeros(NETWORK_SHAPES[name]), [(patch, 0.25)])
        assert (fused == 0.25).all()


def test_set_weight_replaces_whatever_the_strength_but_not_at_zero():
    value = random_tensor(8, WIDTH, seed=1)
    weight, fused = fuse_into_w1({".set_weight": value}, strength=0.3)
    torch.testing.assert_close(fused, value)
    weight, fused = fuse_into_w1({".set_weight": value}, strength=0.0)
    torch.testing.assert_close(fused, weight)


def dora_expectation(weight, update, magnitude, strength):
    """DoRA written out number by number in float64."""
    rows, columns = weight.shape
    w, d, m = weight.double(), update.double(), magnitude.double()
    eps = 2.0**-23
    out = torch.empty_like(w)
    for i, j in itertools.product(range(rows), range(columns)):
        if m.shape[0] == rows:
            norm = math.sqrt(sum(w[i, k].item() ** 2 for k in range(columns)))
            factor = m[i, 0] / (norm + eps)
        else:
            norm = math.sqrt(sum((w[k, j] + d[k, j]).item() ** 2 for k in range(rows)))
            factor = m[0, j] / (norm + eps)
        out[i, j] = w[i, j] + strength * ((w[i, j] + d[i, j]) * factor - w[i, j])
    return out.float()


@pytest.mark.parametrize("strength", [1.0, 0.8, -0.5])
@pytest.mark.parametrize("orientation", ["rows", "columns"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_dora_rescales_rows_by_the_old_norm_and_columns_by_the_new_one(kind, orientation, strength):
    tensors, update = factors_of(kind, 8)
    magnitude = random_tensor(*((8, 1) if orientation == "rows" else (1, WIDTH)), seed=3)
    tensors |= {".alpha": torch.tensor(0.5), ".dora_scale": magnitude}  # rank 2
    weight, fused = fuse_into_w1(tensors, strength)
    expected = dora_expectation(weight, 0.25 * update, magnitude, strength)
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("shape", [(WIDTH, 1), (1, WIDTH)])
def test_dora_on_a_slice_of_qkv_sees_that_slice_only(shape):
    up, down = random_tensor(WIDTH, 2, seed=1), random_tensor(2, WIDTH, seed=2)
    magnitude = random_tensor(*shape, seed=3)
    name = "transformer.layers.0.attention.to_v"
    tensors = {
        f"{name}.lora_B.weight": up,
        f"{name}.lora_A.weight": down,
        f"{name}.dora_scale": magnitude,
    }
    patch = one_patch(tensors, ("network", "layers.0.attention.qkv.weight"))
    weight = random_tensor(18, WIDTH)
    expected = weight.clone()
    expected[12:] = dora_expectation(weight[12:], up @ down, magnitude, 0.8)
    torch.testing.assert_close(apply_patches(weight, [(patch, 0.8)]), expected)


def test_several_loras_apply_in_order_each_to_the_result_of_the_one_before():
    target = ("network", "layers.0.attention.out.weight")
    ones = torch.ones(WIDTH, WIDTH)
    add = Lora("add", {"transformer.layers.0.attention.to_out.0.diff": ones})
    put = Lora("put", {"diffusion_model.layers.0.attention.out.set_weight": 5 * ones})
    zeros = torch.zeros(WIDTH, WIDTH)
    assert (fuse(zeros, (add, 0.5), (put, 1.0), target=target) == 5.0).all()
    assert (fuse(zeros, (put, 1.0), (add, 0.5), target=target) == 5.5).all()


def test_a_fused_update_comes_before_updates_of_its_slices():
    tensors = {
        "lora_unet_layers_0_attention_to_k.diff": torch.ones(WIDTH, WIDTH),
        "diffusion_model.layers.0.attention.qkv.set_weight": torch.full((18, WIDTH), 3.0),
    }
    match = match_lora(Lora("a", tensors), SHAPES)
    target = ("network", "layers.0.attention.qkv.weight")
    fused = apply_patches(torch.zeros(18, WIDTH), [(p, 1.0) for p in match.patches[target]])
    assert fused[:, 0].tolist() == [3.0] * 6 + [4.0] * 6 + [3.0] * 6


def test_a_place_named_twice_changes_once_by_the_form_that_comfyui_prefers():
    tensors = {
        "transformer.layers.0.attention.to_q.diff": torch.full((WIDTH, WIDTH), 2.0),
        "base_model.model.layers.0.attention.to_q.diff": torch.full((WIDTH, WIDTH), 1.0),
        "diffusion_model.layers.0.attention.to_q.diff": torch.full((WIDTH, WIDTH), 3.0),
    }
    for keys in itertools.permutations(tensors):
        match = match_lora(Lora("a", {key: tensors[key] for key in keys}), SHAPES)
        ((patch,),) = match.patches.values()
        assert (apply_patches(torch.zeros(18, WIDTH), [(patch, 1.0)])[:6] == 2.0).all()
        assert match.used == {"transformer.layers.0.attention.to_q.diff"}
        assert match.inert == set(tensors) - match.used


def test_a_diff_counts_instead_of_a_lora_of_the_same_module():
    weight, fused = fuse_into_w1(
        {
            ".lora_up.weight": torch.ones(8, 1),
            ".lora_down.weight": torch.ones(1, WIDTH),
            ".diff": torch.ones(8, WIDTH),
        }
    )
    torch.testing.assert_close(fused, weight + 1)


def test_pad_tokens_and_tensors_that_are_never_read_are_inert():
    tensors = {
        "diffusion_model.x_pad_token.diff": torch.ones(1, WIDTH),
        "transformer.cap_pad_token.set_weight": torch.ones(1, WIDTH),
        "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.q_proj.diff": torch.ones(4, 3),
    }
    last_layer = {"text_encoder": {"model.layers.1.self_attn.q_proj.weight"}}
    lora = Lora("a", tensors)
    match = match_lora(lora, SHAPES, last_layer)
    assert match.patches == {}
    assert match.inert == set(tensors)
    require_match(match, lora)


def test_low_precision_factors_are_multiplied_in_float32():
    up, down = random_tensor(8, 4, seed=1).bfloat16(), random_tensor(4, WIDTH, seed=2).half()
    weight, fused = fuse_into_w1({".lora_up.weight": up, ".lora_down.weight": down}, strength=0.8)
    torch.testing.assert_close(fused, weight + 0.8 * (up.float() @ down.float()))


def test_apply_patches_changes_the_weight_in_place_and_takes_float32_only():
    patch = Patch(Difference(torch.ones(2, 3)))
    weight = torch.zeros(2, 3)
    assert apply_patches(weight, [(patch, 1.0), (patch, 1.0)]) is weight
    assert (weight == 2).all()
    with pytest.raises(ValueError, match="float32"):
        apply_patches(weight.bfloat16(), [(patch, 1.0)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_weights_take_cpu_factors():
    patch = Patch(LowRank(random_tensor(8, 2, seed=1), random_tensor(2, 6, seed=2)), scale=0.5)
    weight = random_tensor(8, 6)
    on_gpu = apply_patches(weight.cuda(), [(patch, 0.8)])
    torch.testing.assert_close(on_gpu.cpu(), apply_patches(weight, [(patch, 0.8)]))


# --- Golden data ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_weights(shared):
    folder = shared / "golden/weights"
    files = {"network": "dit_tiny.safetensors", "text_encoder": "te_tiny.safetensors"}
    return {key: load_file(folder / file) for key, file in files.items()}


def shapes_of(weights):
    return {
        key: {name: tuple(t.shape) for name, t in tensors.items()}
        for key, tensors in weights.items()
    }


@pytest.mark.parametrize(
    "convention", ["kohya", "peft_diffusion_model", "peft_transformer", "te_generic"]
)
def test_merged_weights_equal_comfyuis(shared, tiny_weights, convention):
    folder = shared / "golden/lora"
    case = json.loads((folder / f"{convention}.json").read_text())
    stored = load_file(folder / f"{convention}.safetensors")
    lora = read_lora(folder / f"{convention}.lora.safetensors")
    match = match_lora(lora, shapes_of(tiny_weights))
    require_match(match, lora)
    assert match.inert == set()
    tolerance = case["tolerance"]
    components = {"dit": "network", "te": "text_encoder"}
    for strength, tensors in case["merged"].items():
        targets = {(components[t.split(":")[0]], t.split(":")[1]): t for t in tensors}
        assert set(match.patches) == set(targets)
        for target, label in targets.items():
            weight = tiny_weights[target[0]][target[1]].float()
            patches = [(patch, float(strength)) for patch in match.patches[target]]
            merged = apply_patches(weight, patches)
            got = {
                "sample": merged[::16, ::16] if merged.ndim == 2 else merged,
                "probe": merged @ stored[f"probe{merged.shape[-1]}"],
            }
            for what, tensor in got.items():
                want = stored[f"s{strength}/merged/{label}/{what}"]
                allowed = tolerance["merged_abs" if what == "sample" else "abs"]
                allowed += tolerance["rel"] * want.abs().max().item()
                assert (tensor - want).abs().max().item() <= allowed


def test_the_names_that_comfyui_ignores_are_all_understood(shared, tiny_weights):
    folder = shared / "golden/lora"
    ignored = json.loads((folder / "unusual_names.json").read_text())["ignored_keys"]
    lora = read_lora(folder / "unusual_names.lora.safetensors")
    match = match_lora(lora, shapes_of(tiny_weights))
    require_match(match, lora)
    assert {name for _, name in match.patches} == {
        "layers.0.attention.qkv.weight",
        "layers.1.attention.out.weight",
        "model.layers.0.self_attn.q_proj.weight",
    }
    rest = {key: value for key, value in lora.tensors.items() if key not in ignored}
    assert match_lora(Lora("rest", rest), shapes_of(tiny_weights)).patches == {}


@pytest.mark.parametrize("convention", ["kohya", "peft_transformer", "unusual_names"])
def test_shapes_alone_match_as_the_whole_file_does(shared, tiny_weights, convention):
    file = shared / f"golden/lora/{convention}.lora.safetensors"
    whole, outline = (
        match_lora(read_lora(file, shapes_only=shapes_only), shapes_of(tiny_weights))
        for shapes_only in (False, True)
    )
    assert outline.patches.keys() == whole.patches.keys()
    for target, patches in whole.patches.items():
        assert [(patch.rows, patch.scale, patch.update.shape) for patch in patches] == [
            (patch.rows, patch.scale, patch.update.shape) for patch in outline.patches[target]
        ]
    for keys in ("used", "inert", "unused"):
        assert getattr(outline, keys) == getattr(whole, keys)


# --- Files and errors ----------------------------------------------------------------------------


def lora_tensors(module="diffusion_model.layers.0.feed_forward.w1", rows=8, columns=WIDTH):
    return {
        f"{module}.lora_up.weight": torch.ones(rows, 2),
        f"{module}.lora_down.weight": torch.ones(2, columns),
    }


def test_a_file_is_read_as_it_is_and_may_vanish_afterwards(tmp_path):
    path = tmp_path / "style.anything"
    tensors = {key: value.bfloat16() for key, value in lora_tensors().items()}
    save_file(tensors, path)
    lora = read_lora(path)
    path.unlink()
    assert lora.name == "style.anything"
    assert lora.tensors.keys() == tensors.keys()
    assert all(lora.tensors[key].equal(tensors[key]) for key in tensors)


def test_the_fingerprint_depends_on_values_names_and_dtypes_only(tmp_path):
    tensors = lora_tensors() | {"diffusion_model.layers.0.feed_forward.w1.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a", metadata={"author": "x"})
    save_file(tensors, tmp_path / "b")
    assert read_lora(tmp_path / "a").fingerprint == read_lora(tmp_path / "b").fingerprint
    others = [
        {key: value + 1 for key, value in tensors.items()},
        {key: value.half() for key, value in tensors.items()},
        {f"x{key}": value for key, value in tensors.items()},
    ]
    assert len({Lora("x", t).fingerprint for t in (tensors, *others)}) == 4


def test_of_shapes_alone_only_settings_are_in_memory(tmp_path):
    settings = {".alpha": torch.tensor(1.0), ".dora_scale": torch.ones(8, 1)}
    module = "diffusion_model.layers.0.feed_forward.w1"
    tensors = lora_tensors(module) | {module + suffix: value for suffix, value in settings.items()}
    save_file(tensors, tmp_path / "a")
    lora = read_lora(tmp_path / "a", shapes_only=True)
    assert {key: tensor.shape for key, tensor in lora.tensors.items()} == {
        key: tensor.shape for key, tensor in tensors.items()
    }
    in_memory = {key for key, tensor in lora.tensors.items() if not tensor.is_meta}
    assert in_memory == {module + suffix for suffix in settings}


def contents_that_are_no_lora():
    good = save(lora_tensors())
    nan = lora_tensors() | {
        "diffusion_model.layers.0.feed_forward.w1.alpha": torch.tensor(math.nan)
    }
    huge = {key: value.double() * 1e300 for key, value in lora_tensors().items()}
    return {
        "empty": (b"", "empty"),
        "pickle": (pickle.dumps({"a": 1}), "pickle"),
        "zip": (b"PK\x03\x04" + bytes(100), "pickle"),
        "page": (b"<!DOCTYPE html><html>log in first</html>", "web page"),
        "text": (b"this is a text file, no model at all", "damaged"),
        "cut header": (good[:40], "truncated"),
        "cut data": (good[:-3], "truncated"),
        "too long": (good + bytes(8), "damaged"),
        "checkpoint": (save({"layers.0.attention.qkv.weight": torch.ones(18, 6)}), "none of its 1"),
        "no tensors": (save({}), "none of its 0"),
        "nan": (save(nan), r"w1\.alpha holds NaN"),
        "overflow": (save(huge), "holds NaN or values beyond float32"),
    }


@pytest.mark.parametrize("case", contents_that_are_no_lora())
def test_files_are_judged_by_their_content(case, tmp_path):
    content, message = contents_that_are_no_lora()[case]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoraError, match=message) as caught:
        read_lora(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shapes_only", [False, True])
@pytest.mark.parametrize("shape", [[0, 2**32, 2**32], [2**32, 0, 2**25], [1] * 65])
def test_a_shape_that_no_tensor_can_have_is_refused(shape, shapes_only, tmp_path):
    size = 4 * math.prod(shape)
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"layers.0.attention.out.lora_A.weight": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(LoraError, match=r"lora_A\.weight has an impossible shape \[") as caught:
        read_lora(path, shapes_only=shapes_only)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(LoraError, match=r"nowhere\.safetensors: no such file"):
        read_lora(tmp_path / "nowhere.safetensors")
    with pytest.raises(LoraError, match="is a folder"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".oft_blocks", "OFT or BOFT"),
        (".oft_diag", "OFT"),
        (".a1.weight", "GLoRA"),
        (".b2.weight", "GLoRA"),
        (".hada_t1", "LoHa in Tucker form"),
        (".lokr_t2", "LoKr in Tucker form"),
        (".lora_mid.weight", "middle factor"),
        (".lora_magnitude_vector", "DoRA in PEFT's form"),
    ],
)
def test_kinds_that_are_not_supported_are_named(suffix, kind, tmp_path):
    save_file({f"transformer.layers.0.attention.to_q{suffix}": torch.ones(2, 2)}, tmp_path / "a")
    lora = read_lora(tmp_path / "a")
    with pytest.raises(LoraError, match=rf"a: .*{suffix} makes this .*{kind}"):
        match_lora(lora, SHAPES)


BAD_MODULES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "only up": ({".lora_up.weight": (8, 2)}, r"w1\.lora_up\.weight has no partner .*lora_down"),
    "only down": ({".lora_A.weight": (2, 6)}, r"w1\.lora_A\.weight has no partner .*lora_B"),
    "mixed pair": ({".lora_A.weight": (2, 6), ".lora_B": (8, 2)}, "has no partner"),
    "rank": (
        {".lora_B": (8, 3), ".lora_A": (2, 6)},
        r"lora_B \[8, 3\] and .*lora_A \[2, 6\] do not",
    ),
    "rank 0": ({".lora_B": (8, 0), ".lora_A": (0, 6)}, r"\[8, 0\] and .* \[0, 6\] do not multiply"),
    "vector": ({".lora_B": (8,), ".lora_A": (1, 6)}, "do not multiply"),
    "shape": (
        {".lora_B": (9, 2), ".lora_A": (2, 6)},
        r"lora_B \[9, 2\] .* of \[9, 6\], but layers\.0\.feed_forward\.w1\.weight is \[8, 6\]",
    ),
    "loha partner": ({f".hada_w{x}": (2, 2) for x in ("1_a", "1_b", "2_a")}, r"no partner .*w2_b"),
    "loha shapes": (
        {".hada_w1_a": (8, 2), ".hada_w1_b": (2, 6), ".hada_w2_a": (6, 2), ".hada_w2_b": (2, 8)},
        "different shapes",
    ),
    "lokr partner": ({".lokr_w1": (2, 2)}, "no partner"),
    "lokr shape": ({".lokr_w1": (2, 2), ".lokr_w2": (3, 4)}, r"\[6, 8\], but .* is \[8, 6\]"),
    "diff": ({".diff": (6, 8)}, r"diff \[6, 8\] would change a weight of \[6, 8\]"),
    "set": ({".set_weight": (1, 6)}, r"set_weight \[1, 6\]"),
    "alpha": (
        {".lora_B": (8, 2), ".lora_A": (2, 6), ".alpha": (2,)},
        r"alpha \[2\] must be a single",
    ),
    "dora": (
        {".lora_B": (8, 2), ".lora_A": (2, 6), ".dora_scale": (3, 1)},
        r"\[8, 1\] or per column",
    ),
    "lonely dora": ({".dora_scale": (8, 1)}, "no LoRA beside it"),
    "grown": (
        {".lora_B": (8, 2), ".lora_A": (2, 6), ".reshape_weight": (2,)},
        "asks for the shape .* and cannot grow",
    ),
}


@pytest.mark.parametrize("shapes_only", [False, True])
@pytest.mark.parametrize("case", BAD_MODULES)
def test_factors_that_do_not_fit_are_named_with_their_shapes(case, shapes_only, tmp_path):
    shapes, message = BAD_MODULES[case]
    tensors = {
        f"transformer.layers.0.feed_forward.w1{suffix}": torch.ones(shape)
        for suffix, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", shapes_only=shapes_only)
    with pytest.raises(LoraError, match=message) as caught:
        match_lora(lora, SHAPES)
    assert str(caught.value).startswith("a.safetensors: transformer.layers.0.feed_forward.w1")


def test_a_slice_that_does_not_fit_is_named_with_its_rows():
    lora = Lora("a", lora_tensors("lora_unet_layers_0_attention_to_k", rows=18))
    with pytest.raises(LoraError, match=r"qkv\.weight \(rows 6 to 11\) is \[6, 6\]"):
        match_lora(lora, SHAPES)


def test_a_bias_patch_without_a_bias_is_unused():
    tensors = {
        "diffusion_model.layers.0.attention.out.diff_b": torch.ones(WIDTH),
        "diffusion_model.layers.0.attention.to_q.diff_b": torch.ones(WIDTH),
    }
    assert match_lora(Lora("a", tensors), SHAPES).unused == tuple(tensors)


@pytest.mark.parametrize("strict", [True, False])
def test_a_lora_for_another_model_is_refused_with_its_coverage(strict):
    tensors: dict[str, torch.Tensor] = {}
    for block in range(60):
        tensors |= lora_tensors(f"transformer.double_blocks.{block}.img_attn.proj")
    lora = Lora("flux.safetensors", tensors)
    match = match_lora(lora, SHAPES)
    first = "transformer.double_blocks.0.img_attn.proj.lora_up.weight"
    message = f"flux.safetensors: 0 of 120 tensors used, first unused: {first}, .*another model"
    with pytest.raises(LoraError, match=message):
        require_match(match, lora, strict=strict)


def test_a_lora_that_is_used_in_part_is_refused_with_its_coverage():
    lora = Lora("a", {**lora_tensors(), "layers.0.feed_forward.w1.strange": torch.ones(1)})
    with pytest.raises(LoraError, match=r"2 of 3 tensors used, first unused: layers\.0\..*strange"):
        require_match(match_lora(lora, SHAPES), lora)


def test_strict_false_applies_what_changes_the_model_and_refuses_a_file_without_that():
    strange = {"layers.0.feed_forward.w1.strange": torch.ones(1)}
    lora = Lora("a", lora_tensors() | strange)
    require_match(match_lora(lora, SHAPES), lora, strict=False)
    lora = Lora("a", {"diffusion_model.x_pad_token.diff": torch.ones(1, WIDTH)} | strange)
    with pytest.raises(LoraError, match=r"first unused: .*strange.*; use one trained for this"):
        require_match(match_lora(lora, SHAPES), lora, strict=False)


def test_a_misfit_among_strange_names_counts_the_strangers():
    tensors = lora_tensors("final_layer.linear", rows=99) | lora_tensors("double_blocks.0.proj")
    with pytest.raises(LoraError, match="2 more tensors name no module of this model"):
        match_lora(Lora("a", tensors), SHAPES)


def error_of(call):
    """The message of the LoraError that `call` ends in, None if it ends well."""
    try:
        call()
    except LoraError as error:
        return str(error)
    return None


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    cut=st.integers(0, 600),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
)
def test_broken_files_raise_lora_errors_only(tmp_path, cut, changes):
    content = bytearray(save(lora_tensors()))
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path / "broken.safetensors"
    path.write_bytes(bytes(content[: max(1, len(content) - cut)] if cut else content))
    message = error_of(lambda: match_lora(read_lora(path), SHAPES))
    assert "\n" not in (message or "")


SUFFIXES = [*itertools.chain(*PAIRS), ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"]
SUFFIXES += [".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"]
SUFFIXES += [".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight", ".alpha", ".dora_scale"]
SUFFIXES += [".reshape_weight", ".lora_mid.weight", "", ".weight"]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.tuples(
            st.sampled_from(["layers.0.feed_forward.w1", "x_embedder", "x_pad_token", "a\nb", ""]),
            st.sampled_from(SUFFIXES),
        ),
        st.lists(st.sampled_from([0, 1, 2, 6, 8]), max_size=4),
        max_size=4,
    )
)
def test_any_mixture_of_keys_and_shapes_fits_or_is_refused(entries):
    lora = Lora("a", {module + suffix: torch.ones(s) for (module, suffix), s in entries.items()})
    message = error_of(lambda: match_lora(lora, SHAPES))
    if message is not None:
        assert "\n" not in message
        return
    match = match_lora(lora, SHAPES)
    parts = [match.used, match.inert, match.unused]
    assert sum(map(len, parts)) == len(lora.tensors)
    assert set().union(*parts) == set(lora.tensors)
    for (component, name), patches in match.patches.items():
        weight = torch.ones(SHAPES[component][name])
        apply_patches(weight, [(patch, 0.5) for patch in patches])
        assert weight.isfinite().all()
