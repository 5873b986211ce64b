"""A ComfyUI installation as a server of the benchmark's own, over the files that all sides use."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from bench.side import MissingRivalError, SideError
from turbo.comfyui_workflow import ModelNames
from turbo.model_files import ModelFiles

DTYPE_FLAGS: Mapping[str, tuple[str, ...]] = {
    dtype: tuple(f"--{short}-{part}" for part in ("unet", "vae", "text-enc"))
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"))
}
"""ComfyUI's flags for one dtype everywhere."""
NO_SERVER = (
    "no ComfyUI to compare with: give a running server with --comfyui-url, an installation with "
    "--comfyui-dir, or a command that starts one with --comfyui-command '… {port} … {models} …'"
)
_FOLDERS = ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras")
_ENVIRONMENTS = (".venv/bin/python", "venv/bin/python", "../python_embeded/python.exe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How a server is started."""

    folder: Path | None = None
    """The installation: the folder with ``main.py``."""
    command: str | None = None
    """In place of ``main.py``: a command line in which ``{port}`` and ``{models}`` are filled in;
    without a shell."""
    python: str | None = None
    """The interpreter that runs ``main.py``; None takes the installation's own, else this one."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    dtype: str = "float32"
    """One of `DTYPE_FLAGS`."""
    flags: tuple[str, ...] = ()
    """Put behind either command."""

    def check(self) -> None:
        """Go on if there is something to start.

        Raises:
            MissingRivalError: There is not.
        """
        if self.command is not None:
            if "{port}" not in self.command:
                raise MissingRivalError(
                    f"the command that starts ComfyUI must say where the port goes, got "
                    f"{self.command!r}; write {{port}} there, and {{models}} for the models folder"
                )
        elif self.folder is None:
            raise MissingRivalError(NO_SERVER)
        if self.folder is not None and not self.folder.is_dir():
            raise MissingRivalError(f"{self.folder}: no such folder; give ComfyUI's installation")
        if self.command is None and self.folder and not (self.folder / "main.py").is_file():
            raise MissingRivalError(
                f"{self.folder}: holds no main.py; give the folder of a ComfyUI installation"
            )

    def arguments(self, port: int, models: Path, scratch: Path) -> list[str]:
        """Program and arguments.

        Args:
            port: Where to listen, on 127.0.0.1.
            models: A models folder.
            scratch: An existing folder for what the server writes.
        """
        if self.command is not None:
            words = shlex.split(self.command)
            filled = [
                w.replace("{port}", str(port)).replace("{models}", str(models)) for w in words
            ]
            return [*filled, *self.flags]
        for name in ("output", "temp", "user"):
            (scratch / name).mkdir(exist_ok=True)
        return [
            self.python or self._own_python(),
            "main.py",
            *("--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"),
            *("--extra-model-paths-config", str(_write_paths(models, scratch / "models.yaml"))),
            *("--output-directory", str(scratch / "output")),
            *("--temp-directory", str(scratch / "temp")),
            *("--user-directory", str(scratch / "user")),
            *("--database-url", "sqlite:///:memory:"),
            "--use-pytorch-cross-attention",  # what turbo uses; on a CPU not ComfyUI's own choice
            *(["--cpu"] if self.device == "cpu" else []),
            *DTYPE_FLAGS[self.dtype],
            *self.flags,
        ]

    def _own_python(self) -> str:
        folder = self.folder or Path()
        own = [folder / name for name in _ENVIRONMENTS if (folder / name).is_file()]
        # Not resolved: a virtual environment's interpreter is a link to the one it was made with.
        return str(own[0].absolute()) if own else sys.executable


def link_models(files: ModelFiles, folder: Path) -> ModelNames:
    """Make a models folder of links to a model's files; returns the names a server lists them by.

    Raises:
        SideError: ComfyUI cannot read the files.
    """
    names = names_of(files)
    for name in _FOLDERS[:-1]:
        (folder / name).mkdir(parents=True)
    loras = folder / "loras"
    if files.loras_dir is not None:
        loras.symlink_to(files.loras_dir.absolute(), target_is_directory=True)
    else:
        loras.mkdir()
    if names.checkpoint is not None:
        (folder / "checkpoints" / names.checkpoint).symlink_to(files.network.absolute())
        return names
    for place, path in zip(_FOLDERS, (files.network, files.text_encoder, files.vae)):
        (folder / place / path.name).symlink_to(path.absolute())
    return names


def names_of(files: ModelFiles) -> ModelNames:
    """The names under which a server lists a model's files.

    Raises:
        SideError: ComfyUI cannot read the files.
    """
    parts = (files.network, files.text_encoder, files.vae)
    if files.layout == "diffusers" or not all(path.is_file() for path in parts):
        raise SideError(
            "ComfyUI reads single files, and this model is a diffusers folder; give ComfyUI's "
            "models folder, the three files, or what turbo convert --layout comfyui writes (the "
            "built-in model's autoencoder ComfyUI cannot read; python -m bench model writes one)"
        )
    if files.layout == "all-in-one":
        return ModelNames(checkpoint=files.network.name)
    return ModelNames(
        diffusion_model=files.network.name, text_encoder=files.text_encoder.name, vae=files.vae.name
    )


def _write_paths(models: Path, file: Path) -> Path:
    """ComfyUI's file of further model folders; ours come before the installation's own."""
    section = {"base_path": str(models.absolute()), "is_default": True}
    section |= {name: f"{name}/" for name in _FOLDERS}
    file.write_text(yaml.safe_dump({"turbo_bench": section}), encoding="utf-8")
    return file
