"""8-bit weights: torchao's values and products, LoRAs in and out, files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from turbo.compile import compiled

from turbo.builtin import builtin_model
from turbo.checkpoint import load_weights, norm_groups, open_file
from turbo.cli import main
from turbo.converted_files import write_converted
from turbo.engine import Engine
from turbo.errors import BadInputError, CheckpointError, SaveError
from turbo.model_files import find_model_files
from turbo.names import AUTOENCODER, NETWORK
from turbo.plan import QUANTIZE, Plan, Stage
from turbo.quantize import (
    QUANTIZATIONS,
    VALUE_DTYPES,
    QuantizedLinear,
    QuantizedRows,
    check_quantization,
    pick_quantization,
    quantize_rows,
)
from turbo.quantized_files import write_quantized
from turbo.testing import initialise, make_tiny_model, zimage_shapes
from turbo.transformer import Transformer, TransformerConfig

# PyTorch's compiler uses a deprecated part of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

CPU = torch.device("cpu")
SMALL = Plan(stages=(Stage(name="only", height=64, width=48, steps=2),))
SHAPES = zimage_shapes(
    {
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "ffn_hidden": 48,  # stored as 64, so that w2 is a view with gaps
    }
)
OUT = "layers.0.attention.out.weight"


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(kind: str, matrix: Tensor) -> QuantizedLinear:
    made = QuantizedLinear(kind, matrix.shape[1], matrix.shape[0])
    made.rows().quantize(matrix)
    return made


def official(kind: str, matrix: Tensor) -> Any:
    """torchao's own tensor of a weight, for ``F.linear``; its configurations make the same ones.

    (Of float8 they make none on a CPU, on which the tensor itself works.)
    """
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor
    from torchao.quantization.quantize_.workflows.int8 import int8_tensor

    if kind == "fp8":
        torch_only = KernelPreference.TORCH
        return Float8Tensor.from_hp(
            matrix,
            granularity=PerRow(),
            mm_config=Float8MMConfig(use_fast_accum=True),
            kernel_preference=torch_only,
            act_quant_kwargs=float8_tensor.QuantizeTensorToFloat8Kwargs(
                granularity=PerRow(), hp_value_lb=1e-12, kernel_preference=torch_only
            ),
        )
    activations = int8_tensor.QuantizeTensorToInt8Kwargs(granularity=PerRow())
    return Int8Tensor.from_hp(
        matrix, PerRow(), act_quant_kwargs=activations if kind == "int8" else None
    )


def small_network(
    folder: Path, kind: str | None, dtype: torch.dtype = torch.float32
) -> Transformer:
    path = folder / "network.safetensors"
    save_file(initialise(SHAPES, 0), path)
    network = Transformer(TransformerConfig.from_shapes(SHAPES), "cpu", dtype, quantize=kind)
    load_weights(network, open_file(NETWORK, path))
    return network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model as `turbo quantize` writes it, in each way."""
    folder = tmp_path_factory.mktemp("written")
    files = find_model_files(model)
    return {kind: write_quantized(files, folder / kind, kind) for kind in QUANTIZATIONS}


def load(path: Path, quantize: str | None = None, **options: Any) -> Engine:
    return Engine.from_pretrained(path, device="cpu", plan=SMALL, quantize=quantize, **options)


def pixels(engine: Engine) -> bytes:
    return engine.generate("a lighthouse", seed=1).image.tobytes()


def stored(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.models.transformer.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


# Values and products.


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_values_and_products_are_torchaos_own(kind: str) -> None:
    matrix, x = random(0, 48, 64), random(1, 2, 40, 64)
    want, ours = official(kind, matrix), linear(kind, matrix)
    assert torch.equal(ours.values.float(), want.qdata.float())
    assert torch.equal(ours.scales, want.scale)
    torch.testing.assert_close(ours(x), F.linear(x, want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_near_the_exact_one_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    matrix, x = random(0, 96, 128), random(1, 3, 7, 128).to(dtype)
    exact = F.linear(x.double(), matrix.double())
    product = linear(kind, matrix)(x)
    assert product.dtype == dtype
    error = (product.double() - exact).norm() / exact.norm()
    assert error < {"fp8": 0.05, "int8": 0.02, "int8-weight-only": 0.015}[kind]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_each_token_and_each_row_has_a_scale_of_its_own(kind: str) -> None:
    matrix, x = random(0, 8, 32), random(1, 4, 32)
    large_row, large_token = matrix.clone(), x.clone()
    large_row[0] *= 1e4
    large_token[0] *= 1e4
    want = linear(kind, matrix)(x)
    torch.testing.assert_close(linear(kind, large_row)(x)[:, 1:], want[:, 1:])
    torch.testing.assert_close(linear(kind, matrix)(large_token)[1:], want[1:])


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_rows_and_tokens_of_zeros_give_zeros(kind: str) -> None:
    matrix = random(0, 4, 32)
    matrix[1] = 0
    product = linear(kind, matrix)(torch.stack((torch.zeros(32), torch.ones(32))))
    assert product[0].abs().max() == 0
    assert product[1, 1] == 0
    assert product.isfinite().all()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(kind: str, bad: float) -> None:
    matrix, x = random(0, 4, 32), random(1, 2, 32)
    x[0, 3] = bad
    product = linear(kind, matrix)(x)
    assert not product[0].isfinite().any()
    assert product[1].isfinite().all()


def test_compiled_products_are_the_eager_ones() -> None:
    kind = "fp8"  # a compiled engine in int8 comes below
    module, x = linear(kind, random(0, 48, 64)), random(1, 40, 64)
    fast = compiled(lambda m, x: F.silu(m(x)), name=kind, strict=True)
    torch.testing.assert_close(fast(module, x), F.silu(module(x)), rtol=1e-5, atol=1e-5)


def test_quantising_in_runs_of_rows_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(0, 33, 64)
    whole = linear("fp8", matrix)
    monkeypatch.setattr("turbo.quantize._CHUNK_VALUES", 128)
    parts = linear("fp8", matrix)
    assert same_bits(whole.state_dict(), parts.state_dict())


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_rows_give_their_values_back_within_a_step(kind: str) -> None:
    matrix = random(0, 8, 32)
    rows = QuantizedRows(kind, *quantize_rows(kind, matrix))
    step = matrix.abs().amax(1, keepdim=True) / (16 if kind == "fp8" else 127)
    assert ((rows.dequantize() - matrix).abs() <= step).all()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_large_float16_activations_overflow_no_sum(kind: str) -> None:
    matrix, x = random(0, 16, 4096) * 0.02, random(1, 8, 4096) * 50
    product = linear(kind, matrix)(x.half())
    exact = F.linear(x.double(), matrix.double())
    assert product.isfinite().all()
    assert (product.double() - exact).norm() / exact.norm() < 0.05


# In the network.


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_only_the_hot_blocks_matrices_are_quantised(tmp_path: Path, kind: str) -> None:
    network = small_network(tmp_path, kind)
    names = set(network.quantized_rows())
    parts = ("attention.qkv", "attention.out", *(f"feed_forward.w{n}" for n in (1, 2, 3)))
    assert names == {
        f"{block}.0.{part}.weight" for block in ("layers", "noise_refiner") for part in parts
    }
    assert names.isdisjoint(network.native_tensors())
    assert names | network.native_tensors().keys() == SHAPES.keys() - {"norm_final.weight"}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_network_stays_near_the_exact_one(tmp_path: Path, kind: str) -> None:
    exact, network = small_network(tmp_path, None), small_network(tmp_path, kind)
    features, latent = random(2, 1, 10, 16), random(3, 1, 16, 8, 6)

    def run(module: Transformer) -> Tensor:
        caption = module.refine_caption(features)
        rotary = module.rotary_table(8, 6, caption.shape[1])
        modulation = module.modulation_table([0.7])[0]
        return cast(Tensor, module(latent, caption, modulation, rotary))

    with torch.inference_mode():
        want, got = run(exact), run(network)
    assert 0 < (got - want).norm() / want.norm() < {"fp8": 0.1}.get(kind, 0.05)


def test_padding_columns_stay_zero(tmp_path: Path) -> None:
    w2: Any = small_network(tmp_path, "int8").layers[0].feed_forward.w2  # type: ignore[union-attr]
    assert w2.values.shape == (32, 64)
    assert w2.values[:, 48:].abs().max() == 0


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_an_engine_makes_nearly_the_same_picture(model: Path, kind: str) -> None:
    exact, quantised = load(model), load(model, kind)
    want = torch.frombuffer(bytearray(pixels(exact)), dtype=torch.uint8).float()
    got = torch.frombuffer(bytearray(pixels(quantised)), dtype=torch.uint8).float()
    assert 0 < (want - got).square().mean().sqrt() < 12
    assert quantised.generate("x", seed=0).metadata[0]["quantize"] == kind


def test_the_plan_can_ask_for_it_and_an_argument_wins(model: Path) -> None:
    from dataclasses import replace

    plan = replace(SMALL, model=replace(SMALL.model, quantize="int8"))
    asked = Engine.from_pretrained(model, device="cpu", plan=plan)
    denied = Engine.from_pretrained(model, device="cpu", plan=plan, quantize="none")
    assert asked.models.transformer.quantize == "int8"
    assert denied.models.transformer.quantize is None


# LoRAs.


def lora_file(folder: Path) -> Path:
    difference = random(5, 192, 192) * 0.05
    path = folder / "style.safetensors"
    save_file({f"diffusion_model.{OUT.removesuffix('.weight')}.diff": difference}, path)
    return path


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_lora_is_fused_before_and_taken_out_bit_for_bit(
    model: Path, tmp_path: Path, kind: str
) -> None:
    engine = load(model, kind)
    before = stored(engine)
    storage = engine.models.transformer.quantized_rows()[OUT].values.data_ptr()
    engine.set_loras([(lora_file(tmp_path), 1.0)])
    rows = engine.models.transformer.quantized_rows()[OUT]
    fused = torch.empty(rows.shape)
    engine._fuser._checkpoints[NETWORK].copy_into(OUT, fused)
    values, scales = quantize_rows(kind, fused + load_file(lora_file(tmp_path)).popitem()[1])
    assert torch.equal(rows.values.float(), values.float())
    assert torch.equal(rows.scales, scales)
    assert rows.values.data_ptr() == storage
    engine.set_loras([])
    assert same_bits(stored(engine), before)


def test_swapping_a_lora_captures_and_compiles_nothing(model: Path, tmp_path: Path) -> None:
    engine = load(model, "int8", capture="replay")
    engine.warmup(buckets=(32,))
    plain = pixels(engine)
    before = engine.counters
    engine.set_loras([(lora_file(tmp_path), 1.0)])
    styled = pixels(engine)
    engine.set_loras([])
    assert pixels(engine) == plain != styled
    after = engine.counters
    assert (after.captures, after.compilations) == (before.captures, before.compilations)


def test_a_compiled_engine_swaps_loras_without_compiling(model: Path, tmp_path: Path) -> None:
    engine = load(model, "int8", compile=True, cache_dir=tmp_path / "cache")
    plain = pixels(engine)
    before = engine.counters.compilations
    engine.set_loras([(lora_file(tmp_path), 1.0)])
    assert pixels(engine) != plain
    engine.set_loras([])
    assert pixels(engine) == plain
    assert engine.counters.compilations == before > 0


# Files.


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_written_model_is_read_as_it_is_and_equals_quantising_at_load(
    model: Path, written: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = load(model, kind)

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is to be quantised")

    monkeypatch.setattr("turbo.quantize.quantize_rows", refuse)
    engine = load(written[kind])
    assert engine.models.transformer.quantize == kind
    assert same_bits(stored(engine), stored(fresh))
    assert pixels(engine) == pixels(fresh)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_lora_on_a_written_model_goes_out_again(
    written: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    engine = load(written[kind])
    before = stored(engine)
    engine.set_loras([(lora_file(tmp_path), 1.0)])
    assert not same_bits(stored(engine), before)
    engine.set_loras([])
    assert same_bits(stored(engine), before)


def test_a_written_model_can_be_widened(written: dict[str, Path]) -> None:
    engine = load(written["int8"], "none")
    narrow = load(written["int8"]).models.transformer.quantized_rows()[OUT]
    assert engine.models.transformer.quantize is None
    wide = engine.models.transformer.native_tensors()[OUT]
    assert torch.equal(wide, narrow.dequantize())


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_written_file_is_whole_aligned_and_says_what_it_is(
    written: dict[str, Path], kind: str
) -> None:
    (path,) = (written[kind] / "diffusion_models").iterdir()
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "turbo.quantize": kind}
        names = set(file.keys())
        assert file.get_tensor(OUT).dtype == VALUE_DTYPES[kind]
        assert file.get_tensor(f"{OUT}_scale").shape == (192, 1)
        assert file.get_tensor("x_embedder.weight").dtype == torch.bfloat16
    assert {name.removesuffix("_scale") for name in names} >= names - {
        name for name in names if name.endswith("_scale")
    }
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
    for name, entry in table.items():
        if name != "__metadata__":
            width = {"I8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}[entry["dtype"]]
            assert (8 + length + entry["data_offsets"][0]) % width == 0


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_both_layouts_are_kept_and_make_the_same_picture(tmp_path: Path, layout: str) -> None:
    files = find_model_files(make_tiny_model(tmp_path / "model", layout))
    out = write_quantized(files, tmp_path / "out", "fp8")
    assert find_model_files(out).layout == layout
    assert pixels(load(out)) == pixels(load(tmp_path / "model", "fp8"))


def test_component_folders_become_files_beside_a_single_network_file(tmp_path: Path) -> None:
    files = find_model_files(builtin_model())
    single = write_converted(files, tmp_path / "single", "comfyui")
    mixed = find_model_files(
        diffusion_model=next((single / "diffusion_models").iterdir()),
        text_encoder=files.text_encoder,
        vae=files.vae,
        tokenizer=files.tokenizer,
    )
    out = write_quantized(mixed, tmp_path / "out", "int8")
    written = find_model_files(out)
    assert written.text_encoder.is_file()
    assert norm_groups(written.open()[AUTOENCODER]) == 4
    assert pixels(load(out)) == pixels(load(builtin_model(), "int8"))


def test_an_all_in_one_checkpoint_is_taken_apart(model: Path, tmp_path: Path) -> None:
    files = find_model_files(model)
    prefixes = {
        files.network: "model.diffusion_model.",
        files.text_encoder: "text_encoders.qwen3_4b.transformer.",
        files.vae: "vae.",
    }
    tensors = {
        f"{prefix}{name}": tensor
        for path, prefix in prefixes.items()
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, tmp_path / "all.safetensors")
    whole = find_model_files(tmp_path / "all.safetensors", tokenizer=files.tokenizer)
    out = write_quantized(whole, tmp_path / "out", "int8")
    assert pixels(load(out)) == pixels(load(model, "int8"))


def test_scaled_float8_files_keep_their_values(model: Path, tmp_path: Path) -> None:
    files = find_model_files(model)
    tensors = load_file(files.network)
    narrow = (tensors[OUT].float() / 0.01).to(torch.float8_e4m3fn)
    tensors |= {OUT: narrow, OUT.replace("weight", "scale_weight"): torch.tensor(0.01)}
    save_file(tensors, tmp_path / "scaled.safetensors")
    engine = load(model, "fp8", diffusion_model=tmp_path / "scaled.safetensors")
    rows = engine.models.transformer.quantized_rows()[OUT]
    assert torch.equal(rows.values.float(), narrow.float())
    assert (rows.scales == torch.tensor(0.01)).all()


# The command.


def test_the_command_writes_a_model_that_generate_uses(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    assert main(["quantize", str(model), "-o", str(out), "--quantize", "int8", "--quiet"]) == 0
    plan = tmp_path / "plan.yaml"
    plan.write_text("generation: {stages: 1, stage1: {height: 64, width: 48, steps: 1}}\n")
    picture = tmp_path / "out.png"
    arguments = ["generate", "x", "--model", str(out), "--plan", str(plan), "-o", str(picture)]
    assert main([*arguments, "--quiet", "--device", "cpu"]) == 0
    assert picture.exists()


def test_the_command_lines_choices_are_the_plans() -> None:
    from turbo import cli

    assert cli.QUANTIZE == QUANTIZE == ("auto", "none", *QUANTIZATIONS)


# What is refused.


def test_existing_folders_are_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(BadInputError, match="exists; give the name of a new folder"):
        write_quantized(find_model_files(model), tmp_path / "mine", "int8")
    assert (tmp_path / "mine").read_text() == "x"


def test_a_quantised_model_is_not_quantised_again(written: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"in 8 bits already \(fp8\); give the original"):
        write_quantized(find_model_files(written["fp8"]), tmp_path / "out", "int8")


def test_nothing_is_left_of_a_write_that_failed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turbo.whole_file.os.fsync", full)
    with pytest.raises(SaveError, match="No space left on device; nothing was written"):
        write_quantized(find_model_files(model), tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
@pytest.mark.parametrize("part", ["network", "text_encoder", "tokenizer"])
def test_a_file_of_the_model_that_vanishes_is_blamed_and_not_the_output(
    part: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbo.checkpoint._MAPPED_BYTES", 1)  # what is mapped stays readable
    files = find_model_files(make_tiny_model(tmp_path / "tiny", layout))
    path = getattr(files, part)

    def vanish(*_: object) -> None:
        if path.exists():
            path.rename(tmp_path / "away")

    with pytest.raises(
        CheckpointError, match=rf"^{path}.*(cannot be read|has gone|changed)"
    ) as told:
        write_quantized(files, tmp_path / "out", "int8", vanish)
    assert "cannot save" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_integers_without_a_scale_are_no_weights(model: Path, tmp_path: Path) -> None:
    tensors = load_file(find_model_files(model).network)
    tensors[OUT] = torch.ones(192, 192, dtype=torch.int8)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="1 quantised tensors have none"):
        open_file(NETWORK, tmp_path / "plain.safetensors")


def test_a_file_of_an_unknown_way_says_which_are_known(model: Path, tmp_path: Path) -> None:
    tensors = load_file(find_model_files(model).network)
    save_file(tensors, tmp_path / "new.safetensors", {"turbo.quantize": "int3"})
    with pytest.raises(CheckpointError, match="was quantised as 'int3', known are fp8, int8"):
        open_file(NETWORK, tmp_path / "new.safetensors")


@pytest.mark.parametrize(
    ("kind", "has", "message"),
    [
        ("fp8", (8, 6), r"needs a device of compute capability 8.9 .* has 8.6; use 'int8'"),
        ("int8", (7, 5), r"capability 8.0 .* has 7.5; use 'int8-weight-only'"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, has: tuple[int, int], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: has)
    with pytest.raises(BadInputError, match=message):
        check_quantization(kind, torch.device("cuda", 0))


def test_an_unknown_way_is_refused(model: Path) -> None:
    with pytest.raises(BadInputError, match="must be auto, none, fp8, int8, int8-weight-only, got"):
        load(model, "int4")


def test_without_torchao_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from turbo.quantize import _torchao

    _torchao.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(BadInputError, match="needs the package torchao"):
        quantize_rows("int8", random(0, 4, 8))


def test_auto_follows_the_file_and_none_does_not() -> None:
    assert pick_quantization(None, "int8", CPU) == "int8"
    assert pick_quantization("auto", None, CPU) is None
    assert pick_quantization("none", "int8", CPU) is None
    assert pick_quantization("fp8", "int8", CPU) == "fp8"
