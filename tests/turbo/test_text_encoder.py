"""The text encoder against the recorded values, against transformers, and its weights' names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from turbo.errors import BadInputError, CheckpointError
from turbo.text_encoder import TextEncoder, TextEncoderConfig

ODD = TextEncoderConfig(
    vocab_size=97,
    hidden_size=40,
    intermediate_size=72,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
)
WIDE = TextEncoderConfig(
    vocab_size=300,
    hidden_size=192,
    intermediate_size=400,
    num_layers=6,
    num_heads=6,
    num_kv_heads=3,
    head_dim=32,
)


def filled(config: TextEncoderConfig, seed: int = 0) -> TextEncoder:
    encoder = TextEncoder(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, view in encoder.native_tensors().items():
        value = torch.randn(view.shape, generator=generator)
        view.copy_(1 + value / 10 if view.dim() == 1 else value / view.shape[-1] ** 0.5)
        if "embed" in name:
            view.copy_(value)
    return encoder


def loaded(shapes_from: dict[str, Tensor], dtype: torch.dtype) -> TextEncoder:
    config = TextEncoderConfig.from_shapes({k: v.shape for k, v in shapes_from.items()})
    encoder = TextEncoder(config, dtype=dtype)
    for name, view in encoder.native_tensors().items():
        view.copy_(shapes_from[name])
    return encoder


def official(config: TextEncoderConfig, weights: dict[str, Tensor]):
    """transformers' model with the same weights, its last layer replaced by the identity."""
    from transformers import Qwen3Config, Qwen3Model

    model = Qwen3Model(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers - 1,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    state = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    model.load_state_dict(state | {"norm.weight": torch.ones(config.hidden_size)})
    model.norm = torch.nn.Identity()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(shared: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(shared / "golden/weights/te_tiny.safetensors")
    return tensors


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(shared / "golden/text_encoder.safetensors")
    return tensors


@pytest.mark.parametrize("case", ["len1", "len5", "len32", "len33", "pad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captions_equal_the_recorded_ones(weights, golden, case: str, dtype: torch.dtype):
    mask, want = golden[f"{case}/mask"], golden[f"{case}/cond"]
    encoder = loaded(weights, dtype)  # bfloat16 holds these weights exactly; float32 computes
    got = encoder.encode(golden[f"{case}/ids"][None], None if mask.all() else mask)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 2e-5 + 1e-5 * want.abs().max()


def test_the_hidden_states_on_the_way_equal_the_recorded_ones(weights, golden):
    encoder, seen = loaded(weights, torch.float32), []
    encoder.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoder.encode(golden["len5/ids"][None])
    want = golden["len5/all_hidden"][:, : len(seen)]
    torch.testing.assert_close(torch.stack(seen, dim=1), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 7), (2, 33)])
def test_captions_equal_those_of_transformers(batch: int, tokens: int):
    encoder = filled(ODD)
    ids = torch.randint(0, ODD.vocab_size, (batch, tokens))
    want = official(ODD, encoder.native_tensors())(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoder.encode(ids), want, atol=2e-5, rtol=1e-5)


def test_masked_tokens_are_hidden_from_all_others():
    encoder = filled(ODD)
    ids = torch.randint(0, ODD.vocab_size, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    want = official(ODD, encoder.native_tensors())(input_ids=ids, attention_mask=mask)
    got = encoder.encode(ids, mask)
    torch.testing.assert_close(got, want.last_hidden_state, atol=2e-5, rtol=1e-5)
    ids[1, 5] = (ids[1, 5] + 1) % ODD.vocab_size
    same = encoder.encode(ids, mask)
    assert torch.equal(got[1, [0, 1, 2, 3, 4, 6, 7, 8]], same[1, [0, 1, 2, 3, 4, 6, 7, 8]])


def test_bfloat16_errs_at_most_twice_as_far_as_plain_bfloat16():
    encoder = filled(WIDE)
    ids = torch.randint(0, WIDE.vocab_size, (2, 40))
    exact = encoder.encode(ids)
    plain = official(WIDE, encoder.native_tensors()).bfloat16()(input_ids=ids).last_hidden_state
    encoder.to(torch.bfloat16).compute_dtype = torch.bfloat16
    got = encoder.encode(ids)
    assert got.dtype == torch.bfloat16
    error = (got.float() - exact).square().mean().sqrt()
    assert error <= 2 * (plain.float() - exact).square().mean().sqrt()


def test_float16_weights_are_computed_in_float32():
    encoder = filled(ODD).to(torch.float16)
    ids = torch.arange(5)[None]
    got = encoder.encode(ids)
    assert torch.equal(got, encoder.float().encode(ids))


def test_casting_the_module_leaves_the_rotary_tables_exact():
    encoder = filled(ODD).bfloat16().float()  # weights that bfloat16 holds exactly
    ids = torch.arange(60)[None]
    want = encoder.encode(ids)
    assert torch.equal(encoder.bfloat16().encode(ids), want)


def test_a_rotary_table_grows_when_it_must_and_stays_otherwise():
    encoder = filled(ODD)
    ids = torch.zeros(1, 700, dtype=torch.int64)
    table = encoder.rotary_table(700)
    assert encoder.rotary_table(5).data_ptr() == table.data_ptr()
    assert encoder(ids, table).shape == (1, 700, ODD.hidden_size)


def test_tokens_padded_at_the_end_change_nothing_before_them():
    encoder = filled(ODD)
    ids = torch.arange(9)[None]
    padded = torch.nn.functional.pad(ids, (0, 23), value=7)
    torch.testing.assert_close(
        encoder.encode(padded)[:, :9], encoder.encode(ids), atol=1e-5, rtol=1e-5
    )


def test_forward_is_one_graph():
    encoder = filled(ODD)
    rotary = encoder.rotary_table(9)
    ids, mask = torch.arange(9)[None], torch.tensor([[1] * 5 + [0] * 4])
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, rotary), encoder(ids, rotary))
    assert torch.equal(compiled(ids, rotary, mask), encoder(ids, rotary, mask))


@pytest.mark.parametrize("ids", [[[0, 97]], [[-1, 0]], [[]], [5]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(BadInputError, match=r"0 to 96|at least one token"):
        TextEncoder(ODD).encode(torch.tensor(ids, dtype=torch.int64))


def test_native_tensors_are_views_into_the_module():
    encoder = filled(ODD)
    ids = torch.arange(6)[None]
    before = encoder.encode(ids)
    kept = {name: view.clone() for name, view in encoder.native_tensors().items()}
    for view in encoder.native_tensors().values():
        view.mul_(1.5)
    assert not torch.allclose(encoder.encode(ids), before)
    for name, view in encoder.native_tensors().items():
        view.copy_(kept[name])
    assert torch.equal(encoder.encode(ids), before)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_every_tensor_of_the_full_size_file_has_its_place(shared: Path):
    manifest = json.loads((shared / "manifest/state_dict_shapes.json").read_text())
    shapes = {name: tuple(shape) for name, (shape, _) in manifest["qwen_3_4b.safetensors"].items()}
    encoder = TextEncoder(TextEncoderConfig.from_shapes(shapes), device="meta")
    native = {name: tuple(view.shape) for name, view in encoder.native_tensors().items()}
    ignored = encoder.ignored_keys(shapes)
    assert native | {name: shapes[name] for name in ignored} == shapes
    assert not native.keys() & ignored
    assert {name.split(".")[2] for name in ignored if ".layers." in name} == {"35"}
    ids = torch.zeros(1, 64, dtype=torch.int64, device="meta")
    assert encoder(ids, encoder.rotary_table(64)).shape == (1, 64, 2560)


def test_a_head_beside_the_layers_is_ignored(weights):
    encoder = loaded(weights, torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert "lm_head.weight" in encoder.ignored_keys(shapes | {"lm_head.weight": (512, 64)})
    assert "other.weight" not in encoder.ignored_keys(shapes | {"other.weight": (1,)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "0 layers"),
        (
            {"model.layers.1.mlp.up_proj.weight": None},
            "model.layers.1.mlp.up_proj.weight is missing",
        ),
        ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight is missing"),
        ({"model.layers.2.self_attn.k_proj.weight": (48, 64)}, r"\[32, 64\], got \[48, 64\]"),
        ({"model.layers.0.input_layernorm.weight": (64, 1)}, r"\[64\], got \[64, 1\]"),
    ],
)
def test_other_shapes_are_refused_by_name(weights, change, message: str):
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()} if change else {}
    shapes = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        TextEncoderConfig.from_shapes(shapes)
