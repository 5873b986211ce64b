"""``turbo convert``: the same weights in another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbo import cli
from turbo.builtin import builtin_model
from turbo.cli import main
from turbo.converted_files import LAYOUTS, write_converted
from turbo.engine import Engine
from turbo.errors import BadInputError, CheckpointError, SaveError
from turbo.model_files import find_model_files
from turbo.names import AUTOENCODER
from turbo.plan import Plan, Stage
from turbo.quantized_files import write_quantized
from turbo.testing import make_tiny_model

SMALL = Plan(stages=(Stage(name="only", height=64, width=48, steps=1),))


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "made", request.param)


def tensors_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    checkpoints = find_model_files(folder).open()
    loaded: dict[str, dict[str, Tensor]] = {}
    for component, checkpoint in checkpoints.items():
        loaded[component] = {}
        for name, shape in checkpoint.shapes.items():
            tensor = torch.empty(shape, dtype=checkpoint.float_dtype(name))
            checkpoint.copy_into(name, tensor)
            loaded[component][name] = tensor
    return loaded


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_survives_in_either_layout(model: Path, layout: str, tmp_path: Path) -> None:
    out = write_converted(find_model_files(model), tmp_path / "out", layout)
    found = find_model_files(out)
    assert found.layout == layout
    assert found.tokenizer is not None
    before, after = tensors_of(model), tensors_of(out)
    assert before.keys() == after.keys()
    for component, tensors in before.items():
        assert tensors.keys() == after[component].keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == after[component][name].dtype
            assert torch.equal(tensor, after[component][name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_that_are_made_in_the_layout(layout: str, tmp_path: Path) -> None:
    """Names, shapes and configs, of which other programs judge what they read."""
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    made = make_tiny_model(tmp_path / "made", layout)
    source = make_tiny_model(tmp_path / "source", other)
    out = write_converted(find_model_files(source), tmp_path / "out", layout)
    root = made / "models" if layout == "comfyui" else made
    for path in sorted(root.rglob("*")):
        same = out / path.relative_to(root)
        if path.suffix == ".safetensors":
            wanted, given = load_file(path), load_file(same)
            assert wanted.keys() == given.keys()
            assert all(torch.equal(wanted[name], given[name]) for name in wanted)
        elif path.suffix == ".json":
            assert json.loads(path.read_bytes()) == json.loads(same.read_bytes())


def test_an_unusual_number_of_groups_is_kept(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", "diffusers")
    config = source / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_num_groups": 4}))
    out = write_converted(find_model_files(source), tmp_path / "out", "comfyui")
    back = write_converted(find_model_files(out), tmp_path / "back", "diffusers")
    assert json.loads((back / "vae" / "config.json").read_text())["norm_num_groups"] == 4
    pictures = []
    for folder in (source, out, back):
        engine = Engine.from_pretrained(folder, device="cpu", plan=SMALL)
        pictures.append(engine.generate("a cat", seed=1).image.tobytes())
    assert pictures[0] == pictures[1] == pictures[2]


@pytest.mark.parametrize("groups", ["0", "four", "9" * 30])
def test_a_damaged_number_of_groups_is_refused(groups: str, tmp_path: Path) -> None:
    files = find_model_files(make_tiny_model(tmp_path / "m"))
    save_file(load_file(files.vae), tmp_path / "v.safetensors", {"norm_num_groups": groups})
    with pytest.raises(CheckpointError, match=r"norm_num_groups is .* must be a positive integer"):
        find_model_files(tmp_path / "m", vae=tmp_path / "v.safetensors").open()[AUTOENCODER]


def test_a_model_in_8_bits_is_refused(tmp_path: Path) -> None:
    made = make_tiny_model(tmp_path / "m")
    small = write_quantized(find_model_files(made), tmp_path / "small", "int8")
    with pytest.raises(BadInputError, match=r"in 8 bits \(int8\); convert the original"):
        write_converted(find_model_files(small), tmp_path / "out", "diffusers")


def test_an_unknown_layout_and_an_existing_folder_are_refused(tmp_path: Path) -> None:
    files = find_model_files(make_tiny_model(tmp_path / "m"))
    with pytest.raises(BadInputError, match="layout must be one of comfyui, diffusers, got 'hf'"):
        write_converted(files, tmp_path / "out", "hf")
    with pytest.raises(BadInputError, match="exists; give the name of a new folder"):
        write_converted(files, tmp_path / "m", "diffusers")


def test_nothing_is_left_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    files = find_model_files(make_tiny_model(tmp_path / "m"))
    monkeypatch.setattr("turbo.converted_files.write_streamed", full)
    with pytest.raises(SaveError, match="No space left on device; nothing was written"):
        write_converted(files, tmp_path / "out", "comfyui")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_the_command_converts_and_says_how_to_use_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = make_tiny_model(tmp_path / "m"), tmp_path / "out"
    (made / "models" / "loras" / "style.safetensors").touch()
    assert main(["convert", str(made), "-o", str(out), "--layout", "diffusers"]) == 0
    said = capsys.readouterr().out
    assert f"LoRAs are not copied: give those of {made / 'models' / 'loras'} by path" in said
    assert f"turbo generate --model {out} uses it" in said
    assert find_model_files(out).layout == "diffusers"
    assert cli.LAYOUTS == LAYOUTS


def test_the_built_in_model_is_converted_where_none_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", "-o", str(out), "--layout", "comfyui"]) == 0
    said = capsys.readouterr().out
    assert "ComfyUI itself cannot read this autoencoder: it has 4 groups" in said
    pictures = []
    for folder in (builtin_model(), out):
        engine = Engine.from_pretrained(folder, device="cpu", plan=SMALL)
        pictures.append(engine.generate("a red circle", seed=1).image.tobytes())
    assert pictures[0] == pictures[1]
