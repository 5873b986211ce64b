"""Weights kept as their file stores them: the bits of those made into floats at loading."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import turbo.engine
from tests.turbo.gguf_model import convert, random_blocks, write_gguf
from tests.turbo.test_engine import PLAN, bits
from tests.turbo.test_placement import ALL_STREAMED
from tests.turbo.test_scales import quantise
from turbo import pinned, pipeline
from turbo.checkpoint import Checkpoint, load_weight, native_weights, open_file
from turbo.cli import main
from turbo.components import Components
from turbo.engine import Engine
from turbo.fusing import LoraFuser
from turbo.gguf_blocks import BLOCKS
from turbo.memory import count_outline, weight_dtypes
from turbo.model_files import find_model_files
from turbo.names import AUTOENCODER, NETWORK, TEXT_ENCODER
from turbo.placement import LOW, STREAMED, WHOLE, MemoryPlan, Placement
from turbo.stored import PLAIN, StoredLinear, StoredPart, StoredRows
from turbo.testing import TINY, TINY_TEXT_ENCODER, ModelSize, make_model
from turbo.text_encoder import TextEncoder
from turbo.transformer import Transformer

WIDE = ModelSize(
    network={**TINY.network, "dim": 192, "ffn_hidden": 500},
    text_encoder=TINY.text_encoder,
    autoencoder=TINY.autoencoder,
)
"""The feed-forward width is padded in memory, and no whole number of blocks in a file."""
CPU = torch.device("cpu")
QKV, OUT = "layers.0.attention.qkv.weight", "layers.1.attention.out.weight"


def mixture(name: str, tensor: Tensor) -> Kind:
    """Many kinds in a file, several in one fused matrix, and matrices that are not quantised."""
    if tensor.dim() < 2 or tensor.shape[-1] % 32 or name.endswith("pad_token"):
        return Kind.F32
    if "attn_q" in name or ".w1." in name:
        return Kind.Q4_0
    if "attn_v" in name or ".w3." in name:
        return Kind.BF16
    if "layers.1." in name:
        return Kind.Q5_1
    return Kind.Q8_0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Models of the same weights: as a mixture of GGUF quantisations, and in float8 with scales."""
    made = {name: tmp_path_factory.mktemp("stored") / "models" for name in ("gguf", "float8")}
    plain = make_model(tmp_path_factory.mktemp("stored") / "plain", WIDE) / "models"
    for folder in made.values():
        shutil.copytree(plain, folder)
    convert(made["gguf"], mixture)
    files = find_model_files(made["float8"])
    for path, form in ((files.network, "metadata"), (files.text_encoder, "first")):
        quantise(path, form)
        path.with_name("plain.st").unlink()
    return made


@pytest.fixture(scope="module", params=["gguf", "float8"])
def model(request: pytest.FixtureRequest, folders: Mapping[str, Path]) -> Path:
    return folders[request.param]


def load(path: Path, memory: str = "low", **options: Any) -> Engine:
    options = {"plan": PLAN, "device": "cpu", "dtype": "bfloat16", **options}
    return Engine.from_pretrained(path, memory=memory, **options)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Changes one weight of a fused matrix, and a matrix of its own, in network and encoder.

    The encoder's own one is its embedding.
    """
    draws = torch.Generator().manual_seed(5)
    names = {
        "diffusion_model.layers.0.feed_forward.w1.diff": (500, 192),
        "diffusion_model.layers.1.attention.out.diff": (192, 192),
        "text_encoders.qwen3_4b.transformer.model.layers.1.self_attn.k_proj.diff": (32, 64),
        "text_encoders.qwen3_4b.transformer.model.embed_tokens.diff": (512, 64),
    }
    path = tmp_path / "lora.safetensors"
    save_file({name: torch.randn(*size, generator=draws) for name, size in names.items()}, path)
    return path


# One matrix.


def linear(rows: int, *parts: tuple[int, StoredPart], columns: int = 256) -> StoredLinear:
    made = StoredLinear(columns, rows, parts, torch.bfloat16)
    for parameter in made.parameters():
        parameter.zero_()
    return made


def test_a_fused_matrix_is_made_of_parts_of_several_kinds_with_zeros_between():
    made = linear(
        9,
        (0, StoredPart("F8_E4M3", 2, 256, scales=2)),
        (3, StoredPart("I8", 3, 200, scales=1)),
        (6, StoredPart(PLAIN, 2, 256)),
    )
    for values, number in zip(made.values, (1.5, 7, 3.25)):
        values.copy_(torch.full(values.shape, number))
    made.scales[0].copy_(torch.tensor([[1.0], [2.0]]))
    made.scales[1].fill_(0.5)
    weight = made.weight_in(torch.float32)
    assert weight[:, 0].tolist() == [1.5, 3.0, 0, 3.5, 3.5, 3.5, 3.25, 3.25, 0]
    assert weight[3:6, 200:].count_nonzero() == 0
    assert torch.equal(made(torch.eye(256)), weight.T)


def test_results_are_rounded_through_the_dtype_that_was_asked_for():
    made = linear(1, (0, StoredPart("I8", 1, 256, scales=1)))
    made.values[0].fill_(1)
    made.scales[0].fill_(1 / 3)
    assert made.weight_in(torch.float32)[0, 0] == torch.tensor(1 / 3).bfloat16().float()


PAD = "x_pad_token"
"""Tells a file to be a network's."""


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q8_0])
def test_a_matrix_larger_than_one_run_of_rows_is_made_whole(kind: Kind, tmp_path: Path):
    blocks = random_blocks(kind, 5000, 256 // 32 if kind == Kind.Q8_0 else 1)
    checkpoint = open_file(NETWORK, write_gguf(tmp_path / "n.gguf", {PAD: blocks}, kind=kind))
    parts = checkpoint.stored(PAD)
    assert parts is not None
    made = linear(5000, (0, parts[0]))
    load_weight(checkpoint, PAD, made.rows())
    expected = torch.empty(5000, 256, dtype=torch.bfloat16)
    checkpoint.copy_into(PAD, expected)
    assert torch.equal(made.weight_in(torch.bfloat16), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "F8_E4M3", "F8_E5M2", "I8"])
@pytest.mark.parametrize("scales", [1, 40])
def test_rows_that_are_looked_up_are_those_of_the_whole(kind: str, scales: int):
    part = StoredPart(kind, 40, 256, scales=scales * (kind not in BLOCKS))
    made = linear(40, (0, part))
    draws = torch.Generator().manual_seed(3)
    for scale in made.scales:
        scale.copy_(torch.rand(scale.shape, generator=draws))
    if kind in BLOCKS:
        blocks = random_blocks(Kind[kind], 40, 256 // BLOCKS[kind][0])
        made.values[0].copy_(torch.from_numpy(blocks))
    else:
        made.values[0].copy_(torch.randint(-9, 9, (40, 256), generator=draws))
    ids = torch.tensor([[3, 39, 3], [0, 1, 17]])
    rows = made.embedding(ids)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, F.embedding(ids, made.weight_in(torch.bfloat16)))
    compiled = torch.compile(made.embedding, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ids), rows)


def test_compiled_code_makes_the_same_bits():
    made = linear(64, (0, StoredPart("Q8_0", 64, 256)))
    blocks = random_blocks(Kind.Q8_0, 64, 8)
    made.values[0].copy_(torch.from_numpy(blocks))
    x = torch.randn(3, 256)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), made(x))


def test_floats_and_what_only_the_package_reads_are_not_kept(tmp_path: Path):
    for kind, values in (
        (Kind.IQ3_S, random_blocks(Kind.IQ3_S, 4, 1)),
        (Kind.F16, torch.ones(4, 32)),
    ):
        path = write_gguf(tmp_path / f"{kind.name}.gguf", {PAD: values}, kind=kind)
        assert open_file(NETWORK, path).stored(PAD) is None


@pytest.mark.parametrize("scaled", [True, False])
def test_parts_in_8_bits_that_a_file_has_apart_keep_scales_of_their_own(
    scaled: bool, tmp_path: Path
):
    draws = torch.Generator().manual_seed(2)
    tensors = {PAD: torch.ones(1, 64)}
    for letter, scale in zip("qkv", (torch.tensor(0.3), torch.rand(8, 1), torch.rand(1))):
        name = f"layers.0.attention.to_{letter}"
        tensors[f"{name}.weight"] = torch.randn(8, 64, generator=draws).to(torch.float8_e4m3fn)
        if scaled:
            tensors[f"{name}.weight_scale"] = scale
    save_file(tensors, tmp_path / "fp8.safetensors")
    checkpoint = open_file(NETWORK, tmp_path / "fp8.safetensors")
    parts = checkpoint.stored(QKV)
    assert parts is not None
    assert [part.scales for part in parts] == ([1, 8, 1] if scaled else [1, 1, 1])
    made = linear(24, *zip((0, 8, 16), parts), columns=64)
    load_weight(checkpoint, QKV, made.rows())
    expected = torch.empty(24, 64, dtype=torch.bfloat16)
    checkpoint.copy_into(QKV, expected)
    assert torch.equal(made.weight_in(torch.bfloat16), expected)


def test_some_rows_are_a_view_that_can_be_made_into_floats():
    made = linear(6, (0, StoredPart("I8", 3, 200, scales=1)), (3, StoredPart(PLAIN, 3, 256)))
    made.values[0].fill_(2)
    made.scales[0].fill_(0.5)
    first, second = made.rows().narrow(0, 0, 3).narrow(1, 0, 200), made.rows().narrow(0, 3, 3)
    assert first.shape == (3, 200)
    assert torch.equal(first.dequantize(), torch.ones(3, 200).bfloat16())
    second.tensors[0].fill_(4)
    assert torch.equal(second.dequantize(), made.weight_in(torch.bfloat16)[3:])


# A whole engine.


def test_a_kept_file_gives_the_pictures_of_the_floats_it_stands_for(model: Path):
    want = bits(load(model, "fast").generate("a cat", seed=7))
    engine = load(model)
    for _ in range(2):
        assert bits(engine.generate("a cat", seed=7)) == want
    assert any(isinstance(part, StoredLinear) for part in engine.models.transformer.modules())
    assert any(isinstance(part, StoredLinear) for part in engine.models.text_encoder.modules())


def test_the_embedding_is_kept_too(folders: Mapping[str, Path]):
    engine = load(folders["gguf"])
    with most_held(engine.models.text_encoder) as counts:  # of what is not streamed
        engine.generate("a cat", seed=7)
    table = engine.models.text_encoder.stored_rows()["model.embed_tokens.weight"]
    in_floats = 2 * TINY_TEXT_ENCODER["vocab_size"] * TINY_TEXT_ENCODER["hidden_size"]
    (held,) = set(counts)
    assert held == sum(tensor.nbytes for tensor in table.tensors) < 0.6 * in_floats


def test_an_embedding_in_float8_is_kept_too(folders: Mapping[str, Path], tmp_path: Path):
    shutil.copytree(folders["float8"], tmp_path / "models")
    path = find_model_files(tmp_path / "models").text_encoder
    tensors = load_file(path)
    name = "model.embed_tokens"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{name}.scale_weight"] = torch.tensor(0.7)
    save_file(tensors, path)
    want = bits(load(tmp_path / "models", "fast").generate("a cat", seed=7))
    engine = load(tmp_path / "models")
    assert bits(engine.generate("a cat", seed=7)) == want
    table = engine.models.text_encoder.stored_rows()[f"{name}.weight"]
    assert [tensor.dtype for tensor in table.tensors][:1] == [torch.float8_e4m3fn]


def test_so_it_does_in_float32(folders: Mapping[str, Path]):
    want = bits(load(folders["gguf"], "fast", dtype="float32").generate("a cat", seed=7))
    assert bits(load(folders["gguf"], dtype="float32").generate("a cat", seed=7)) == want


def test_a_kept_network_that_is_streamed_gives_the_same_picture(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    want = bits(load(model, "fast").generate("a cat", seed=7))
    monkeypatch.setattr(turbo.engine, "choose_memory", lambda *_, **__: ALL_STREAMED)
    assert bits(load(model).generate("a cat", seed=7)) == want


@contextmanager
def most_held(module: nn.Module) -> Iterator[list[int]]:
    """Bytes of a module's weights when it is called."""
    counts: list[int] = []

    def count(*_: Any) -> None:
        there = [weight for weight in module.parameters() if weight.device.type != "meta"]
        counts.append(sum(weight.untyped_storage().nbytes() for weight in there))

    hook = module.register_forward_pre_hook(count)
    yield counts
    hook.remove()


def test_what_is_held_is_what_the_plan_counts_and_less_than_floats(model: Path):
    held = {}
    for memory in ("balanced", "low"):
        engine = load(model, memory)
        with most_held(engine.models.transformer) as counts:
            engine.generate("a cat", seed=7)
        (held[memory],) = set(counts)
    checkpoints = find_model_files(model).open()
    outline = Components.outline(checkpoints, weight_dtypes("bfloat16", "cpu"))
    need = count_outline(outline, PLAN)
    assert need.low is not None
    assert held == {
        "balanced": need.weights[NETWORK],
        "low": need.low.weights[NETWORK],
    }
    assert held["low"] < 0.75 * held["balanced"]


def test_the_plan_counts_the_largest_matrix_made_of_what_is_kept(model: Path):
    outline = Components.outline(find_model_files(model).open(), weight_dtypes("float32", "cpu"))
    need = count_outline(outline, PLAN)
    assert need.low is not None
    network, encoder = outline.network, outline.text_encoder
    largest = {
        PLAN.stages[0].name: 4 * network.layers[0].feed_forward.w13.weight.numel(),  # type: ignore[union-attr, operator]
        "prompt": 4 * max(w.numel() for w in encoder.layers.parameters()),
    }
    for name, count in largest.items():
        more = need.low.activations[name] - need.activations[name]
        assert 0 < more <= count
    assert need.low.activations["decode"] == need.activations["decode"]
    plan = need.plan(LOW, CPU)
    assert need.peak(plan) < replace(need, low=None).peak(plan)


def test_loras_on_what_is_kept_come_and_go_bit_for_bit(model: Path, lora: Path):
    fast, low = load(model, "fast"), load(model)
    want = bits(fast.generate("a cat", seed=7))
    changed = bits(fast.generate("a cat", seed=7, loras=[(lora, 0.5)]))
    assert changed != want
    for loras, expected in (([(lora, 0.5)], changed), ([], want), ([(lora, 0.5)], changed)):
        low.set_loras(loras)
        assert bits(low.generate("a cat", seed=7)) == expected
    # Of all that is kept, the matrices that the LoRA changes alone are in floats meanwhile.
    network = low.models.transformer
    assert not isinstance(network.get_submodule("layers.0.feed_forward.w13"), StoredLinear)
    assert not isinstance(network.get_submodule("layers.1.attention.out"), StoredLinear)
    assert isinstance(network.get_submodule("layers.0.attention.out"), StoredLinear)
    assert "model.embed_tokens.weight" in low.models.text_encoder.native_tensors()
    loaded = load(model, loras=[(lora, 0.5)])
    assert bits(loaded.generate("a cat", seed=7)) == changed


def test_a_network_that_fits_whole_as_it_is_kept_is_streamed_while_a_lora_is_on(
    folders: Mapping[str, Path], lora: Path, monkeypatch: pytest.MonkeyPatch
):
    fast = load(folders["gguf"], "fast")
    outline = Components.outline(
        find_model_files(folders["gguf"]).open(), weight_dtypes("bfloat16", "cpu")
    )
    need = count_outline(outline, PLAN)
    assert need.low is not None
    kept = need.low.weights[NETWORK] + max(need.low.activations.values())
    plan = need.plan(LOW, CPU, free=kept)
    assert plan.modes[NETWORK] == WHOLE
    monkeypatch.setattr(turbo.engine, "choose_memory", lambda *_, **__: plan)
    engine = load(folders["gguf"])
    holding = engine._holding
    assert holding is not None
    for loras, mode in (([], WHOLE), ([(lora, 0.5)], STREAMED), ([], WHOLE)):
        want = bits(fast.generate("a cat", seed=7, loras=loras))
        assert bits(engine.generate("a cat", seed=7, loras=loras)) == want
        assert holding.placement.modes[NETWORK] == mode


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_compiled_blocks_take_what_is_kept_and_what_a_lora_changes(
    folders: Mapping[str, Path], lora: Path, monkeypatch: pytest.MonkeyPatch
):
    # Traced, and run as it was traced.
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **_: graph)
    plan = replace(PLAN, stages=PLAN.stages[:1])
    fast, low = (
        load(folders["gguf"], memory, plan=plan, compile=True, cache_dir=None)
        for memory in ("fast", "low")
    )
    for loras in ([], [(lora, 0.5)], []):
        want = fast.generate("a cat", seed=7, loras=loras)
        assert bits(low.generate("a cat", seed=7, loras=loras)) == bits(want)
    assert low.counters.compilations > 0
    torch.compiler.reset()


def test_a_plan_prints_what_is_kept(
    folders: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", "--model", str(folders["gguf"]), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    sizes = re.findall(r"# weights of network: ([\d.]+) MiB, from .*\n# weights of network kept "
                       r"as in its file, memory low: ([\d.]+) MiB\n", out)  # fmt: skip
    ((whole, kept),) = sizes
    assert float(kept) < 0.5 * float(whole)  # of float32
    assert "# weights of autoencoder kept" not in out


def test_a_fallback_to_low_keeps_the_file_and_goes_back(
    model: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = load(model, "balanced", allow_fallback=True)
    want = bits(engine.generate("a cat", seed=7))
    real, failures = pipeline.run_stages, [1]
    kept: list[bool] = []

    def stages(*args: Any, **options: Any) -> Any:
        network = engine.models.transformer
        kept.append(any(isinstance(part, StoredLinear) for part in network.modules()))
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("no more")
        return real(*args, **options)

    monkeypatch.setattr(turbo.engine, "run_stages", stages)
    assert [bits(engine.generate("a cat", seed=7)) for _ in range(2)] == [want, want]
    assert kept == [False, True, False]


@pytest.mark.parametrize(("quantize", "network"), [("none", False), ("int8", False), (None, True)])
def test_a_network_is_kept_unless_it_was_said_how_to_hold_it(
    quantize: str | None, network: bool, folders: Mapping[str, Path]
):
    models = load(folders["gguf"], quantize=quantize).models
    for module, expected in ((models.transformer, network), (models.text_encoder, True)):
        assert any(isinstance(part, StoredLinear) for part in module.modules()) == expected


def test_a_model_of_floats_keeps_nothing(tmp_path: Path):
    checkpoints = find_model_files(make_model(tmp_path / "plain", TINY)).open()
    outline = Components.outline(checkpoints, weight_dtypes("bfloat16", "cpu"))
    assert outline.keepings == {}
    assert count_outline(outline, PLAN).low is None


# Beside a GPU, where weights rest in host memory.

WHOLE_LOW = MemoryPlan(
    LOW, dict.fromkeys((NETWORK, TEXT_ENCODER, AUTOENCODER), "whole"), is_tiled=True
)


def resting(
    checkpoints: Mapping[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> tuple[Transformer, Placement]:
    """A model's network, and what holds it as `WHOLE_LOW` says, in memory that is not pinned."""
    monkeypatch.setattr(pinned, "_new_buffer", lambda size: torch.empty(size, dtype=torch.uint8))
    outline = Components.outline(checkpoints, weight_dtypes("bfloat16", "cpu"))
    fuser = LoraFuser(outline.by_name(), checkpoints)
    placement = Placement(outline.by_name(), CPU, fuser.fill, outline.keepings)
    placement._pins = True
    placement.use(WHOLE_LOW)
    return outline.network, placement


def test_what_rests_is_exchanged_matrix_by_matrix_for_a_lora(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
):
    checkpoints = find_model_files(folders["gguf"]).open()
    network, placement = resting(checkpoints, monkeypatch)
    before = tensors_of(network)
    fresh = placement.loosen({NETWORK: {"layers.0.feed_forward.w1.weight"}})
    both = {(NETWORK, f"layers.0.feed_forward.w{n}.weight") for n in (1, 3)}
    assert fresh == both
    assert isinstance(native_weights(network)["layers.0.feed_forward.w3.weight"], Tensor)
    assert isinstance(network.get_submodule("layers.0.attention.qkv"), StoredLinear)
    assert {name for name, old in before.items() if name not in tensors_of(network)} == {
        name for _, name in both
    }
    assert placement.loosen({}) == both
    for _, name in both:
        load_weight(checkpoints[NETWORK], name, native_weights(network)[name])
    after = tensors_of(network)
    assert after.keys() == before.keys()
    for name, tensors in before.items():
        for old, new in zip(tensors, after[name], strict=True):
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
            assert ((NETWORK, name) in both) == (old.data_ptr() != new.data_ptr())


def test_an_exchange_that_fails_leaves_the_part_absent_and_is_made_good(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
):
    network, placement = resting(find_model_files(folders["gguf"]).open(), monkeypatch)

    def full(size: int) -> Tensor:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(pinned, "_new_buffer", full)
        with pytest.raises(torch.OutOfMemoryError):
            placement.loosen({NETWORK: {"layers.0.feed_forward.w1.weight"}})
    assert placement.modes == {
        name: None if name == NETWORK else "whole" for name in placement.modes
    }
    placement.loosen({})
    placement.use(WHOLE_LOW)
    assert set(placement.modes.values()) == {"whole"}
    weight = native_weights(network)["layers.0.feed_forward.w1.weight"]
    assert isinstance(weight, StoredRows)
    assert not any(tensor.is_meta for tensor in weight.tensors)


def tensors_of(module: Transformer | TextEncoder) -> dict[str, tuple[Tensor, ...]]:
    """Native name -> what is kept of a weight as its file stores it."""
    return {name: rows.tensors for name, rows in module.stored_rows().items()}
