"""LoRAs in the weights: in order, in place, and out again bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from turbo import fusing
from turbo.checkpoint import Checkpoint, load_weights, open_file
from turbo.errors import CheckpointError, LoraError
from turbo.fusing import LoraChoice, LoraFuser
from turbo.lora import apply_patches, read_lora
from turbo.names import NETWORK, TEXT_ENCODER
from turbo.testing import initialise, qwen3_shapes, zimage_shapes
from turbo.text_encoder import TextEncoder, TextEncoderConfig
from turbo.transformer import Transformer, TransformerConfig

SHAPES = {
    NETWORK: zimage_shapes(
        {
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "ffn_hidden": 48,  # stored as 64, so that weights are views with gaps
        }
    ),
    TEXT_ENCODER: qwen3_shapes(
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
    ),
}
OUT = "layers.0.attention.out.weight"
UP = "model.layers.0.mlp.up_proj.weight"
TEXT = "text_encoders.qwen3_4b.transformer."


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DIFFERENCE = {f"diffusion_model.{OUT.removesuffix('.weight')}.diff": random(1, 32, 32)}
FACTORS = {
    "diffusion_model.layers.0.attention.qkv.lora_A.weight": random(2, 4, 32),
    "diffusion_model.layers.0.attention.qkv.lora_B.weight": random(3, 96, 4),
    "diffusion_model.layers.0.feed_forward.w2.lora_A.weight": random(4, 2, 48),
    "diffusion_model.layers.0.feed_forward.w2.lora_B.weight": random(5, 32, 2),
    "diffusion_model.layers.0.adaLN_modulation.0.diff_b": random(6, 128),
}
IN_TEXT = {f"{TEXT}{UP.removesuffix('.weight')}.diff": random(7, 24, 16)}
REPLACEMENT = {f"diffusion_model.{OUT.removesuffix('.weight')}.set_weight": random(8, 32, 32)}
STRANGE = {"diffusion_model.layers.9.attention.out.diff": random(9, 32, 32)}
INERT = {f"{TEXT}model.layers.1.mlp.up_proj.diff": random(10, 24, 16)}


@dataclass
class Loaded:
    """Two small modules, the files they were read from, and what fuses into them."""

    folder: Path
    modules: dict[str, Any]
    checkpoints: dict[str, Checkpoint]
    fuser: LoraFuser

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype) -> Loaded:
        modules: dict[str, Any] = {
            NETWORK: Transformer(TransformerConfig.from_shapes(SHAPES[NETWORK]), "cpu", dtype),
            TEXT_ENCODER: TextEncoder(
                TextEncoderConfig.from_shapes(SHAPES[TEXT_ENCODER]), "cpu", dtype
            ),
        }
        checkpoints = {}
        for component, module in modules.items():
            path = folder / f"{component}.safetensors"
            values = initialise(SHAPES[component], 0)
            # Values that bfloat16 cannot hold, as float32 files have them.
            save_file({name: value * 1.001 for name, value in values.items()}, path)
            checkpoints[component] = open_file(component, path)
            load_weights(module, checkpoints[component])
        return cls(folder, modules, checkpoints, LoraFuser(modules, checkpoints))

    def weights(self) -> dict[str, Tensor]:
        """Views of all weights; the names of the two modules differ."""
        return {
            name: tensor
            for module in self.modules.values()
            for name, tensor in module.native_tensors().items()
        }

    def copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.weights().items()}

    def lora(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        path = self.folder / f"{name}.safetensors"
        save_file(dict(tensors), path)
        return path

    def choose(self, *items: Any) -> list[LoraChoice]:
        return [LoraChoice.parse(item, None, 1.0) for item in items]

    def fuse(self, *items: Any, strict: bool = True) -> bool:
        return self.fuser.fuse(self.choose(*items), strict=strict)


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Loaded:
    return Loaded.of(tmp_path, request.param)


@pytest.fixture
def full(tmp_path: Path) -> Loaded:
    """In float32, where what was written can be compared with what was meant."""
    return Loaded.of(tmp_path, torch.float32)


# In and out.


def test_what_was_fused_comes_out_bit_for_bit(loaded: Loaded):
    before = loaded.copy()
    everything = loaded.lora("all", DIFFERENCE | FACTORS | IN_TEXT)
    replacement = loaded.lora("replacement", REPLACEMENT)
    assert loaded.fuse((everything, 0.7), (everything, -3), (replacement, 1.0))
    assert changed(before, loaded.copy()) == {
        OUT,
        UP,
        "layers.0.attention.qkv.weight",
        "layers.0.feed_forward.w2.weight",
        "layers.0.adaLN_modulation.0.bias",
    }
    assert loaded.fuse()
    assert changed(before, loaded.copy()) == set()


def test_a_weight_is_the_untouched_one_plus_its_updates_rounded_once(loaded: Loaded):
    before = {name: tensor.float() for name, tensor in loaded.copy().items()}
    half_a_step = torch.finfo(loaded.weights()[OUT].dtype).eps / 2
    a, b = (loaded.lora(name, DIFFERENCE) for name in "ab")
    loaded.fuse((a, 0.5), (b, 0.25))
    [difference] = DIFFERENCE.values()
    want = before[OUT] + 0.5 * difference + 0.25 * difference
    got = loaded.weights()[OUT].float()
    torch.testing.assert_close(got, want, rtol=half_a_step, atol=2e-6)
    loaded.fuse((loaded.lora("factors", FACTORS), 0.5))
    up, down = (FACTORS[f"diffusion_model.layers.0.attention.qkv.lora_{x}.weight"] for x in "BA")
    want = before["layers.0.attention.qkv.weight"] + 0.5 * (up @ down)
    got = loaded.weights()["layers.0.attention.qkv.weight"].float()
    torch.testing.assert_close(got, want, rtol=half_a_step, atol=2e-6)


def test_loras_apply_in_the_order_given(full: Loaded):
    difference, replacement = full.lora("d", DIFFERENCE), full.lora("r", REPLACEMENT)
    [moved], [put] = DIFFERENCE.values(), REPLACEMENT.values()
    full.fuse((difference, 1.0), (replacement, 1.0))
    assert torch.equal(full.weights()[OUT], put)
    full.fuse((replacement, 1.0), (difference, 0.5))
    torch.testing.assert_close(full.weights()[OUT], put + 0.5 * moved)


def test_nothing_of_the_loras_before_is_left(loaded: Loaded):
    first, second = loaded.lora("first", FACTORS | IN_TEXT), loaded.lora("second", DIFFERENCE)
    loaded.fuse((second, 0.3))
    alone = loaded.copy()
    loaded.fuse((first, 0.7), (second, 2.0))
    loaded.fuse((second, 0.3))
    assert changed(alone, loaded.copy()) == set()


def test_the_text_encoder_has_a_strength_of_its_own(full: Loaded):
    before = full.copy()
    both = full.lora("both", DIFFERENCE | IN_TEXT)
    full.fuse((both, 0.0, 0.5))
    assert changed(before, full.copy()) == {UP}
    torch.testing.assert_close(full.weights()[UP], before[UP] + 0.5 * next(iter(IN_TEXT.values())))
    full.fuse((both, 0.5, 0.0))
    assert changed(before, full.copy()) == {OUT}
    full.fuse((both, 0.5))
    assert changed(before, full.copy()) == {OUT, UP}


def test_strength_0_leaves_every_bit(loaded: Loaded):
    before = loaded.copy()
    loaded.fuse((loaded.lora("all", FACTORS | IN_TEXT | REPLACEMENT), 0))
    assert changed(before, loaded.copy()) == set()


def test_weights_stay_where_they_are_in_memory(loaded: Loaded):
    places = {name: tensor.data_ptr() for name, tensor in loaded.weights().items()}
    parameters = [list(module.parameters()) for module in loaded.modules.values()]
    views, before = loaded.weights(), loaded.copy()
    loaded.fuse((loaded.lora("all", DIFFERENCE | FACTORS | IN_TEXT), 0.7))
    assert changed(before, views)  # views taken before see the change
    loaded.fuse()
    assert {name: tensor.data_ptr() for name, tensor in loaded.weights().items()} == places
    for module, kept in zip(loaded.modules.values(), parameters, strict=True):
        assert all(a is b for a, b in zip(module.parameters(), kept, strict=True))


def test_the_zeros_beside_a_padded_weight_stay_zero(full: Loaded):
    full.fuse((full.lora("all", FACTORS), 0.7))
    stored = full.modules[NETWORK].layers[0].feed_forward.w2.weight
    assert stored.shape == (32, 64)
    assert not stored[:, 48:].any()


def test_the_same_choice_again_writes_and_reads_nothing(full: Loaded):
    path = full.lora("d", DIFFERENCE)
    choices = full.choose((path, 0.5))
    assert full.fuser.fuse(choices) is True
    path.unlink()
    assert full.fuser.fuse(choices) is False
    assert full.fuse() is True
    assert full.fuse() is False


def test_a_new_version_of_a_file_is_read(full: Loaded):
    path = full.lora("d", DIFFERENCE)
    full.fuse((path, 1.0))
    os.utime(full.lora("d", REPLACEMENT), ns=(0, 0))
    assert full.fuse((path, 1.0))
    assert torch.equal(full.weights()[OUT], next(iter(REPLACEMENT.values())))


def test_a_file_replaced_after_it_was_chosen_is_refused(full: Loaded):
    path = full.lora("d", DIFFERENCE)
    choices = full.choose((path, 1.0))
    os.utime(full.lora("d", REPLACEMENT), ns=(0, 0))
    with pytest.raises(LoraError, match="has changed or gone since it was chosen"):
        full.fuser.fuse(choices)


def test_files_are_read_again_unless_they_are_kept(full: Loaded):
    path = full.lora("d", DIFFERENCE)
    keeping = LoraFuser(full.modules, full.checkpoints, keep_files=True)
    choices = full.choose((path, 0.5))
    keeping.fuse(choices)
    with_lora = full.copy()
    path.unlink()
    keeping.fuse([])
    assert keeping.fuse(choices)
    assert changed(with_lora, full.copy()) == set()
    keeping.fuse([])
    with pytest.raises(LoraError, match=r"d\.safetensors"):
        full.fuser.fuse(choices)


def test_a_new_version_of_a_kept_file_is_read(full: Loaded):
    keeping = LoraFuser(full.modules, full.checkpoints, keep_files=True)
    keeping.fuse(full.choose((full.lora("d", DIFFERENCE), 1.0)))
    path = full.lora("d", REPLACEMENT)
    os.utime(path, ns=(0, 0))
    assert keeping.fuse(full.choose((path, 1.0)))
    assert torch.equal(full.weights()[OUT], next(iter(REPLACEMENT.values())))


def test_what_is_fused_can_be_told(full: Loaded):
    path = full.lora("style", DIFFERENCE)
    assert full.fuser.describe() == []
    full.fuse((path, 0.5, 0.25))
    [told] = full.fuser.describe()
    assert told == {
        "name": "style.safetensors",
        "strength": 0.5,
        "text_strength": 0.25,
        "sha256": read_lora(path).fingerprint,
    }
    assert json.loads(json.dumps(told)) == told
    told["name"] = "changed by the caller"
    assert full.fuser.describe()[0]["name"] == "style.safetensors"
    full.fuse()
    assert full.fuser.describe() == []


# Refusals and failures.


def test_a_lora_that_fits_in_part_is_refused_or_used_as_far_as_it_goes(full: Loaded):
    before = full.copy()
    partial = full.lora("partial", DIFFERENCE | STRANGE)
    with pytest.raises(LoraError, match=r"partial\.safetensors: 1 of 2 tensors used, .*layers\.9"):
        full.fuse((partial, 1.0))
    assert changed(before, full.copy()) == set()
    assert full.fuse((partial, 1.0), strict=False)
    assert changed(before, full.copy()) == {OUT}


@pytest.mark.parametrize("strict", [True, False])
def test_a_lora_of_which_nothing_fits_is_always_refused(full: Loaded, strict: bool):
    before = full.copy()
    style, foreign = full.lora("style", DIFFERENCE), full.lora("foreign", STRANGE)
    with pytest.raises(LoraError, match=r"foreign\.safetensors: 0 of 1 tensors used, .*layers\.9"):
        full.fuse((style, 1.0), (foreign, 1.0), strict=strict)
    assert changed(before, full.copy()) == set()
    assert full.fuser.describe() == []


def test_tensors_that_are_never_read_count_as_used(full: Loaded):
    before = full.copy()
    full.fuse((full.lora("inert", DIFFERENCE | INERT), 1.0))
    assert changed(before, full.copy()) == {OUT}


@pytest.mark.parametrize("bad", ["strange", "broken", "absent"])
def test_a_refusal_leaves_what_was_fused_before(loaded: Loaded, bad: str):
    good, better = loaded.lora("good", FACTORS), loaded.lora("better", DIFFERENCE)
    loaded.fuse((good, 0.5))
    before, told = loaded.copy(), loaded.fuser.describe()
    path = loaded.lora(bad, STRANGE)
    choices = loaded.choose((better, 1.0), (path, 1.0))
    if bad == "broken":
        path.write_bytes(path.read_bytes()[:100])
    elif bad == "absent":
        path.unlink()
    with pytest.raises(LoraError):
        loaded.fuser.fuse(choices)
    assert changed(before, loaded.copy()) == set()
    assert loaded.fuser.describe() == told
    assert loaded.fuse((good, 0.5)) is False


def fail_at(call: int, error: BaseException) -> Callable[..., Tensor]:
    """`apply_patches`, but for one call."""
    calls = 0

    def apply(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return apply_patches(*arguments)

    return apply


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=["memory", "interrupt"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_failure_in_the_middle_of_writing_restores_every_bit(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException
):
    before = loaded.copy()
    first, second = loaded.lora("first", DIFFERENCE), loaded.lora("second", FACTORS | IN_TEXT)
    loaded.fuse((first, 0.5))
    with_first = loaded.copy()
    with monkeypatch.context() as patched:
        patched.setattr(fusing, "apply_patches", fail_at(call, error))
        with pytest.raises(type(error)):
            loaded.fuse((second, 0.7))
    assert changed(before, loaded.copy()) == set()
    assert loaded.fuser.describe() == []
    assert loaded.fuse((first, 0.5))
    assert changed(with_first, loaded.copy()) == set()


@pytest.mark.parametrize("component", [NETWORK, TEXT_ENCODER])
@pytest.mark.parametrize("gone", [False, True])
def test_a_changed_checkpoint_is_refused_before_anything_is_written(
    loaded: Loaded, gone: bool, component: str
):
    first = loaded.lora("first", DIFFERENCE | IN_TEXT)
    second = loaded.lora("second", FACTORS | IN_TEXT)
    loaded.fuse((first, 0.5))
    before, told = loaded.copy(), loaded.fuser.describe()
    [file] = loaded.checkpoints[component].files
    if gone:
        file.unlink()
    else:
        os.utime(file, ns=(1, 1))
    for choices in ([(second, 1.0)], []):
        with pytest.raises(CheckpointError, match=str(file)):
            loaded.fuse(*choices)
        assert changed(before, loaded.copy()) == set()
        assert loaded.fuser.describe() == told


def test_loras_that_are_there_already_need_no_checkpoint(full: Loaded):
    [file] = full.checkpoints[NETWORK].files
    file.unlink()
    assert full.fuse() is False


# What a choice may look like.


def test_a_choice_is_a_path_or_has_one_or_two_strengths(tmp_path: Path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"12345")
    forms: dict[Any, tuple[float, float]] = {
        path: (0.8, 0.8),
        str(path): (0.8, 0.8),
        (path,): (0.8, 0.8),
        (str(path), 1): (1.0, 1.0),
        (path, -0.5): (-0.5, -0.5),
        (path, 0.5, 0): (0.5, 0.0),
        (path, np.float64(0.25)): (0.25, 0.25),
    }
    for form, strengths in forms.items():
        for spelling in (form, list(form) if isinstance(form, tuple) else form):
            choice = LoraChoice.parse(spelling, None, 0.8)
            assert (choice.path, choice.strength, choice.text_strength) == (path, *strengths)
            assert (choice.strength_on(NETWORK), choice.strength_on(TEXT_ENCODER)) == strengths


def test_a_name_is_looked_up_in_the_lora_folder(tmp_path: Path):
    path = tmp_path / "loras" / "deep" / "style.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    for name in ("style", "style.safetensors", "deep/style", Path("style")):
        assert LoraChoice.parse((name, 0.5), tmp_path / "loras", 1.0).path == path


def test_choices_differ_by_strength_and_by_version_of_the_file(tmp_path: Path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"12345")
    choice = LoraChoice.parse((path, 0.5), None, 1.0)
    assert LoraChoice.parse((str(path), 0.5, 0.5), None, 1.0) == choice
    assert LoraChoice.parse((path, 0.6), None, 1.0) != choice
    path.write_bytes(b"123456")
    assert LoraChoice.parse((path, 0.5), None, 1.0) != choice
    assert replace(choice, strength=0.6) != choice


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((), r"a LoRA must be a path or name, .*, got \(\)"),
        (("{path}", 1, 1, 1), "a LoRA must be a path or name"),
        ((1.0, "{path}"), "a LoRA must be a path or name"),
        ([None], "a LoRA must be a path or name"),
        (5, "a LoRA must be a path or name"),
        (None, "a LoRA must be a path or name"),
        (("{path}", "0.5"), "strength must be a finite number, got '0.5'"),
        (("{path}", None), "strength must be a finite number, got None"),
        (("{path}", True), "strength must be a finite number, got True"),
        (("{path}", float("nan")), "strength must be a finite number, got nan"),
        (("{path}", 1.0, float("inf")), "strength must be a finite number, got inf"),
        (("{path}", 10**400), "strength must be a finite number"),
        ("absent", "absent: no such file"),
        ("{folder}", "no such file"),
    ],
)
def test_other_choices_are_refused_in_one_line(tmp_path: Path, item: Any, message: str):
    path = tmp_path / "style.safetensors"
    path.write_bytes(b"12345")

    def fill(value: Any) -> Any:
        known = {"{path}": path, "{folder}": str(tmp_path)}
        return known.get(value, value) if isinstance(value, str) else value

    given = type(item)(map(fill, item)) if isinstance(item, tuple | list) else fill(item)
    with pytest.raises(LoraError, match=message) as error:
        LoraChoice.parse(given, None, 1.0)
    assert "\n" not in str(error.value)
