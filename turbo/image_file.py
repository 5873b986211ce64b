"""Pictures on disk: PNGs that say what made them, written whole or not at all.

A picture carries two texts: `turbo`, a JSON object with everything needed to make it again, and
`parameters`, the line that AUTOMATIC1111's interface began and that Civitai and others read.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from turbo.errors import BadInputError
from turbo.messages import reason
from turbo.whole_file import cannot_save, write_whole

METADATA_KEY = "turbo"
PARAMETERS_KEY = "parameters"

COMPRESS_LEVEL = 1
"""zlib's level. A 672 x 864 picture with film grain took 49 ms and 967 KiB at level 1, 111 ms and
822 KiB at 4, 202 ms and 826 KiB at 6 (one core): the time would show beside a picture's own."""

_SAMPLER_LABELS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "lcm": "LCM",
    "ddim": "DDIM",
    "uni_pc": "UniPC",
    "res_multistep": "Res Multistep",
    "deis": "DEIS",
}
_SCHEDULER_LABELS = {
    "simple": "Simple",
    "normal": "Normal",
    "beta": "Beta",
    "sgm_uniform": "SGM Uniform",
    "ddim_uniform": "DDIM",
    "karras": "Karras",
    "exponential": "Exponential",
    "linear_quadratic": "Linear Quadratic",
    "kl_optimal": "KL Optimal",
    "flowmatch_node": "FlowMatchEulerDiscreteScheduler",
}
_HASH_DIGITS = 10
_PRINTABLE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")


def save_png(
    image: Image.Image,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = True,
    compress_level: int = COMPRESS_LEVEL,
) -> None:
    """Write a PNG so that its name never holds half a file, not even after a power cut.

    The same picture and metadata give the same bytes.

    Args:
        image: The picture.
        path: The file; its folder must exist. A link is followed.
        metadata: What made the picture, JSON-able; None writes no text at all.
        overwrite: Replace a file of that name.
        compress_level: zlib's level, 0 to 9.

    Raises:
        SaveError: The disk is full, the folder is missing or cannot be written; nothing is left.
        FileExistsError: The file exists and `overwrite` is false.
    """
    try:
        content = _encode(image, metadata, compress_level)
    except (OSError, ValueError) as error:  # of a mode that PNG lacks, or too large for it
        raise cannot_save(path, error) from error
    write_whole(path, content, overwrite=overwrite)


def _encode(image: Image.Image, metadata: Mapping[str, Any] | None, compress_level: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        # Escaped to ASCII, so nothing in a prompt is lost: PNG text cannot hold NUL, JSON can.
        _add_text(info, METADATA_KEY, json.dumps(metadata))
        _add_text(info, PARAMETERS_KEY, infotext(metadata, image.size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=compress_level)
    return buffer.getvalue()


def _add_text(info: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """A tEXt chunk if its Latin-1 can hold the text, else iTXt, which holds UTF-8."""
    text = _storable(text)
    if all(c == "\n" or " " <= c <= "~" or "\xa0" <= c <= "\xff" for c in text):
        info.add_text(key, text)
    else:
        info.add_itxt(key, text)


def _storable(text: str) -> str:
    """`text` without what UTF-8 (half a surrogate pair) or PNG (NUL) cannot hold."""
    return (
        text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
    )


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `save_png` wrote as metadata, or None for a picture without it.

    Raises:
        BadInputError: The file cannot be read, or is no picture.
    """
    with _opened(path) as image:
        texts = image.text if isinstance(image, PngImagePlugin.PngImageFile) else {}
    try:
        metadata = json.loads(texts[METADATA_KEY])
    except (KeyError, ValueError, RecursionError):
        return None
    return metadata if isinstance(metadata, dict) else None


def read_image(path: str | Path) -> Image.Image:
    """A picture file of any common kind as 8-bit RGB, turned upright.

    Raises:
        BadInputError: The file cannot be read, is no picture, or has more than 8 bits a channel.
    """
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in (*_PRINTABLE_MODES, "CMYK", "YCbCr", "PA"):
            raise BadInputError(
                f"{str(path)!r} holds {upright.mode} values; give a picture with 8 bits a channel"
            )
        return upright.convert("RGB")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                yield image
    except BadInputError:
        raise
    except UnidentifiedImageError:
        raise BadInputError(f"{str(path)!r} is not a picture that can be read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadInputError(f"{str(path)!r} is too large a picture") from None
    except Exception as error:  # Pillow's readers raise many kinds on broken files
        raise BadInputError(f"cannot read the picture {str(path)!r}: {reason(error)}") from None


def infotext(metadata: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The A1111 `parameters` text of a picture of `size` (width, height).

    Sampler, steps, cfg and seed are those of the first stage that ran; `Stages` lists all that
    did. LoRA strengths stand in the prompt as `<lora:name:strength>`, as that format has it.
    """
    loras = [lora for lora in metadata.get("loras", ()) if lora.get("name")]
    prompt = _full_prompt(metadata)
    for lora in loras:
        prompt += f" <lora:{_stem(lora['name'])}:{lora.get('strength', 1.0):g}>"
    lines = [prompt]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    stages = _stages(metadata)
    values = _sampling(metadata, stages)
    values["Size"] = f"{size[0]}x{size[1]}"
    values |= _models(metadata, loras)
    if "strength" in metadata:
        values["Denoising strength"] = f"{metadata['strength']:g}"
    if len(stages) > 1:
        values["Stages"] = "; ".join(_stage_text(stage) for stage in stages)
    values["Version"] = f"turbo {metadata.get('version', '')}".strip()
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items()))
    return "\n".join(lines)


def _full_prompt(metadata: Mapping[str, Any]) -> str:
    prompt = str(metadata.get("prompt", ""))
    word = metadata.get("trigger_word")
    return f"{word}, {prompt}" if word else prompt


def _sampling(metadata: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if stages:
        first = stages[0]
        values["Steps"] = first["steps"]
        values["Sampler"] = _SAMPLER_LABELS.get(first["sampler"], first["sampler"])
        values["Schedule type"] = _SCHEDULER_LABELS.get(first["scheduler"], first["scheduler"])
        values["CFG scale"] = f"{first['cfg']:g}"
    if metadata.get("seed") is not None:
        values["Seed"] = metadata["seed"]
    return values


def _stages(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The stages that ran: all, or those from where a given picture entered."""
    generation = metadata.get("plan", {}).get("generation", {})
    keys = (f"stage{number}" for number in range(1, generation.get("stages", 0) + 1))
    stages = {generation[k].get("name", k): generation[k] for k in keys if k in generation}
    first = metadata.get("first_stage")
    if first not in stages:
        return list(stages.values())
    _, *rest = list(stages.values())[list(stages).index(first) :]
    return [{**stages[first], "denoise": metadata["strength"]}, *rest]


def _stage_text(stage: Mapping[str, Any]) -> str:
    return (
        f"{stage['width']}x{stage['height']} {stage['steps']} steps {stage['sampler']} "
        f"{stage['scheduler']} cfg {stage['cfg']:g} denoise {stage['denoise']:g}"
    )


def _models(metadata: Mapping[str, Any], loras: list[Mapping[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    models = metadata.get("models", {})
    if models.get("network"):
        values["Model"] = _stem(models["network"])
    hashes = {_stem(lora["name"]): lora["sha256"] for lora in loras if lora.get("sha256")}
    if hashes:
        values["Lora hashes"] = ", ".join(f"{n}: {h[:_HASH_DIGITS]}" for n, h in hashes.items())
    return values


def _stem(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")


def _quoted(value: str) -> str:
    """A value as A1111 writes it: in JSON's quotes if it holds what separates values."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value
