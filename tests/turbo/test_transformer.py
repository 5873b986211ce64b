"""The network against two others: its definition in float64, written out here, and diffusers'."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from turbo import transformer as module
from turbo.errors import CheckpointError
from turbo.names import NETWORK, diffusers_names
from turbo.testing import initialise, zimage_shapes
from turbo.transformer import (
    ROTARY_SHARES,
    Transformer,
    TransformerConfig,
    padded_length,
    patchify,
    rotate,
    unpatchify,
)

Weights = dict[str, Tensor]
CAPTION_DIM = 24
HEAD = 16


def make_weights(dim: int = 32, ffn: int = 85) -> Weights:
    """Heads of 16 and a feed-forward width that is no multiple of 32: diffusers' for this `dim`."""
    sizes = {"dim": dim, "n_layers": 2, "n_refiner_layers": 1, "n_heads": dim // HEAD}
    sizes |= {"cap_feat_dim": CAPTION_DIM, "ffn_hidden": ffn, "time_hidden": 1024}
    return initialise(zimage_shapes(sizes), seed=1)


def make_transformer(
    weights: Weights,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    compute_dtype: torch.dtype | None = None,
) -> Transformer:
    config = TransformerConfig.from_shapes({name: w.shape for name, w in weights.items()})
    transformer = Transformer(config, device, dtype, compute_dtype=compute_dtype)
    for name, view in transformer.native_tensors().items():
        view.copy_(weights[name])
    return transformer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(transformer: Transformer, latent: Tensor, features: Tensor, sigma: float) -> Tensor:
    """The whole network: its pieces put together as the engine does."""
    caption = transformer.refine_caption(features)
    output: Tensor = transformer(
        latent.to(transformer.dtype),
        caption,
        transformer.modulation_table([sigma])[0],
        transformer.rotary_table(latent.shape[2], latent.shape[3], caption.shape[1]),
    )
    return output


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights()


@pytest.fixture(params=[False, True], ids=["eager-cpu", "compiled-or-gpu"])
def _each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotations are written twice, for an eager CPU and for everything else."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)


each_way = pytest.mark.usefixtures("_each_way")


@pytest.fixture
def transformer(weights: Weights) -> Transformer:
    return make_transformer(weights)


# The definition, for one picture, in float64.


def plain_linear(w: Weights, name: str, x: Tensor) -> Tensor:
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)


def plain_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_angles(positions: list[tuple[int, int, int]]) -> Tensor:
    """Angle of each pair of a head's channels, [tokens, head / 2]: axes of 4, 6 and 6 channels."""
    return torch.tensor(
        [
            [p * 256 ** (-2 * i / m) for p, m in zip(position, (4, 6, 6)) for i in range(m // 2)]
            for position in positions
        ],
        dtype=torch.float64,
    )


def plain_positions(rows: int, columns: int, caption: int) -> list[tuple[int, int, int]]:
    image = [(caption + 1, r, q) for r in range(rows) for q in range(columns)]
    pads = [(0, 0, 0)] * (-len(image) % 32)
    return [(k + 1, 0, 0) for k in range(caption)] + image + pads


def plain_rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x[:, 0::2], x[:, 1::2]
    turned = torch.empty_like(x)
    turned[:, 0::2] = a * angles.cos() - b * angles.sin()
    turned[:, 1::2] = a * angles.sin() + b * angles.cos()
    return turned


def plain_attention(w: Weights, name: str, x: Tensor, angles: Tensor) -> Tensor:
    q, k, v = plain_linear(w, f"{name}.qkv", x).chunk(3, dim=-1)
    heads = []
    for part in range(x.shape[-1] // HEAD):
        own = slice(HEAD * part, HEAD * (part + 1))
        query = plain_rotate(plain_norm(q[:, own], w[f"{name}.q_norm.weight"], 2**-23), angles)
        key = plain_rotate(plain_norm(k[:, own], w[f"{name}.k_norm.weight"], 2**-23), angles)
        heads.append((query @ key.T / math.sqrt(HEAD)).softmax(-1) @ v[:, own])
    return plain_linear(w, f"{name}.out", torch.cat(heads, dim=-1))


def plain_block(
    w: Weights, name: str, h: Tensor, angles: Tensor, c: Tensor | None = None
) -> Tensor:
    s1 = s2 = torch.tensor(0.0)
    g1 = g2 = torch.tensor(math.inf)
    if c is not None:
        s1, g1, s2, g2 = plain_linear(w, f"{name}.adaLN_modulation.0", c).chunk(4)
    x = plain_norm(h, w[f"{name}.attention_norm1.weight"]) * (1 + s1)
    x = plain_attention(w, f"{name}.attention", x, angles)
    h = h + g1.tanh() * plain_norm(x, w[f"{name}.attention_norm2.weight"])
    x = plain_norm(h, w[f"{name}.ffn_norm1.weight"]) * (1 + s2)
    gate, value = (plain_linear(w, f"{name}.feed_forward.{part}", x) for part in ("w1", "w3"))
    x = plain_linear(w, f"{name}.feed_forward.w2", gate / (1 + (-gate).exp()) * value)
    return h + g2.tanh() * plain_norm(x, w[f"{name}.ffn_norm2.weight"])


def plain_time(w: Weights, sigma: float) -> Tensor:
    angles = [1000 * (1 - sigma) * 10000 ** (-i / 128) for i in range(128)]
    wave = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
    hidden = plain_linear(w, "t_embedder.mlp.0", wave)
    return plain_linear(w, "t_embedder.mlp.2", hidden * hidden.sigmoid())


def plain_caption(w: Weights, features: Tensor) -> Tensor:
    x = plain_linear(w, "cap_embedder.1", plain_norm(features, w["cap_embedder.0.weight"]))
    x = torch.cat((x, w["cap_pad_token"].expand(-len(x) % 32, -1)))
    return plain_block(w, "context_refiner.0", x, plain_angles(plain_positions(0, 0, len(x))))


def plain_network(w: Weights, latent: Tensor, features: Tensor, sigma: float) -> Tensor:
    channels, height, width = latent.shape
    rows, columns = math.ceil(height / 2), math.ceil(width / 2)
    c, caption = plain_time(w, sigma), plain_caption(w, features)
    corners = [(2 * r, 2 * q) for r in range(rows) for q in range(columns)]
    cells = [(y + i, x + j) for y, x in corners for i in (0, 1) for j in (0, 1)]
    pixels = torch.stack([latent[:, y % height, x % width] for y, x in cells])
    patches = pixels.reshape(rows * columns, 4 * channels)
    image = plain_linear(w, "x_embedder", patches)
    image = torch.cat((image, w["x_pad_token"].expand(-len(image) % 32, -1)))
    angles = plain_angles(plain_positions(rows, columns, len(caption)))
    image = plain_block(w, "noise_refiner.0", image, angles[len(caption) :], c)
    h = torch.cat((caption, image))
    for index in range(2):
        h = plain_block(w, f"layers.{index}", h, angles, c)
    h = h[len(caption) :][: rows * columns]
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    h = h * (1 + plain_linear(w, "final_layer.adaLN_modulation.1", c * c.sigmoid()))
    values = plain_linear(w, "final_layer.linear", h).reshape(-1, channels)
    out = torch.full_like(latent, torch.nan)
    for (y, x), value in zip(cells, values):
        if y < height and x < width:
            out[:, y, x] = -value
    return out


@pytest.fixture(scope="module")
def exact(weights: Weights) -> Weights:
    return {name: value.double() for name, value in weights.items()}


def assert_near(got: Tensor, want: Tensor, limit: float = 2e-5) -> None:
    error = (got.double() - want.double()).abs().max() / want.abs().max()
    assert got.shape == want.shape
    assert float(error) < limit


@each_way
@pytest.mark.parametrize("tokens", [1, 31, 32, 33])
def test_a_refined_caption_is_as_defined(transformer: Transformer, exact: Weights, tokens: int):
    features = random(2, tokens, CAPTION_DIM)
    want = torch.stack([plain_caption(exact, row.double()) for row in features])
    assert_near(transformer.refine_caption(features), want)


@pytest.mark.parametrize(("height", "width"), [(0, 0), (4, 6), (5, 7), (16, 2)])
def test_a_rotary_table_is_as_defined(transformer: Transformer, height: int, width: int):
    angles = plain_angles(plain_positions(math.ceil(height / 2), math.ceil(width / 2), 64))
    want = torch.stack((angles.cos(), angles.sin()), dim=1).unsqueeze(2)
    table = transformer.rotary_table(height, width, 64)
    assert table.dtype == torch.float32
    assert_near(table, want, 1e-7)


def test_a_modulation_table_is_as_defined(transformer: Transformer, exact: Weights):
    # norm * (1 + scale) and norm * tanh(gate), so that norm and modulation are one factor.
    sigmas = [1.0, 0.5, 0.125]
    for sigma, rows in zip(sigmas, transformer.modulation_table(sigmas)):
        c = plain_time(exact, sigma)
        want = []
        for block in ("noise_refiner.0", "layers.0", "layers.1"):
            s1, g1, s2, g2 = plain_linear(exact, f"{block}.adaLN_modulation.0", c).chunk(4)
            norms = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
            factors = (1 + s1, g1.tanh(), 1 + s2, g2.tanh())
            want += [exact[f"{block}.{n}.weight"] * f for n, f in zip(norms, factors)]
        want.append(1 + plain_linear(exact, "final_layer.adaLN_modulation.1", c * c.sigmoid()))
        assert_near(rows, torch.stack(want), 1e-4)  # 1000 * (1 - sigma) radians in float32


def test_all_sigmas_at_once_are_modulated_as_one_by_one(transformer: Transformer):
    together = transformer.modulation_table([0.9, 0.3, 0.0])
    single = torch.cat([transformer.modulation_table([sigma]) for sigma in (0.9, 0.3, 0.0)])
    torch.testing.assert_close(together, single)


@each_way
@pytest.mark.parametrize(
    ("height", "width", "tokens"), [(4, 6, 7), (5, 7, 33), (1, 1, 1), (3, 2, 40), (8, 16, 32)]
)
def test_the_network_is_as_defined(
    transformer: Transformer, exact: Weights, height: int, width: int, tokens: int
):
    latent, features = random(1, 16, height, width), random(1, tokens, CAPTION_DIM, seed=1)
    want = plain_network(exact, latent[0].double(), features[0].double(), 0.625)
    assert_near(predict(transformer, latent, features, 0.625)[0], want)


# Against diffusers.


@pytest.fixture(scope="module", params=[(32, 85), (48, 128)], ids=["padded", "whole"])
def official(request: pytest.FixtureRequest) -> tuple[ZImageTransformer2DModel, Weights]:
    """diffusers' model, whose feed-forward width is always 8/3 of `dim`, and its weights."""
    dim, ffn = request.param
    weights = make_weights(dim, ffn)
    model = ZImageTransformer2DModel(
        dim=dim,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=dim // HEAD,
        n_kv_heads=dim // HEAD,
        cap_feat_dim=CAPTION_DIM,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )
    renamed: Weights = {}
    for name, names in diffusers_names(NETWORK, weights).items():
        renamed |= dict(zip(names, weights[name].chunk(len(names)), strict=True))
    model.load_state_dict(renamed)
    return model.eval(), weights


@torch.no_grad()
def predict_officially(
    model: ZImageTransformer2DModel, latent: Tensor, features: Tensor, sigma: float
) -> Tensor:
    """Its pipeline changes the sign, too."""
    dtype = next(model.parameters()).dtype
    latents = [row.unsqueeze(1).to(dtype) for row in latent]
    time = torch.full((len(latents),), 1 - sigma, dtype=torch.float32)
    out = model(latents, time, [row.to(dtype) for row in features], return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


@each_way
@pytest.mark.parametrize(("height", "width", "tokens"), [(4, 6, 7), (8, 16, 32), (2, 10, 45)])
def test_the_network_is_that_of_diffusers(
    official: tuple[ZImageTransformer2DModel, Weights],
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    width: int,
    tokens: int,
):
    monkeypatch.setattr(module, "QK_NORM_EPS", 1e-5)  # the one setting in which it differs
    model, weights = official
    latent, features = random(2, 16, height, width), random(2, tokens, CAPTION_DIM, seed=1)
    want = predict_officially(model, latent, features, 0.625)
    assert_near(predict(make_transformer(weights), latent, features, 0.625), want)


@each_way
def test_bfloat16_errs_at_most_twice_as_far_as_diffusers_eager_bfloat16(
    official: tuple[ZImageTransformer2DModel, Weights],
):
    model, weights = official
    exact = {name: value.double() for name, value in weights.items()}  # bfloat16 holds them
    transformer, model = make_transformer(weights, torch.bfloat16), copy.deepcopy(model).bfloat16()
    ours, theirs = [], []
    for seed, sigma in enumerate((0.96875, 0.625, 0.125)):
        latent = random(1, 16, 6, 8, seed=seed).bfloat16()
        features = random(1, 20, CAPTION_DIM, seed=9 + seed).bfloat16()
        want = plain_network(exact, latent[0].double(), features[0].double(), sigma)
        ours.append(predict(transformer, latent, features, sigma)[0] - want)
        theirs.append(predict_officially(model, latent, features, sigma)[0] - want)
    assert 0 < torch.stack(ours).norm() <= 2 * torch.stack(theirs).norm()


# What the definition implies.


def test_a_batch_of_two_is_two_pictures(transformer: Transformer):
    latent, features = random(2, 16, 5, 6), random(2, 20, CAPTION_DIM, seed=1)
    together = predict(transformer, latent, features, 0.5)
    single = [predict(transformer, latent[k : k + 1], features[k : k + 1], 0.5) for k in (0, 1)]
    torch.testing.assert_close(together, torch.cat(single))


def test_a_caption_of_exactly_32_tokens_gets_no_pad(weights: Weights):
    transformer = make_transformer(weights)
    captions = [random(1, tokens, CAPTION_DIM) for tokens in (32, 33)]
    before = [transformer.refine_caption(features) for features in captions]
    transformer.cap_pad_token.add_(1)
    after = [transformer.refine_caption(features) for features in captions]
    assert [caption.shape[1] for caption in after] == [32, 64]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_caption_pads_are_attended(weights: Weights):
    # Even the rows of the real tokens change with the pad token.
    transformer = make_transformer(weights)
    before = transformer.refine_caption(random(1, 5, CAPTION_DIM))
    transformer.cap_pad_token.add_(1)
    after = transformer.refine_caption(random(1, 5, CAPTION_DIM))
    assert not torch.isclose(after[:, :5], before[:, :5]).any()


@pytest.mark.parametrize(("width", "attended"), [(14, True), (16, False)])
def test_image_pads_are_attended_where_there_are_any(weights: Weights, width: int, attended: bool):
    # 4 x 7 = 28 patches are padded to 32, 4 x 8 need none.
    transformer = make_transformer(weights)
    latent, features = random(1, 16, 8, width), random(1, 5, CAPTION_DIM)
    before = predict(transformer, latent, features, 0.5)
    transformer.x_pad_token.add_(1)
    assert torch.equal(predict(transformer, latent, features, 0.5), before) != attended


@pytest.mark.parametrize(("tokens", "padded"), [(0, 0), (1, 32), (32, 32), (33, 64)])
def test_lengths_are_padded_to_the_next_multiple_of_32(tokens: int, padded: int):
    assert padded_length(tokens) == padded


def test_a_patch_is_ordered_row_column_channel():
    # Two channels, 0 .. 7 and 10 .. 17, of 2 rows and 4 columns.
    channel = torch.arange(8.0).reshape(2, 4)
    patches = patchify(torch.stack((channel, channel + 10)).unsqueeze(0))
    assert patches.tolist() == [[[0, 10, 1, 11, 4, 14, 5, 15], [2, 12, 3, 13, 6, 16, 7, 17]]]


def test_odd_sides_wrap_around():
    latent = torch.arange(3.0).reshape(1, 1, 1, 3)  # 0 1 2 | 0 in both rows
    assert patchify(latent).tolist() == [[[0, 1, 0, 1], [2, 0, 2, 0]]]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 6), (4, 7), (1, 1)])
def test_unpatchify_undoes_patchify(height: int, width: int):
    latent = random(2, 3, height, width)
    assert torch.equal(unpatchify(patchify(latent), height, width), latent)


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotations_equal_the_formula(dtype: torch.dtype):
    x, angles = random(2, 5, 3, HEAD).to(dtype), random(5, HEAD // 2, seed=1)
    rotary = torch.stack((angles.cos(), angles.sin()), dim=1).unsqueeze(2)
    got = rotate(x, rotary)
    want = [[plain_rotate(row[:, h].double(), angles) for h in range(3)] for row in x]
    torch.testing.assert_close(got, torch.stack([torch.stack(w, 1) for w in want]).to(dtype))


def test_heads_of_128_are_split_into_axes_of_32_48_and_48():
    shapes = zimage_shapes(
        {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30}
        | {"cap_feat_dim": 2560, "ffn_hidden": 10240}
    )
    config = TransformerConfig.from_shapes(shapes)
    assert config.rotary_axes == ROTARY_SHARES == (32, 48, 48)
    assert (config.heads, config.layers, config.channels) == (30, 30, 16)
    assert (config.time_dim, config.time_hidden_dim) == (256, 1024)


# Weights.


def test_a_network_has_exactly_the_tensors_of_its_checkpoint(weights: Weights):
    transformer = make_transformer(weights)
    tensors = transformer.native_tensors()
    assert {name: w.shape for name, w in tensors.items()} == {
        n: w.shape for n, w in weights.items()
    }
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_native_tensors_cover_every_parameter_but_the_padding(weights: Weights):
    # 85 columns are stored as 96: 11 rows of w1, w3 and columns of w2, 32 wide, in 4 blocks.
    transformer = make_transformer(weights)
    for view in transformer.native_tensors().values():
        view.fill_(1)
    values = torch.cat([parameter.flatten() for parameter in transformer.parameters()])
    assert int((values == 0).sum()) == 4 * 3 * 11 * 32
    assert int((values == 1).sum()) == sum(map(torch.numel, weights.values()))
    assert values.numel() == int((values == 0).sum() + (values == 1).sum())


def test_writing_into_any_native_tensor_changes_the_output(weights: Weights):
    transformer = make_transformer(weights)
    latent, features = random(1, 16, 4, 4), random(1, 5, CAPTION_DIM)
    before = predict(transformer, latent, features, 0.5)
    for name, view in transformer.native_tensors().items():
        view.mul_(1.5)
        assert not torch.equal(predict(transformer, latent, features, 0.5), before), name
        view.copy_(weights[name])
    assert torch.equal(predict(transformer, latent, features, 0.5), before)


def test_native_tensors_follow_a_change_of_dtype(weights: Weights):
    transformer = make_transformer(weights).to(torch.bfloat16)
    latent, features = random(1, 16, 4, 4), random(1, 5, CAPTION_DIM)
    before = predict(transformer, latent, features, 0.5)
    views = transformer.native_tensors()
    assert {view.dtype for view in views.values()} == {torch.bfloat16}
    views["layers.0.feed_forward.w3.weight"].zero_()
    assert not torch.equal(predict(transformer, latent, features, 0.5), before)


def test_the_unused_last_norm_of_complete_files_is_ignored(transformer: Transformer):
    assert transformer.ignored_keys({"norm_final.weight": (32,), "other": (1,)}) == {
        "norm_final.weight"
    }
    assert transformer.ignored_keys({"other": (1,)}) == set()


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}


def test_a_config_is_read_from_shapes(weights: Weights):
    assert TransformerConfig.from_shapes(shapes_of(weights)) == TransformerConfig(
        dim=32,
        heads=2,
        head_dim=16,
        ffn_dim=85,
        layers=2,
        noise_refiners=1,
        context_refiners=1,
        caption_dim=24,
        time_dim=32,
        time_hidden_dim=1024,
        channels=16,
    )


def test_blocks_behind_a_gap_are_not_counted(weights: Weights):
    # Nothing reads them, so that loading the file names them as left over.
    shapes = shapes_of(weights) | {"layers.3.attention_norm1.weight": (32,)}
    assert TransformerConfig.from_shapes(shapes).layers == 2


@pytest.mark.parametrize(
    "name",
    [
        "x_embedder.weight",
        "layers.0.attention.q_norm.weight",
        "layers.0.feed_forward.w1.weight",
        "cap_embedder.1.weight",
        "t_embedder.mlp.2.weight",
    ],
)
def test_shapes_without_a_deciding_tensor_are_no_network(weights: Weights, name: str):
    shapes = shapes_of(weights)
    del shapes[name]
    with pytest.raises(CheckpointError, match=f"'{name}' is missing, expected"):
        TransformerConfig.from_shapes(shapes)


def test_a_deciding_tensor_of_other_dimensions_is_named(weights: Weights):
    shapes = shapes_of(weights) | {"x_embedder.weight": (32, 64, 2, 2)}
    with pytest.raises(CheckpointError, match=r"has shape \[32, 64, 2, 2\], expected 2 dimension"):
        TransformerConfig.from_shapes(shapes)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.0.attention.q_norm.weight", (24,)),  # no multiple of 16
        ("layers.0.attention.q_norm.weight", (64,)),  # wider than the network
        ("x_embedder.weight", (32, 63)),  # no whole 2 x 2 patches
    ],
)
def test_sizes_that_do_not_fit_together_are_no_network(
    weights: Weights, name: str, shape: tuple[int, ...]
):
    with pytest.raises(CheckpointError, match="do not fit together; give a Z-Image checkpoint"):
        TransformerConfig.from_shapes(shapes_of(weights) | {name: shape})


# Arithmetic.


def overflow_product(w: Weights, block: str) -> None:
    """One feed-forward value beyond 65504: 300 * 300."""
    for part in ("w1", "w3"):
        w[f"{block}.feed_forward.{part}.weight"][0] *= 300


def overflow_feed_forward(w: Weights, block: str) -> None:
    """One channel of w2's result beyond 65504, behind products that fit."""
    for part in ("w1", "w3"):
        w[f"{block}.feed_forward.{part}.weight"] *= 10
    w[f"{block}.feed_forward.w2.weight"][0] *= 10_000


def overflow_attention(w: Weights, block: str) -> None:
    """One channel behind the attention beyond 65504."""
    w[f"{block}.attention.qkv.weight"][64:] *= 300
    w[f"{block}.attention.out.weight"][0] *= 3000


@each_way
@pytest.mark.parametrize("overflow", [overflow_product, overflow_feed_forward, overflow_attention])
def test_float16_cuts_off_what_overflows_where_plain_eager_would_not(
    monkeypatch: pytest.MonkeyPatch, weights: Weights, overflow: Callable[[Weights, str], None]
):
    # What is cut dominates before and after: the norm that follows makes it the same again.
    big = {name: weight.clone() for name, weight in weights.items()}
    overflow(big, "context_refiner.0")
    exact = {name: weight.double() for name, weight in big.items()}
    features = random(1, 32, CAPTION_DIM)
    transformer = make_transformer(big, torch.float16)
    want = plain_caption(exact, features[0].double())
    assert_near(transformer.refine_caption(features)[0], want, 0.02)
    monkeypatch.setattr(module, "clamp_float16", lambda x: x)
    assert not transformer.refine_caption(features).isfinite().all()


@each_way
def test_float16_without_overflow_is_as_defined(weights: Weights, exact: Weights):
    latent, features = random(1, 16, 4, 6), random(1, 5, CAPTION_DIM)
    want = plain_network(exact, latent[0].double(), features[0].double(), 0.5)
    assert_near(
        predict(make_transformer(weights, torch.float16), latent, features, 0.5)[0], want, 0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_piece_works_in_the_networks_dtype(weights: Weights, dtype: torch.dtype):
    transformer = make_transformer(weights, dtype)
    features = random(1, 5, CAPTION_DIM)
    caption, modulation = transformer.refine_caption(features), transformer.modulation_table([0.5])
    out = transformer(
        random(1, 16, 4, 4).to(dtype), caption, modulation[0], transformer.rotary_table(4, 4, 32)
    )
    assert transformer.dtype == caption.dtype == modulation.dtype == out.dtype == dtype


@each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_can_be_calculated_with_in_float32(weights: Weights, dtype: torch.dtype):
    latent, features = random(1, 16, 4, 6).to(dtype), random(1, 5, CAPTION_DIM)
    narrow = {name: weight.to(dtype).float() for name, weight in weights.items()}
    want = predict(make_transformer(narrow), latent.float(), features, 0.5)
    plain = predict(make_transformer(weights, dtype), latent, features, 0.5)
    wide = predict(
        make_transformer(weights, dtype, compute_dtype=torch.float32), latent, features, 0.5
    )
    assert wide.dtype == dtype
    assert (wide.float() - want).norm() < (plain.float() - want).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_network_reads_nothing_back(weights: Weights, dtype: torch.dtype):
    # A meta tensor has no values: any .item(), comparison or copy to the host would raise.
    config = TransformerConfig.from_shapes(shapes_of(weights))
    transformer = Transformer(config, "meta", dtype)
    latent = torch.empty(2, 16, 5, 6, device="meta")
    features = torch.empty(2, 40, CAPTION_DIM, device="meta")
    out = predict(transformer, latent, features, 0.5)
    assert (out.device.type, out.shape, out.dtype) == ("meta", latent.shape, dtype)


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Deterministic algorithms fill what `torch.empty` returns."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_is_nan")
def test_no_output_and_no_padding_is_left_unwritten(weights: Weights):
    assert torch.empty(3).isnan().all()
    transformer = make_transformer(weights)
    out = predict(transformer, random(1, 16, 5, 7), random(1, 33, CAPTION_DIM), 0.5)
    assert out.isfinite().all()
