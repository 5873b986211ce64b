"""Where a model's files lie: ComfyUI's folders, a diffusers folder, single files, the tokenizer.

Which component a file holds is read from its header, never from its name; names only decide between
several that would do.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import isdir, isfile  # false, not an error, for what cannot be a path
from pathlib import Path

from turbo.cache_folder import user_cache
from turbo.checkpoint import Checkpoint, open_checkpoint, open_header
from turbo.errors import CheckpointError, LoraError, TokenizerNotFoundError
from turbo.names import (
    AUTOENCODER,
    COMPONENT_WORDS,
    COMPONENTS,
    NETWORK,
    TEXT_ENCODER,
    find_components,
    native_places,
    select_names,
)

PREFERRED_FILES: Mapping[str, str] = {
    NETWORK: "z_image_turbo_bf16.safetensors",
    TEXT_ENCODER: "qwen_3_4b.safetensors",
    AUTOENCODER: "ae.safetensors",
}
"""The workflow's own file names, which win when a folder holds several candidates."""

COMFYUI_FOLDERS: Mapping[str, tuple[str, ...]] = {
    NETWORK: ("diffusion_models", "unet"),
    TEXT_ENCODER: ("text_encoders", "clip"),
    AUTOENCODER: ("vae",),
}
"""Where ComfyUI keeps each component, below ``models``; what is written goes into the first."""
_CHECKPOINTS = "checkpoints"
_COMFYUI_NAMES = {name for names in COMFYUI_FOLDERS.values() for name in names} | {_CHECKPOINTS}
_LORAS = "loras"
DIFFUSERS_FOLDERS = {NETWORK: "transformer", TEXT_ENCODER: "text_encoder", AUTOENCODER: "vae"}
_ARGUMENTS = {
    NETWORK: "diffusion_model (--diffusion-model)",
    TEXT_ENCODER: "text_encoder (--text-encoder)",
    AUTOENCODER: "vae (--vae)",
}
"""What names a component's file: the argument, and the command line's option."""
_SUFFIXES = (".safetensors", ".gguf")
_MODEL_SUFFIXES = {*_SUFFIXES, ".sft", ".ckpt", ".pt", ".pth", ".bin"}

# Tensors whose second dimension must agree between the components.
_CAPTION_WIDTH = "cap_embedder.1.weight"
_PATCH_WIDTH = "x_embedder.weight"
_HIDDEN_WIDTH = "model.embed_tokens.weight"
_LATENT_WIDTH = "decoder.conv_in.weight"
_WIDTHS = {NETWORK: _CAPTION_WIDTH, TEXT_ENCODER: _HIDDEN_WIDTH, AUTOENCODER: _LATENT_WIDTH}
_LATENT_CHANNELS = 16
_PATCH_POSITIONS = 4

_TOKENIZER = "tokenizer"
_TOKENIZER_SETS = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_COMFYUI_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")
_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A complete set of model files; each component is a file or a folder of several."""

    layout: str
    """``comfyui``, ``diffusers``, ``files`` or ``all-in-one``."""
    network: Path
    """Diffusion model."""
    text_encoder: Path
    """Qwen3."""
    vae: Path
    """Autoencoder."""
    tokenizer: Path | None
    """Folder (or tokenizer.json) of the tokenizer; None if none was found anywhere."""
    tokenizer_places: tuple[Path, ...] = ()
    """Where a tokenizer is looked for, in order."""
    loras_dir: Path | None = None
    """Folder in which LoRAs are looked up by name, if there is one."""

    def open(self) -> dict[str, Checkpoint]:
        """Open the three components: ``network``, ``text_encoder`` and ``autoencoder``.

        Raises:
            CheckpointError: A file is damaged, refused or of another model, or one component does
                not fit another.
        """
        paths = {NETWORK: self.network, TEXT_ENCODER: self.text_encoder, AUTOENCODER: self.vae}
        opened = {component: open_checkpoint(component, path) for component, path in paths.items()}
        _check_widths(opened)
        return opened

    def require_tokenizer(self) -> Path:
        """The tokenizer's place.

        Raises:
            TokenizerNotFoundError: There is none; says which files to put where.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        place = self.tokenizer_places[0] if self.tokenizer_places else Path(_TOKENIZER)
        raise TokenizerNotFoundError(
            "no tokenizer found in the model folder, a ComfyUI installation beside it or the "
            "Hugging Face cache: fetch vocab.json and merges.txt of Qwen/Qwen3-4B from the Hugging "
            f"Face Hub and put both into {place}, or give the folder that has them as tokenizer"
        )


def shown_name(path: Path) -> str:
    """A component for people: its file's name, or its folder's with the model's before it."""
    return f"{path.parent.name}/{path.name}" if path.is_dir() else path.name


def find_model_files(
    path: Path | str | None = None,
    *,
    diffusion_model: Path | str | None = None,
    text_encoder: Path | str | None = None,
    vae: Path | str | None = None,
    tokenizer: Path | str | None = None,
) -> ModelFiles:
    """Find a model's files.

    Args:
        path: A ComfyUI folder or its ``models`` folder, a diffusers folder, a folder that holds the
            three files, or an all-in-one checkpoint. Not needed if the three are given.
        diffusion_model: The network's file (or diffusers component folder), also by its name in the
            model folder; wins over what `path` holds.
        text_encoder: As `diffusion_model`, for the text encoder.
        vae: As `diffusion_model`, for the autoencoder.
        tokenizer: Folder with ``vocab.json`` and ``merges.txt`` or ``tokenizer.json``, or one of
            these files.

    Returns:
        The files. `ModelFiles.tokenizer` is None if none was found: `require_tokenizer` says what
        to do then.

    Raises:
        CheckpointError: Something is missing, or several files would do; says which argument
            chooses.
        TokenizerNotFoundError: `tokenizer` was given and holds none.
    """
    given = {NETWORK: diffusion_model, TEXT_ENCODER: text_encoder, AUTOENCODER: vae}
    home = _Home.at(_expand(path)) if path is not None else _Home("files")
    files = {c: _resolve_name(c, name, home) for c, name in given.items() if name is not None}
    if home.path is None:
        _require_all(files)
        home = _Home("files", models=_models_folder_of(files.values()))
    files = _fill_diffusers(home, files) if home.layout == "diffusers" else _fill(home, files)
    is_one_file = len(set(files.values())) == 1
    places = tuple(dict.fromkeys(_tokenizer_places(home, files[TEXT_ENCODER])))
    return ModelFiles(
        layout="all-in-one" if is_one_file else home.layout,
        network=files[NETWORK],
        text_encoder=files[TEXT_ENCODER],
        vae=files[AUTOENCODER],
        tokenizer=_given_tokenizer(_expand(tokenizer)) if tokenizer else _first_tokenizer(places),
        tokenizer_places=places,
        loras_dir=home.loras_dir,
    )


def resolve_lora(name_or_path: Path | str, loras_dir: Path | None) -> Path:
    """Find a LoRA file by path, or by its name in the LoRA folder and its sub-folders.

    Args:
        name_or_path: A path to a file; or a name, with or without ``.safetensors`` and sub-folder.
        loras_dir: The model's LoRA folder, if it has one.

    Raises:
        LoraError: No such file (lists close names), or several of that name.
    """
    if isfile(_expand(name_or_path)):
        return _expand(name_or_path)
    if loras_dir is None or not isdir(loras_dir):
        raise LoraError(f"{name_or_path}: no such file, and there is no loras folder to look in")
    wanted = str(name_or_path).replace("\\", "/")
    files = {file.relative_to(loras_dir).as_posix(): file for file in _files_under(loras_dir)}
    spellings = (wanted, f"{wanted}.safetensors")
    whole = [name for name in files if name in spellings]
    hits = whole or [name for name in files if name.rpartition("/")[2] in spellings]
    if len(hits) == 1:
        return files[hits[0]]
    if hits:
        raise LoraError(f"{wanted}: several LoRAs have this name: {_list(hits)}; give its folder")
    name, _, tail = wanted.rpartition(":")
    if any(each.rpartition("/")[2] in (name, f"{name}.safetensors") for each in files):
        raise LoraError(f"{wanted}: the strength of {name} must be a number, got {tail!r}")
    close = difflib.get_close_matches(wanted, files, n=3, cutoff=0.4) or sorted(files)
    raise LoraError(f"{wanted}: no such LoRA in {loras_dir}; there is {_list(close) or 'none'}")


def hub_cache() -> Path:
    """The folder into which Hugging Face's programs load repositories."""
    home = os.environ.get("HF_HOME") or user_cache() / "huggingface"
    return _expand(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


@dataclass(frozen=True, slots=True)
class _Home:
    """What the given path turned out to be."""

    layout: str
    path: Path | None = None
    models: Path | None = None
    """ComfyUI's ``models`` folder, if the files lie in one."""

    @classmethod
    def at(cls, path: Path) -> _Home:
        if isfile(path):
            open_header(path)  # a damaged file is refused before its companions are looked for
            return cls("files", path, _models_folder_of([path]))
        if not isdir(path):
            raise CheckpointError(f"{path}: no such file or folder")
        if isfile(path / "model_index.json") or isdir(path / "transformer"):
            return cls("diffusers", path)
        for models in (path, path / "models"):
            if any(isdir(models / name) for name in _COMFYUI_NAMES):
                return cls("comfyui", path, models)
        return cls("files", path)

    @property
    def loras_dir(self) -> Path | None:
        base = self.models or self.path
        return base / _LORAS if base is not None and isdir(base / _LORAS) else None

    def groups(self, component: str) -> list[list[Path]]:
        """Files and folders to look into: a later group only if the ones before hold nothing."""
        groups = []
        if self.path is not None and self.layout == "files":
            groups.append([self.path])
        if self.models is not None:
            groups.append([self.models / name for name in COMFYUI_FOLDERS[component]])
            groups.append([self.models / _CHECKPOINTS])
        return groups


def _models_folder_of(files: Iterable[Path]) -> Path | None:
    """The ``models`` folder that one of the files lies in, judged by the folders' names."""
    for file in files:
        for parent in file.absolute().parents:
            if parent.name in _COMFYUI_NAMES and parent.parent.name == "models":
                return parent.parent
    return None


def _require_all(files: Mapping[str, Path]) -> None:
    missing = [argument for component, argument in _ARGUMENTS.items() if component not in files]
    if missing:
        raise CheckpointError(
            f"without a model folder, {' and '.join(missing)} must be given as well"
        )


def _resolve_name(component: str, name: Path | str, home: _Home) -> Path:
    """A path as given, or a file name looked up in the model folder."""
    path = _expand(name)
    if isfile(path) or isdir(path):
        return path
    places = [place for group in home.groups(component) for place in group if isdir(place)]
    for place in places:
        for candidate in (place / path, *(place / f"{path}{suffix}" for suffix in _SUFFIXES)):
            if isfile(candidate):
                return candidate
    there = [file.name for place in places for file in _files_in(place, home)]
    close = difflib.get_close_matches(str(name), there, n=3, cutoff=0.4)
    hint = f"; did you mean {_list(close)}?" if close else ""
    raise CheckpointError(f"{name}: no such file for {_ARGUMENTS[component]}{hint}")


def _fill_diffusers(home: _Home, chosen: Mapping[str, Path]) -> dict[str, Path]:
    files = dict(chosen)
    for component, name in DIFFUSERS_FOLDERS.items():
        folder = (home.path or Path()) / name
        if component not in files and not isdir(folder):
            argument = _ARGUMENTS[component]
            raise CheckpointError(f"{home.path}: has no folder {name}; add it or give {argument}")
        files.setdefault(component, folder)
    return files


def _fill(home: _Home, chosen: Mapping[str, Path]) -> dict[str, Path]:
    """Find the components that were not chosen, by looking into the headers of all files."""
    files = dict(chosen)
    if len(files) == len(COMPONENTS):
        return files
    scan = _Scan(home)
    if NETWORK not in files:
        files[NETWORK] = scan.choose(NETWORK)
    held = scan.look_into(files[NETWORK]).widths
    for component in (TEXT_ENCODER, AUTOENCODER):
        if component not in files and component in held:
            files[component] = files[NETWORK]
        elif component not in files:
            files[component] = scan.choose(component, caption_width=held.get(NETWORK))
    return files


@dataclass(frozen=True, slots=True)
class _Contents:
    """What one file holds."""

    widths: Mapping[str, int]
    """Component -> second dimension of its tensor in `_WIDTHS`."""
    refusal: str = ""
    """Why the file cannot be read."""


@dataclass(slots=True)
class _Scan:
    """Looks into the headers of a model folder's files, once each."""

    home: _Home
    seen: dict[Path, _Contents] = field(default_factory=dict)

    def look_into(self, file: Path) -> _Contents:
        if file not in self.seen:
            self.seen[file] = _contents(file)
        return self.seen[file]

    def choose(self, component: str, *, caption_width: int | None = None) -> Path:
        """The one file that holds the component; a text encoder must suit the network."""
        refused: list[str] = []
        for group in self.home.groups(component):
            held = []
            for file in (file for place in group for file in _files_in(place, self.home)):
                contents = self.look_into(file)
                width = contents.widths.get(component)
                if contents.refusal and file.name == PREFERRED_FILES[component]:
                    raise CheckpointError(f"{file}: {contents.refusal}")
                if contents.refusal and file.suffix.lower() in _MODEL_SUFFIXES:
                    refused.append(f"{file.name} {contents.refusal}")
                elif component == TEXT_ENCODER and width and caption_width not in (None, width):
                    refused.append(
                        f"{file.name} is {width} wide, the network wants {caption_width}"
                    )
                elif width is not None:
                    held.append(file)
            if held:
                return _pick(component, held)
        raise self._nothing(component, refused)

    def _nothing(self, component: str, refused: Sequence[str]) -> CheckpointError:
        places = [str(place) for group in self.home.groups(component) for place in group]
        also = f" (not used: {_list(refused)})" if refused else ""
        return CheckpointError(
            f"no {COMPONENT_WORDS[component]} in {_list(places)}; "
            f"give {_ARGUMENTS[component]}{also}"
        )


def _pick(component: str, files: Sequence[Path]) -> Path:
    preferred = [file for file in files if file.name == PREFERRED_FILES[component]]
    chosen = files if len(files) == 1 else preferred
    if len(chosen) != 1:
        raise CheckpointError(
            f"several files hold a {COMPONENT_WORDS[component]}: {_list([str(f) for f in files])}; "
            f"choose one with {_ARGUMENTS[component]}"
        )
    return chosen[0]


def _contents(file: Path) -> _Contents:
    try:
        tensors = open_header(file).tensors if isfile(file) else {}
    except CheckpointError as error:
        return _Contents({}, refusal=str(error).removeprefix(f"{file}: "))
    widths = {}
    for component, prefix in find_components(tensors).items():
        inner = select_names(tensors, prefix)
        places = native_places(component, inner.values())
        shapes = {places[name].name: tensors[key].shape for key, name in inner.items()}
        width = _second(shapes.get(_WIDTHS[component], ()))
        if width and (component != AUTOENCODER or width == _LATENT_CHANNELS):
            widths[component] = width
    return _Contents(widths)


def _second(shape: Sequence[int]) -> int:
    return shape[1] if len(shape) > 1 else 0


def _check_widths(opened: Mapping[str, Checkpoint]) -> None:
    """Components of different models are found out before anything large is read."""
    network, text_encoder, vae = (opened[component] for component in COMPONENTS)
    wanted = _second(network.shapes.get(_CAPTION_WIDTH, ()))
    given = _second(text_encoder.shapes.get(_HIDDEN_WIDTH, ()))
    if wanted and given and wanted != given:
        raise CheckpointError(
            f"{text_encoder.label}: this text encoder is {given} wide, but the network "
            f"{network.label} was trained with one of {wanted}; give the one that belongs to it"
        )
    wanted = _second(network.shapes.get(_PATCH_WIDTH, ()))
    given = _PATCH_POSITIONS * _second(vae.shapes.get(_LATENT_WIDTH, ()))
    if wanted and given and wanted != given:
        raise CheckpointError(
            f"{vae.label}: this autoencoder's latent has {given // _PATCH_POSITIONS} channels, the "
            f"network {network.label} wants {wanted // _PATCH_POSITIONS}; give another vae"
        )


def _tokenizer_places(home: _Home, text_encoder: Path) -> Iterator[Path]:
    """Folders that may hold the tokenizer, in the order of preference."""
    if home.path is not None and isdir(home.path) and home.layout != "comfyui":
        yield home.path / _TOKENIZER
        yield home.path
    if home.models is not None:
        yield home.models / _TOKENIZER
        for name in COMFYUI_FOLDERS[TEXT_ENCODER]:
            yield home.models / name
    beside = text_encoder if isdir(text_encoder) else text_encoder.absolute().parent
    yield beside / _TOKENIZER
    yield beside.parent / _TOKENIZER
    yield beside
    if home.models is not None:
        yield home.models.absolute().parent / _COMFYUI_TOKENIZER
    yield from _hub_snapshots("Tongyi-MAI--Z-Image-Turbo", _TOKENIZER)
    yield from _hub_snapshots("Qwen--Qwen3-4B", "")
    yield from _hub_snapshots("Qwen--Qwen3-*", "")


def _hub_snapshots(repository: str, folder: str) -> Iterator[Path]:
    """Snapshots of a repository in the Hugging Face cache, the one that ``main`` names first."""
    for cached in sorted(hub_cache().glob(f"models--{repository}")):
        try:
            main = (cached / "refs" / "main").read_text().strip()
        except (OSError, ValueError):
            main = ""
        snapshots = sorted(cached.glob("snapshots/*"), key=lambda path: (path.name != main, path))
        for snapshot in snapshots:
            yield snapshot / folder


def _first_tokenizer(places: Iterable[Path]) -> Path | None:
    return next((place for place in places if _has_tokenizer(place)), None)


def _has_tokenizer(folder: Path) -> bool:
    return any(all(isfile(folder / name) for name in names) for names in _TOKENIZER_SETS)


def _given_tokenizer(path: Path) -> Path:
    if isfile(path) and path.suffix == ".json" and path.name != "vocab.json":
        return path
    folder = path.parent if isfile(path) else path
    if not _has_tokenizer(folder):
        raise TokenizerNotFoundError(
            f"{path}: no tokenizer there; give a folder that holds vocab.json and merges.txt of "
            "Qwen/Qwen3-4B (from the Hugging Face Hub), or its tokenizer.json"
        )
    return folder


def _files_in(place: Path, home: _Home) -> Iterator[Path]:
    """A file itself; a folder's files, with sub-folders where ComfyUI looks into them too."""
    if isfile(place):
        yield place
    else:
        yield from _files_under(
            place, deep=home.models is not None and home.models in place.parents
        )


def _files_under(folder: Path, *, deep: bool = True) -> Iterator[Path]:
    """All files of a folder and its sub-folders, links followed once, hidden ones left out."""
    entered: set[str] = set()
    for current, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        is_new = real not in entered
        entered.add(real)
        folders[:] = sorted(n for n in folders if deep and is_new and not n.startswith("."))
        if is_new:
            yield from (Path(current, name) for name in sorted(names) if name[0] != ".")


def _expand(path: Path | str) -> Path:
    return Path(os.path.expanduser(path))


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown
