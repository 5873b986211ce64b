"""What `turbo info` collects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbo import __version__
from turbo.info import collect_info
from turbo.testing import make_tiny_model


def test_versions_and_devices_are_told():
    info = collect_info()
    assert info["turbo"] == __version__
    assert info["packages"]["torch"] == torch.__version__
    assert info["devices"][0]["device"] == "cpu"
    assert info["devices"][0]["name"]
    assert "sdpa" in info["devices"][0]["attention"]
    assert len(info["devices"]) == 1 + torch.cuda.device_count()
    json.dumps(info)


def test_without_a_model_the_built_in_one_is_told():
    model = collect_info()["model"]
    assert model["built_in"]
    assert model["layout"] == "diffusers"


def test_a_package_without_the_built_in_model_is_a_problem_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("turbo.builtin._FOLDER", tmp_path)
    assert "the built-in model is not there" in collect_info()["model"]["problem"]


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_the_files_of_a_model_are_told(tmp_path: Path, layout: str):
    folder = make_tiny_model(tmp_path / "model", layout=layout)
    model = collect_info(folder)["model"]
    assert model["layout"] == layout
    assert not model["built_in"]
    assert set(model["components"]) == {"network", "text_encoder", "autoencoder"}
    assert all(part["file_bytes"] > 0 for part in model["components"].values())
    assert model["tokenizer"] is not None
    json.dumps(model)


def test_loras_are_listed_by_name(tmp_path: Path):
    folder = make_tiny_model(tmp_path / "model")
    loras = folder / "models" / "loras" / "styles"
    loras.mkdir(parents=True)
    (loras / "a.safetensors").touch()
    assert collect_info(folder)["model"]["loras"] == [str(Path("styles", "a.safetensors"))]


def test_a_missing_model_is_a_problem_told(tmp_path: Path):
    info = collect_info(tmp_path / "none")
    assert "no such file or folder" in info["model"]["problem"]
    assert info["packages"]["torch"]


def test_the_caches_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TURBO_CACHE", str(tmp_path / "compiled"))
    assert collect_info()["caches"] == {
        "compiled_code": str(tmp_path / "compiled"),
        "hugging_face": str(tmp_path / "hf" / "hub"),
    }
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("TURBO_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, which the standard says to ignore")
    assert collect_info()["caches"] == {
        "compiled_code": str(tmp_path / ".cache" / "turbo"),
        "hugging_face": str(tmp_path / ".cache" / "huggingface" / "hub"),
    }
