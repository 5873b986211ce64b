"""Pictures on disk: whole or not at all, and saying what made them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from turbo.errors import BadInputError, SaveError
from turbo.image_file import infotext, read_image, read_metadata, save_png
from turbo.plan import DEFAULT_PLAN, plan_to_dict

METADATA: dict[str, Any] = {
    "prompt": "a lighthouse on a cliff at dawn",
    "negative_prompt": "blurry",
    "trigger_word": "sunway",
    "seed": 42,
    "plan": plan_to_dict(DEFAULT_PLAN),
    "loras": [{"name": "hollyjai.safetensors", "strength": 0.8, "sha256": "0123456789abcdef"}],
    "models": {"network": "z_image_turbo_bf16.safetensors", "autoencoder": "ae.safetensors"},
    "version": "1.2",
}


def picture(width: int = 48, height: int = 32) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunks(path: Path) -> list[str]:
    data, kinds, position = path.read_bytes(), [], 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kinds.append(data[position + 4 : position + 8].decode())
        position += 12 + length
    return kinds


def test_a_picture_comes_back_with_its_metadata(tmp_path: Path):
    save_png(picture(), tmp_path / "a.png", metadata=METADATA)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(picture()))
    assert read_metadata(tmp_path / "a.png") == METADATA
    assert os.listdir(tmp_path) == ["a.png"]


def test_without_metadata_a_file_holds_the_picture_alone(tmp_path: Path):
    save_png(picture(), tmp_path / "a.png")
    assert set(chunks(tmp_path / "a.png")) == {"IHDR", "IDAT", "IEND"}
    assert read_metadata(tmp_path / "a.png") is None


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path):
    for name in ("a.png", "b.png"):
        save_png(picture(), tmp_path / name, metadata=METADATA)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_infotext_is_what_civitai_reads():
    assert infotext(METADATA, (672, 864)).splitlines() == [
        "sunway, a lighthouse on a cliff at dawn <lora:hollyjai:0.8>",
        "Negative prompt: blurry",
        "Steps: 9, Sampler: Euler a, Schedule type: FlowMatchEulerDiscreteScheduler, CFG scale: 2, "
        "Seed: 42, Size: 672x864, Model: z_image_turbo_bf16, "
        'Lora hashes: "hollyjai: 0123456789", '
        "Stages: 176x224 9 steps euler_ancestral flowmatch_node cfg 2 denoise 1; "
        "336x432 16 steps euler_ancestral FlowMatchEulerDiscreteScheduler cfg 1 denoise 0.7; "
        "672x864 16 steps dpmpp_sde beta cfg 1 denoise 0.6, Version: turbo 1.2",
    ]


def test_the_infotext_of_a_picture_from_a_picture_begins_where_it_entered():
    entered = {**METADATA, "first_stage": "stage2", "strength": 0.5}
    text = infotext(entered, (672, 864))
    assert "Steps: 16, Sampler: Euler a, Schedule type: FlowMatch" in text
    assert "CFG scale: 1, " in text
    assert "Denoising strength: 0.5, Stages: 336x432 16 steps euler_ancestral " in text
    assert "cfg 1 denoise 0.5; 672x864" in text


def test_the_infotext_leaves_out_what_is_not_known():
    assert infotext({}, (16, 32)) == "\nSize: 16x32, Version: turbo"
    text = infotext({"prompt": "x", "loras": [{"name": "a/b.safetensors"}]}, (16, 32))
    assert text == "x <lora:b:1>\nSize: 16x32, Version: turbo"


def test_texts_outside_latin_1_are_stored_as_unicode(tmp_path: Path):
    for prompt, kind in (("café", "tEXt"), ("灯塔 🗼", "iTXt"), ("a\x07b", "iTXt")):
        save_png(picture(), tmp_path / "a.png", metadata={"prompt": prompt})
        assert chunks(tmp_path / "a.png")[1:3] == ["tEXt", kind]
        with Image.open(tmp_path / "a.png") as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            assert image.text["parameters"].startswith(prompt + "\n")


@pytest.mark.parametrize("prompt", ["nul \0 nul", "half \ud83d pair", "end\0", "\r\n", "\x7f\x9f"])
def test_no_prompt_breaks_a_file(tmp_path: Path, prompt: str):
    save_png(picture(), tmp_path / "a.png", metadata={"prompt": prompt})
    assert read_metadata(tmp_path / "a.png") == {"prompt": prompt}
    with Image.open(tmp_path / "a.png") as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert "\0" not in image.text["parameters"]
        assert "Version: turbo" in image.text["parameters"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(codec=None)), st.text())
def test_any_prompt_comes_back(tmp_path_factory: Any, prompt: str, negative: str):
    path = tmp_path_factory.mktemp("any") / "a.png"
    metadata = {"prompt": prompt, "negative_prompt": negative}
    save_png(picture(2, 2), path, metadata=metadata)
    assert read_metadata(path) == metadata


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        save_png(picture(), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_picture_that_png_cannot_hold_is_a_save_error(tmp_path: Path):
    with pytest.raises(SaveError, match="cannot write mode F as PNG"):
        save_png(Image.new("F", (4, 4)), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


# Reading.


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_picture_is_bad_input(tmp_path: Path, content: bytes):
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_image, read_metadata):
        with pytest.raises(BadInputError, match="picture"):
            read(tmp_path / "a.png")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_picture_is_read_or_bad_input(tmp_path_factory: Any, data: Any):
    path = tmp_path_factory.mktemp("damaged") / "a.png"
    save_png(picture(8, 8), path, metadata={"prompt": "x"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for read in (read_image, read_metadata):
        try:
            read(path)
        except BadInputError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_missing_and_unreadable_files_are_bad_input(tmp_path: Path):
    for name in ("missing.png", ".", "a\0b"):
        with pytest.raises(BadInputError, match="cannot read the picture"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "3"])
def test_a_foreign_turbo_text_is_no_metadata(tmp_path: Path, text: str):
    info = PngImagePlugin.PngInfo()
    info.add_text("turbo", text)
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert read_metadata(tmp_path / "a.png") is None


def test_other_kinds_of_picture_are_read_as_rgb(tmp_path: Path):
    for mode, name in (("L", "l.png"), ("RGBA", "a.webp"), ("P", "p.gif"), ("CMYK", "c.jpg")):
        picture().convert(mode).save(tmp_path / name)
        assert read_image(tmp_path / name).mode == "RGB"
        assert read_metadata(tmp_path / name) is None


def test_a_turned_photograph_is_set_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(48, 32).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (32, 48)


def test_pictures_of_more_than_eight_bits_are_refused(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(BadInputError, match="8 bits a channel"):
        read_image(tmp_path / "a.png")


def test_a_picture_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_png(picture(), tmp_path / "a.png")
    for limit in (1000, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BadInputError, match="too large a picture"):
            read_image(tmp_path / "a.png")
