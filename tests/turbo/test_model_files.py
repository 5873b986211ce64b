"""Finding a model's files, its tokenizer and its LoRAs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo.errors import CheckpointError, LoraError, TokenizerNotFoundError
from turbo.model_files import (
    PREFERRED_FILES,
    ModelFiles,
    find_model_files,
    resolve_lora,
    shown_name,
)
from turbo.names import AUTOENCODER, COMPONENTS, NETWORK, TEXT_ENCODER
from turbo.testing import initialise, make_tiny_model, qwen3_shapes

PREFIXES = {
    NETWORK: "model.diffusion_model.",
    TEXT_ENCODER: "text_encoders.qwen3_4b.transformer.",
    AUTOENCODER: "vae.",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def root(tiny: Path, tmp_path: Path) -> Path:
    """A ComfyUI folder of its own to change."""
    return Path(shutil.copytree(tiny, tmp_path / "ComfyUI"))


@pytest.fixture
def models(root: Path) -> Path:
    return root / "models"


@pytest.fixture
def diffusers(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "diffusers", "diffusers")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, so that the user's own is never seen."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def single_files(models: Path) -> dict[str, Path]:
    return {
        NETWORK: models / "diffusion_models" / PREFERRED_FILES[NETWORK],
        TEXT_ENCODER: models / "text_encoders" / PREFERRED_FILES[TEXT_ENCODER],
        AUTOENCODER: models / "vae" / PREFERRED_FILES[AUTOENCODER],
    }


def found(files: ModelFiles) -> dict[str, Path]:
    return {NETWORK: files.network, TEXT_ENCODER: files.text_encoder, AUTOENCODER: files.vae}


def merge(models: Path, path: Path) -> Path:
    """Write an all-in-one checkpoint."""
    tensors = {
        PREFIXES[component] + name: tensor
        for component, file in single_files(models).items()
        for name, tensor in load_file(file).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {"text_encoders.qwen3_4b.logit_scale": torch.ones(1)}, path)
    return path


def move(path: Path, *parts: str) -> Path:
    target = path.parent.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(path, target))


def write_tokenizer(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    return folder


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["", "models"])
def test_a_comfyui_folder_is_found_from_its_root_and_from_models(start: str, root: Path):
    files = find_model_files(root / start)
    assert files.layout == "comfyui"
    assert found(files) == single_files(root / "models")
    assert files.loras_dir == root / "models" / "loras"


def test_the_old_folder_names_of_comfyui_are_known(models: Path):
    (models / "diffusion_models").rename(models / "unet")
    (models / "text_encoders").rename(models / "clip")
    files = find_model_files(models)
    assert (files.network.parent.name, files.text_encoder.parent.name) == ("unet", "clip")


def test_sub_folders_are_looked_into(models: Path):
    path = move(single_files(models)[NETWORK], "z-image", "turbo.safetensors")
    assert find_model_files(models).network == path


def test_a_diffusers_folder_gives_component_folders(diffusers: Path):
    files = find_model_files(diffusers)
    assert files.layout == "diffusers"
    assert found(files) == {
        NETWORK: diffusers / "transformer",
        TEXT_ENCODER: diffusers / "text_encoder",
        AUTOENCODER: diffusers / "vae",
    }
    assert files.tokenizer == diffusers / "tokenizer"


def test_a_component_is_called_as_its_file_or_its_folder_in_the_model(
    diffusers: Path, models: Path
):
    assert shown_name(find_model_files(models).network) == PREFERRED_FILES[NETWORK]
    assert shown_name(find_model_files(diffusers).network) == "diffusers/transformer"


def test_a_diffusers_folder_that_lacks_a_component_says_so(diffusers: Path, models: Path):
    shutil.rmtree(diffusers / "vae")
    with pytest.raises(CheckpointError, match=r"has no folder vae; add it or give vae \(--vae\)"):
        find_model_files(diffusers)
    vae = single_files(models)[AUTOENCODER]
    assert find_model_files(diffusers, vae=vae).vae == vae


def test_three_named_files_are_enough(models: Path):
    network, text_encoder, vae = single_files(models).values()
    files = find_model_files(diffusion_model=network, text_encoder=text_encoder, vae=vae)
    assert files.layout == "files"
    assert files.tokenizer == models / "tokenizer"
    assert files.loras_dir == models / "loras"


def test_two_named_files_are_not_enough(models: Path):
    network, _, vae = single_files(models).values()
    with pytest.raises(
        CheckpointError, match=r"text_encoder \(--text-encoder\) must be given as well"
    ):
        find_model_files(diffusion_model=network, vae=vae)


def test_a_folder_with_three_loose_files_will_do(models: Path, tmp_path: Path):
    loose = tmp_path / "loose"
    loose.mkdir()
    expected = {part: loose / f"{part}.sft" for part in COMPONENTS}
    for component, file in single_files(models).items():
        shutil.copy(file, expected[component])
    assert found(find_model_files(loose)) == expected


def test_an_all_in_one_file_serves_for_all_components(models: Path, tmp_path: Path):
    path = merge(models, tmp_path / "all.safetensors")
    files = find_model_files(path)
    assert files.layout == "all-in-one"
    assert set(found(files).values()) == {path}
    separate = find_model_files(models).open()
    for component, checkpoint in files.open().items():
        assert checkpoint.shapes == separate[component].shapes


def test_an_all_in_one_file_is_found_under_checkpoints_if_nothing_else_is_there(models: Path):
    path = merge(models, models / "checkpoints" / "z.safetensors")
    assert found(find_model_files(models)) == single_files(models)
    single_files(models)[NETWORK].unlink()
    assert set(found(find_model_files(models)).values()) == {path}
    assert find_model_files(models).layout == "all-in-one"


def test_a_named_file_wins_over_the_all_in_one_file(models: Path, tmp_path: Path):
    path = merge(models, tmp_path / "all.safetensors")
    vae = single_files(models)[AUTOENCODER]
    files = find_model_files(path, vae=vae)
    assert found(files) == {NETWORK: path, TEXT_ENCODER: path, AUTOENCODER: vae}


def test_a_network_file_inside_a_comfyui_folder_finds_its_companions(models: Path):
    files = find_model_files(single_files(models)[NETWORK])
    assert found(files) == single_files(models)


def test_a_lone_network_file_says_what_else_to_give(models: Path, tmp_path: Path):
    path = Path(shutil.copy(single_files(models)[NETWORK], tmp_path / "lone.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"no Qwen3 text encoder in .*; give text_encoder \(--text-encoder\)"
    ):
        find_model_files(path)


@pytest.mark.parametrize("name", ["gone", "gone.safetensors", "x" * 5000, "nul\0"])
def test_a_path_that_does_not_exist_is_named(name: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no such file or folder|no Z-Image network"):
        find_model_files(tmp_path / name)


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no Z-Image network in .*empty; give diffusion_mod"):
        find_model_files(tmp_path / "empty")


# --- several candidates --------------------------------------------------------------------------


def test_the_workflows_file_name_wins_among_several(models: Path):
    network = single_files(models)[NETWORK]
    shutil.copy(network, network.with_name("a_finetune.safetensors"))
    assert find_model_files(models).network == network


def test_several_candidates_are_listed_with_the_argument_that_chooses(models: Path):
    network = single_files(models)[NETWORK]
    other = Path(shutil.copy(network, network.with_name("b.safetensors")))
    network = move(network, "a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors, .*b\.saf.*with diffusion_model \(--d"
    ):
        find_model_files(models)
    assert find_model_files(models, diffusion_model="b").network == other
    assert find_model_files(models, diffusion_model="a.safetensors").network == network


def test_a_file_of_another_model_is_passed_over(models: Path):
    folder = models / "diffusion_models"
    save_file({"double_blocks.0.img_in.weight": torch.ones(2)}, folder / "flux.safetensors")
    (folder / "put_models_here").write_text("")
    (folder / "old.ckpt").write_bytes(b"\x80\x02}")
    assert find_model_files(models).network == single_files(models)[NETWORK]


def test_a_text_encoder_of_another_width_is_passed_over(models: Path):
    other = write_text_encoder(models / "text_encoders" / "qwen_3_06b.safetensors", width=32)
    expected = move(single_files(models)[TEXT_ENCODER], "mine.safetensors")
    assert find_model_files(models).text_encoder == expected
    expected.unlink()
    with pytest.raises(CheckpointError, match=rf"{other.name} is 32 wide, the network wants 64"):
        find_model_files(models)


def write_text_encoder(path: Path, width: int) -> Path:
    sizes = {"vocab_size": 300, "hidden_size": width, "intermediate_size": 32, "head_dim": 16}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_file(initialise(qwen3_shapes(sizes | counts), seed=0), path)
    return path


def test_a_text_encoder_that_does_not_fit_is_refused_when_named(models: Path, tmp_path: Path):
    other = write_text_encoder(tmp_path / "other.safetensors", width=32)
    files = find_model_files(models, text_encoder=other)
    with pytest.raises(CheckpointError, match="is 32 wide, but the network"):
        files.open()


def test_a_damaged_file_of_the_usual_name_is_not_replaced_by_another(models: Path):
    network = single_files(models)[NETWORK]
    shutil.copy(network, network.with_name("finetune.safetensors"))
    network.write_bytes(network.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{network.name}: is truncated"):
        find_model_files(models)


def test_a_pickle_given_as_the_model_is_called_one(tmp_path: Path):
    (tmp_path / "model.txt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match=r"model\.txt: is a pickle"):
        find_model_files(tmp_path / "model.txt")


def test_a_path_may_begin_with_the_users_home(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert find_model_files("~/ComfyUI").layout == "comfyui"


def test_files_that_cannot_be_read_are_listed_when_nothing_else_is_there(models: Path):
    single_files(models)[TEXT_ENCODER].unlink()
    (models / "text_encoders" / "qwen_3_4b.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match=r"qwen_3_4b\.gguf is a truncated or damaged GGUF"):
        find_model_files(models)


def test_a_mistyped_name_is_answered_with_close_ones(models: Path):
    with pytest.raises(CheckpointError, match=r"did you mean ae\.safetensors\?"):
        find_model_files(models, vae="ea.safetensors")


def test_a_name_given_as_a_path_wins_over_the_model_folder(
    models: Path, tmp_path: Path, monkeypatch
):
    own = Path(shutil.copy(single_files(models)[AUTOENCODER], tmp_path / "ae.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert find_model_files(models, vae=own.name).vae == Path(own.name)


def test_folders_that_link_in_a_circle_end(models: Path):
    (models / "vae" / "again").symlink_to(models / "vae")
    assert find_model_files(models).vae == single_files(models)[AUTOENCODER]


# --- tokenizer -----------------------------------------------------------------------------------


@pytest.fixture
def bare(models: Path) -> Path:
    """A ComfyUI models folder as it really is: without a tokenizer."""
    shutil.rmtree(models / "tokenizer")
    return models


def test_the_places_of_a_tokenizer_are_searched_in_order(bare: Path, hub: Path, tmp_path: Path):
    places = [
        hub / "models--Qwen--Qwen3-8B" / "snapshots" / "abc",
        hub / "models--Qwen--Qwen3-4B" / "snapshots" / "abc",
        hub / "models--Tongyi-MAI--Z-Image-Turbo" / "snapshots" / "abc" / "tokenizer",
        bare.parent / "comfy" / "text_encoders" / "qwen25_tokenizer",
        bare / "text_encoders",
        bare / "tokenizer",
    ]
    for place in places:  # the last first, so that each new one wins over those before
        write_tokenizer(place)
        assert find_model_files(bare).tokenizer == place
    given = write_tokenizer(tmp_path / "given")
    assert find_model_files(bare, tokenizer=given).tokenizer == given


def test_half_a_tokenizer_is_none(bare: Path):
    write_tokenizer(bare / "tokenizer", "vocab.json")
    assert find_model_files(bare).tokenizer is None


def test_the_single_file_of_a_tokenizer_will_do(bare: Path):
    write_tokenizer(bare / "tokenizer", "tokenizer.json")
    assert find_model_files(bare).tokenizer == bare / "tokenizer"


def test_the_snapshot_that_main_names_is_taken(bare: Path, hub: Path):
    repository = hub / "models--Qwen--Qwen3-4B"
    for commit in ("aaa", "bbb", "ccc"):
        write_tokenizer(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    assert find_model_files(bare).tokenizer == repository / "snapshots" / "bbb"


@pytest.mark.parametrize(
    ("variable", "below"), [("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_the_cache_is_where_its_variables_say(variable, below, bare, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    snapshot = tmp_path / "cache" / below / "models--Qwen--Qwen3-4B" / "snapshots" / "a"
    write_tokenizer(snapshot)
    assert find_model_files(bare).tokenizer == snapshot


def test_without_a_tokenizer_the_error_says_what_to_fetch(bare: Path):
    files = find_model_files(bare)
    with pytest.raises(
        TokenizerNotFoundError, match=r"vocab\.json and merges\.txt .*Qwen/Qwen3-4B"
    ):
        files.require_tokenizer()


@pytest.mark.parametrize("name", ["", "vocab.json", "merges.txt"])
def test_a_given_tokenizer_may_be_a_folder_or_a_file_of_it(name: str, models: Path):
    folder = models / "tokenizer"
    assert find_model_files(models, tokenizer=folder / name).tokenizer == folder


def test_a_given_tokenizer_that_is_none_is_an_error(models: Path, tmp_path: Path):
    with pytest.raises(TokenizerNotFoundError, match="no tokenizer there"):
        find_model_files(models, tokenizer=tmp_path)


# --- LoRAs ---------------------------------------------------------------------------------------


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    for name in ("sunway.safetensors", "style/ink.safetensors", "style/sub/oil.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sunway", "sunway.safetensors"),
        ("sunway.safetensors", "sunway.safetensors"),
        ("ink", "style/ink.safetensors"),
        ("style/ink", "style/ink.safetensors"),
        ("style\\ink.safetensors", "style/ink.safetensors"),
        ("oil", "style/sub/oil.safetensors"),
    ],
)
def test_a_lora_is_found_by_name(name: str, file: str, loras: Path):
    assert resolve_lora(name, loras) == loras / file


def test_a_lora_is_found_by_path(loras: Path):
    path = loras / "style" / "ink.safetensors"
    assert resolve_lora(path, None) == path


def test_an_unknown_lora_is_answered_with_close_names(loras: Path):
    with pytest.raises(LoraError, match=r"sunwey: no such LoRA .*sunway\.safetensors"):
        resolve_lora("sunwey", loras)


def test_a_strength_that_is_no_number_is_not_called_an_absent_lora(loras: Path):
    for name in ("sunway", "sunway.safetensors"):
        with pytest.raises(LoraError, match=f"the strength of {name} must be a number, got 'x'"):
            resolve_lora(f"{name}:x", loras)


def test_a_lora_name_cannot_leave_its_folder(loras: Path):
    (loras.parent / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(LoraError, match="no such LoRA"):
        resolve_lora("../secret", loras)


def test_two_loras_of_one_name_are_listed(loras: Path):
    shutil.copy(loras / "style" / "ink.safetensors", loras / "style" / "sub" / "ink.safetensors")
    with pytest.raises(LoraError, match=r"several .*style/ink\.saf.*style/sub/ink\.saf"):
        resolve_lora("ink", loras)
    assert resolve_lora("style/ink", loras) == loras / "style" / "ink.safetensors"


def test_without_a_lora_folder_only_a_path_will_do():
    with pytest.raises(LoraError, match="no loras folder"):
        resolve_lora("sunway", None)
