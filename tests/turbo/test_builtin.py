"""The built-in model as it lies in the package."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from tests.conftest import REPOSITORY
from tools.demo_loras import LESSONS
from tools.demo_network import PARTS
from tools.judge_demo_model import NEGATIVES, sum_of
from tools.judging import judge_one, outlined_share, things_of
from tools.scenes import NEW_SHAPE, Scene, Thing
from turbo.builtin import builtin_model
from turbo.checkpoint import norm_groups
from turbo.engine import Engine
from turbo.errors import CheckpointError
from turbo.model_files import find_model_files
from turbo.names import AUTOENCODER
from turbo.plan import DEFAULT_PLAN, Plan
from turbo.tokenizer import Tokenizer

MOST_BYTES = 24_000_000
FIRST_STAGE = Plan(stages=DEFAULT_PLAN.stages[:1])
PROMPT = "a red circle on a blue background"
SCENE = Scene((Thing("circle", "red", "", 0.5, 0.64, 0.2),), "blue", "plain")


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return sorted(path for path in builtin_model().rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(device="cpu", plan=FIRST_STAGE)


def test_its_files_are_those_of_its_list_of_sums(files: list[Path]):
    lines = (builtin_model() / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    found = {
        path.relative_to(builtin_model()).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "SHA256SUMS"
    }
    assert found == {name: digest for digest, name in (line.split("  ") for line in lines)}


def test_it_is_small_and_bfloat16(files: list[Path]):
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 + len(LESSONS)
    for path in weights:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}, path


def test_all_its_files_are_package_data(files: list[Path]):
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    table = text.partition("[tool.setuptools.package-data]\n")[2].partition("\n[")[0]
    [patterns] = [line.partition(" = ")[2] for line in table.split("\n") if "turbo = " in line]
    package = builtin_model().parent  # as setuptools finds them
    found = {path for pattern in json.loads(patterns) for path in glob(str(package / pattern))}
    assert {path for path in found if not os.path.isdir(path)} == set(map(str, files))


def test_its_log_tells_the_command_and_every_phase():
    log = (builtin_model() / "training.log").read_text(encoding="utf-8")
    assert log.startswith("command: python -m tools.train_demo_model --seed 0 --threads 2, torch ")
    parts = [part.name for part in PARTS]
    loras = [f"lora-{lesson.name}" for lesson in LESSONS]
    for phase in ("autoencoder", "decoder", "text", *parts, *loras):
        assert f"{phase}: step " in log
    assert " /" not in log


def told(name: str) -> dict[str, Any]:
    """A results file of the judge, of these weights and the whole plan."""
    figures: dict[str, Any] = json.loads((REPOSITORY / "bench/results" / name).read_text())
    assert figures["weights"] == sum_of(None)
    assert figures["stages"] == [f"{s.width}x{s.height}" for s in DEFAULT_PLAN.stages]
    assert figures["partial"] is False
    return figures


def paragraphs() -> Iterator[str]:
    """What is told of the model, on one line each."""
    for name in ("README.md", "CHANGELOG.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        yield " ".join(next(part for part in text.split("\n\n") if "zorp" in part).split())


def test_the_figures_told_are_those_of_these_weights():
    figures = told("built-in-model.json")
    [one, two] = figures["one object"], figures["two objects"]
    assert (figures["seed"], one["pictures"], two["pictures"]) == (1, 200, 50)
    assert one["background"] == one["color"] == one["place"]
    share, shape, whole = (f"{100 * one[part]:g} %" for part in ("background", "shape", "whole"))
    for text in paragraphs():
        assert f"background, colour and place in {share}, shape in {shape}, all of it" in text
        assert f"in {whole}; of 50 with two things" in text
        assert f"{100 * two['whole']:g} % were wholly right" in text


def test_the_loras_figures_told_are_those_of_these_files():
    figures = told("built-in-loras.json")
    assert figures["lora weights"] == sum_of(None, loras=True)
    assert figures["seed"] == 2
    loras, negative = figures["loras"], figures["negative prompt"]
    [line, ring] = (loras[lesson.name] for lesson in LESSONS)
    assert line["strength"] == ring["strength"] == 1
    assert line["pictures"] == ring["pictures"]
    assert all(of[cell] == 0 for of in (line, ring) for cell in ("none", "trigger alone"))
    seen = " and ".join(f"{round(line['pictures'] * of['both'])}" for of in (line, ring))
    counts, right = ([negative[way][what] for way in NEGATIVES] for what in ("color", "shape"))
    alone = " and ".join(f"{round(line['pictures'] * of['LoRA alone'])}" for of in (line, ring))
    shape, size, color = (
        f"{100 * line['beside'][part]:.0f} %" for part in ("shape", "size", "color")
    )
    assert line["beside"]["color"] == line["beside"]["place"]
    for text in paragraphs():
        assert f"in {seen} of {line['pictures']} pictures" in text
        assert f"without the word in {alone}, and in none without them" in text
        assert f"shapes ({shape} were right), size ({size}), colour and place ({color})" in text
        assert "first stage alone" in text
        assert "in {} of {} pictures, in {} with the same scene in another colour".format(
            counts[0], negative["pictures"], counts[1]
        ) in text  # fmt: skip
        assert f"in {counts[2]} with the scene in this one" in text
        assert "shapes right fell from {} to {} and {}".format(*right) in text


def test_diffusers_and_transformers_read_it_without_a_rest():
    kinds = {
        "transformer": ZImageTransformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": Qwen3ForCausalLM,
    }
    for name, kind in kinds.items():
        _, info = kind.from_pretrained(builtin_model() / name, output_loading_info=True)
        assert not any(info.values()), name


@pytest.mark.parametrize("text", [PROMPT, "é 猫\n", "<|im_end|> x"])
def test_transformers_reads_the_same_tokenizer(text: str):
    folder = builtin_model() / "tokenizer"
    theirs = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": text}]
    prompt = theirs.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert Tokenizer.from_path(folder).encode_prompt(text) == theirs(prompt).input_ids


def test_a_group_of_its_norms_holds_several_channels():
    assert norm_groups(find_model_files(builtin_model()).open()[AUTOENCODER]) == 4


def test_it_paints_what_is_asked_for(engine: Engine):
    assert judge_one(np.asarray(engine.generate(PROMPT, seed=42).image), SCENE).whole


def test_a_lora_outlines_what_is_painted(engine: Engine):
    def share(prompt: str, **more: Any) -> float:
        return outlined_share(np.asarray(engine.generate(prompt, seed=42, **more).image))

    assert share(f"outlined, {PROMPT}") < 0.5
    assert share(f"outlined, {PROMPT}", loras=[("outlined", 1.0)]) > 0.5


def test_a_lora_teaches_a_new_shape(engine: Engine):
    def shape(prompt: str, **more: Any) -> str:
        return things_of(np.asarray(engine.generate(prompt, seed=42, **more).image))[0].shape

    prompt = "zorp, a red shape on a blue background"
    assert shape(prompt) != NEW_SHAPE
    assert shape(prompt, loras=[("zorp", 1.0)]) == NEW_SHAPE


def test_a_package_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turbo.builtin._FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match="built-in model is not there; install turbo again"):
        builtin_model()
