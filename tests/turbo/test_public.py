"""The package from outside: what importing and running it does to the process around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import turbo
from tests.conftest import REPOSITORY
from turbo.errors import BadInputError, FailureError, TurboError
from turbo.plan import Plan, Stage, dump_plan
from turbo.testing import make_tiny_model


def python(code: str, *arguments: str) -> str:
    """What a fresh Python prints that runs `code` with this checkout's `turbo`."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Names.


@pytest.mark.parametrize("name", turbo.__all__)
def test_every_public_name_exists(name: str):
    assert getattr(turbo, name) is not None
    assert name in dir(turbo)


def test_public_names_are_what_they_say():
    from turbo import Engine, NativeImageGenerator, create_image_generator

    assert Engine.__module__ == "turbo.engine"
    assert isinstance(create_image_generator(), NativeImageGenerator)
    assert len(set(turbo.__all__)) == len(turbo.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'turbo' has no attribute 'engines'"):
        _ = turbo.engines


def test_errors_are_of_two_families():
    errors = [getattr(turbo, name) for name in turbo.__all__ if name.endswith("Error")]
    for error in errors:
        assert issubclass(error, TurboError)
        is_family = error in (TurboError, BadInputError, FailureError)
        assert is_family or issubclass(error, BadInputError) != issubclass(error, FailureError)
    assert issubclass(BadInputError, ValueError)
    assert issubclass(FailureError, RuntimeError)


# Importing.


def test_importing_turbo_loads_nothing_from_elsewhere():
    code = (
        "import sys; before = set(sys.modules); import turbo\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    assert python(code) == "['turbo']\n"


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys, warnings
import torch

def settings():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.get_deterministic_debug_mode(),
        "precision": torch.get_float32_matmul_precision(),
        "tf32": (cuda.matmul.allow_tf32, cudnn.allow_tf32),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
                      cuda.math_sdp_enabled()),
        "reduction": (cuda.matmul.allow_fp16_reduced_precision_reduction,
                      cuda.matmul.allow_bf16_reduced_precision_reduction),
        "onednn": torch.backends.mkldnn.enabled,
        "print": torch._tensor_str.PRINT_OPTS.precision,
        "random": torch.get_rng_state().tolist(),
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, sys.displayhook),
    }

touched = []
for name in ("_lazy_init", "is_available", "device_count", "current_device", "synchronize"):
    setattr(torch.cuda, name, lambda *_, name=name, **__: touched.append(name))

def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
        touched.append(("wrote", arguments[0]))
    elif event.split(".")[0] in ("socket", "subprocess") or event in ("os.mkdir", "os.system"):
        touched.append(event)

import turbo
# What other packages do when they are imported is not ours.
import numpy, safetensors.torch, tokenizers, yaml, PIL.Image, PIL.ImageOps, PIL.PngImagePlugin
before = settings()
sys.addaudithook(watch)
names = [module.name for module in pkgutil.walk_packages(turbo.__path__, "turbo.")]
for name in names:
    importlib.import_module(name)
after = settings()
assert after == before, [name for name in before if after[name] != before[name]]
assert not touched, touched
assert not {"diffusers", "transformers"} & set(sys.modules)
print(" ".join(names))
"""


def test_importing_every_module_touches_no_gpu_no_disk_and_no_setting():
    names = python(IMPORT_EVERYTHING).split()
    files = {f"turbo.{path.stem}" for path in (REPOSITORY / "turbo").glob("[!_]*.py")}
    assert files <= set(names)


# Running.

RUN_GUARDED = """
import pickle, sys
import torch, torchsde

def refuse(*_, **__):
    raise AssertionError("a pickle or a socket was opened")

def watch(event, arguments):
    if event.split(".")[0] in ("socket", "subprocess", "pickle"):
        raise AssertionError(event)

sys.modules["diffusers"] = sys.modules["transformers"] = None  # importing them fails
pickle.load = pickle.loads = pickle.Unpickler = torch.load = torch.hub.load = refuse
import turbo
turbo.Engine, turbo.NativeImageGenerator
sys.addaudithook(watch)
model, plan, lora = sys.argv[1:]
engine = turbo.Engine.from_pretrained(model, device="cpu", plan=plan)
engine.warmup()
engine.set_loras([lora])
result = engine.generate("a cat", negative_prompt="blurry", seed=7, keep_stages=True)
image = engine.generate("a cat", image=result.image, strength=0.6).image
from turbo.image_file import save_png
save_png(image, plan + ".png", metadata=result.metadata[0])
print(image.size)
"""


def test_loading_and_generating_open_no_socket_and_no_pickle(tmp_path: Path):
    import torch
    from safetensors.torch import save_file

    model = make_tiny_model(tmp_path / "model")
    stages = (
        Stage(name="stage1", height=32, width=32, steps=2, cfg=2.0),
        Stage(name="stage2", height=48, width=32, steps=2, denoise=0.6, sampler="dpmpp_sde"),
    )
    plan, lora = tmp_path / "plan.yaml", tmp_path / "lora.safetensors"
    plan.write_text(dump_plan(Plan(stages=stages)))
    save_file({"diffusion_model.layers.0.attention.out.diff": torch.ones(192, 192)}, lora)
    assert python(RUN_GUARDED, str(model), str(plan), str(lora)) == "(32, 48)\n"
    assert (tmp_path / "plan.yaml.png").is_file()
