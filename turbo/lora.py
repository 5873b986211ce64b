"""LoRA files: reading, finding the tensor that each module name means, adding to the weights.

A LoRA changes some weights ``W`` of the network and the text encoder by a small update:

    LoRA    W + strength * scale * (up @ down)
    LoHa    W + strength * scale * (w1_a @ w1_b) * (w2_a @ w2_b)     (elementwise product)
    LoKr    W + strength * scale * kron(w1, w2)                      (a factor may be w_a @ w_b)
    diff    W + strength * difference
    set     the tensor given, whatever the strength

scale is alpha / rank where the file holds an alpha, else 1. DoRA rescales the moved weight
``V = W + scale * update`` to the magnitudes m of the file and then goes `strength` of the way from
W to the result: ``V * m / (|rows of W| + eps)`` for one m per row,
``V * m / (|columns of V| + eps)`` for one m per column. (That the first divides by the unmoved W is
what ComfyUI does.)

Trainers name one module in many ways: `diffusion_model.layers.0.attention.qkv`,
`transformer.layers.0.attention.to_q`, `lora_unet_layers_0_attention_to_q`, ... Dots and underscores
are taken as the same here, the prefixes are taken off, and what is left is looked up among the
native and the diffusers names of the model's own tensors.

One file moves a place once; a place is a tensor, or the q, k or v rows of a fused one. Where a file
names the same place several times (two spellings, so that more programs can read it, or a LoRA and
a `.diff`), the one that ComfyUI would take counts and the others are `inert`: adding both would
double the strength, and the order of keys in a safetensors file says nothing. A fused update and
updates of its parts are different places: all apply, the fused one first.

Sources: Hu et al. 2021 (arXiv:2106.09685), LoHa: Hyeon-Woo et al. 2021 (arXiv:2108.06098), LoKr:
Yeh et al. 2023 (arXiv:2309.14859), DoRA: Liu et al. 2024 (arXiv:2402.09353).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turbo.errors import CheckpointError, LoraError
from turbo.header import Header, one_line, read_header, shorten, some_names
from turbo.names import NETWORK, TEXT_ENCODER, diffusers_names

Shapes = Mapping[str, Sequence[int]]
"""Native tensor name -> shape."""


# --- Updates: what a file does to one weight, taken as a matrix; n values are [n, 1] ------------


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA: ``up @ down``."""

    up: Tensor
    """[rows, rank]"""
    down: Tensor
    """[rank, columns]"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def add_to(self, weight: Tensor, scale: float) -> None:
        weight.addmm_(_like(weight, self.up), _like(weight, self.down), alpha=scale)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa: the elementwise product of two low-rank matrices."""

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    def add_to(self, weight: Tensor, scale: float) -> None:
        first, second = _matrix(weight, self.first), _matrix(weight, self.second)
        weight.addcmul_(first, second, value=scale)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr: the Kronecker product of two matrices, either of which may be a low-rank product."""

    first: Tensor | LowRank
    second: Tensor | LowRank

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = zip(self.first.shape, self.second.shape, strict=True)
        return math.prod(rows), math.prod(columns)

    def add_to(self, weight: Tensor, scale: float) -> None:
        first, second = _matrix(weight, self.first), _matrix(weight, self.second)
        # blocks[a, c, b, d] is row a * rows(second) + c, column b * columns(second) + d.
        blocks = weight.view(first.shape[0], second.shape[0], first.shape[1], second.shape[1])
        blocks.addcmul_(first[:, None, :, None], second[None, :, None, :], value=scale)


@dataclass(frozen=True, eq=False)
class Difference:
    """`.diff` and the like: a matrix that is added as it is."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return _matrix_shape(self.value.shape)

    def add_to(self, weight: Tensor, scale: float) -> None:
        weight.add_(_like(weight, self.value).reshape(weight.shape), alpha=scale)


@dataclass(frozen=True, eq=False)
class Replacement:
    """`.set_weight`: a matrix that takes the weight's place, whatever the strength."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return _matrix_shape(self.value.shape)


Update = LowRank | Hadamard | Kronecker | Difference | Replacement


@dataclass(frozen=True, eq=False)
class Patch:
    """One update bound to its place in a tensor of the model."""

    update: Update
    rows: tuple[int, int] | None = None
    """First row and the row after the last; None is the whole tensor."""
    scale: float = 1.0
    """alpha / rank."""
    magnitude: Tensor | None = None
    """DoRA's m, [rows, 1] or [1, columns]."""

    def apply_to(self, weight: Tensor, strength: float) -> None:
        """Change the patch's place in `weight` (float32, contiguous, any device)."""
        part = weight if self.rows is None else weight[slice(*self.rows)]
        matrix = part.view(self.update.shape)
        if isinstance(self.update, Replacement):
            matrix.copy_(self.update.value.reshape(matrix.shape))
        elif self.magnitude is None:
            self.update.add_to(matrix, strength * self.scale)
        else:
            moved = matrix.clone()
            self.update.add_to(moved, self.scale)
            _rescale(moved, matrix, _like(matrix, self.magnitude))
            _go_towards(matrix, moved, strength)


def apply_patches(weight: Tensor, patches: Sequence[tuple[Patch, float]]) -> Tensor:
    """Fuse LoRA patches into one weight.

    Args:
        weight: float32, contiguous, any device. **Changed in place**: no second copy is made,
            except one of the patched rows for DoRA.
        patches: (patch, strength) in order, each applied to the result of the one before.
            Strength 0 leaves the patch out, `.set_weight` included, as not loading the file would.

    Returns:
        `weight` itself.
    """
    if weight.dtype != torch.float32:
        raise ValueError(f"LoRAs are fused in float32, got a weight of {weight.dtype}")
    for patch, strength in patches:
        if strength != 0:
            patch.apply_to(weight, strength)
    return weight


def _rescale(moved: Tensor, weight: Tensor, magnitude: Tensor) -> None:
    """Give `moved` DoRA's magnitudes, in place."""
    per_row = magnitude.shape[0] == weight.shape[0]
    norm = weight.norm(dim=1, keepdim=True) if per_row else moved.norm(dim=0, keepdim=True)
    moved.mul_(magnitude / (norm + torch.finfo(torch.float32).eps))


def _go_towards(weight: Tensor, goal: Tensor, strength: float) -> None:
    if strength == 1:
        weight.copy_(goal)
    else:
        weight.add_(goal.sub_(weight), alpha=strength)


def _like(weight: Tensor, factor: Tensor) -> Tensor:
    return factor.to(device=weight.device, dtype=weight.dtype)


def _matrix(weight: Tensor, factor: Tensor | LowRank) -> Tensor:
    if isinstance(factor, LowRank):
        return _like(weight, factor.up) @ _like(weight, factor.down)
    return _like(weight, factor)


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows, and everything else as columns: [n] is [n, 1], a 1 x 1 convolution is its matrix."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


# --- Files --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lora:
    """The tensors of one LoRA file."""

    name: str
    """File name, for messages and metadata."""
    tensors: Mapping[str, Tensor]
    """Key -> tensor on the CPU, in the file's dtype, all values finite in float32; or on the meta
    device, if only shapes were read."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over keys, dtypes, shapes and values, not over the file's metadata."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.tensors.items()):
            digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def read_lora(path: str | Path, *, shapes_only: bool = False) -> Lora:
    """Read a LoRA from a safetensors file, judged by its content, whatever the suffix.

    The tensors are copied into memory, so that the file may change or go away afterwards. A file
    without any LoRA tensor, such as a whole checkpoint, is refused before its values are read.

    Args:
        path: The file.
        shapes_only: Read what `match_lora` looks at and no more: the shapes from the header, and
            the values of alphas and the like.

    Raises:
        LoraError: No such file, not safetensors (a pickle, say), damaged, no LoRA in it, of a dtype
            that is not read, or a value is NaN or infinite.
    """
    path = Path(path)
    try:
        header = read_header(path)
    except CheckpointError as error:
        raise LoraError(f"LoRA {error}") from error
    _require_lora_tensors(header)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {
                key: torch.empty(entry.shape, device="meta")
                if shapes_only and not key.endswith(_SETTINGS)
                else file.get_tensor(key).clone()
                for key, entry in header.tensors.items()
            }
    except (SafetensorError, OSError) as error:
        raise LoraError(f"LoRA {path}: cannot be read: {one_line(error)}") from error
    for key, tensor in tensors.items():
        if not tensor.is_meta and not tensor.float().isfinite().all():
            raise LoraError(
                f"{path.name}: {shorten(key)} holds NaN or values beyond float32; the file is "
                "damaged or its training failed, use another one"
            )
    return Lora(path.name, tensors)


def _require_lora_tensors(header: Header) -> None:
    if not any(key.endswith((*_SUFFIXES, *_REFUSED)) for key in header.tensors):
        raise LoraError(
            f"LoRA {header.path}: none of its {len(header.tensors)} tensors is one of a LoRA "
            f"({some_names(list(header.tensors))}); it is a whole checkpoint or something else"
        )
    for key, entry in header.tensors.items():
        if entry.dtype not in _DTYPES:
            raise LoraError(
                f"LoRA {header.path}: {shorten(key)} is {entry.dtype}; readable are "
                f"{', '.join(_DTYPES)}"
            )


_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8")


# --- Key suffixes -------------------------------------------------------------------------------

# up / down. Where a module has several pairs the first one counts, as in ComfyUI.
_LORA_PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B", ".lora_A"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B.default", ".lora_A.default"),
)
_LOHA_PAIRS = ((".hada_w1_a", ".hada_w1_b"), (".hada_w2_a", ".hada_w2_b"))
_LOKR_FACTORS = (
    (".lokr_w1", ".lokr_w1_a", ".lokr_w1_b"),
    (".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"),
)
_WEIGHT_DIFFERENCES = (".w_norm", ".diff")
_BIAS_DIFFERENCES = (".b_norm", ".diff_b")
_SETTINGS = (".alpha", ".dora_scale", ".reshape_weight")

_SUFFIXES: tuple[str, ...] = (
    *(suffix for group in (*_LORA_PAIRS, *_LOHA_PAIRS, *_LOKR_FACTORS) for suffix in group),
    *_WEIGHT_DIFFERENCES,
    *_BIAS_DIFFERENCES,
    ".set_weight",
    *_SETTINGS,
)

_REFUSED = {
    ".lora_mid.weight": "a convolutional LoRA with a middle factor",
    ".hada_t1": "a LoHa in Tucker form",
    ".hada_t2": "a LoHa in Tucker form",
    ".lokr_t1": "a LoKr in Tucker form",
    ".lokr_t2": "a LoKr in Tucker form",
    ".oft_blocks": "OFT or BOFT",
    ".oft_diag": "OFT",
    ".oft_R.weight": "OFT",
    ".oft_R.default.weight": "OFT",
    ".boft_R": "BOFT",
    ".boft_s": "BOFT",
    ".rescale": "OFT or BOFT",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".on_input": "(IA)3",
    ".vera_lambda_b": "VeRA",
    ".vera_lambda_d": "VeRA",
    ".lora_magnitude_vector": "a DoRA in PEFT's form",
    ".lora_magnitude_vector.weight": "a DoRA in PEFT's form",
    ".lora_magnitude_vector.default.weight": "a DoRA in PEFT's form",
}


@dataclass(frozen=True, eq=False)
class _Module:
    """The keys of a file that name one module."""

    lora: Lora
    name: str
    keys: dict[str, str]
    """Suffix -> key."""

    def has(self, *suffixes: str) -> bool:
        return any(suffix in self.keys for suffix in suffixes)

    def tensor(self, suffix: str) -> Tensor:
        return self.lora.tensors[self.keys[suffix]]

    def describe(self, *suffixes: str) -> str:
        found = (suffix for suffix in suffixes if suffix in self.keys)
        return " and ".join(f"{shorten(self.keys[s])} {list(self.tensor(s).shape)}" for s in found)

    def error(self, problem: str) -> LoraError:
        return LoraError(f"{self.lora.name}: {problem}")

    def pair(self, left: str, right: str) -> LowRank:
        """Return two factors as matrices, the left one [n, rank], the right one [rank, m]."""
        for here, gone in ((left, right), (right, left)):
            if gone not in self.keys:
                raise self.error(
                    f"{shorten(self.keys.get(here, self.name))} has no partner *{gone}; "
                    "the file is incomplete, get it again"
                )
        if min(self.tensor(left).ndim, self.tensor(right).ndim) >= 2:
            up, down = self.tensor(left).flatten(1), self.tensor(right).flatten(1)
            if up.shape[1] == down.shape[0] > 0:
                return LowRank(up, down)
        raise self.error(
            f"{self.describe(left, right)} do not multiply: the second size of the one must be the "
            "first of the other, at least 1"
        )

    def scale(self, rank: int | None) -> float:
        if rank is None or not self.has(".alpha"):
            return 1.0
        alpha = self.tensor(".alpha")
        if alpha.numel() != 1:
            raise self.error(f"{self.describe('.alpha')} must be a single number")
        return float(alpha.item()) / rank


def _group_by_module(lora: Lora) -> list[_Module]:
    modules: dict[str, _Module] = {}
    for key in lora.tensors:
        refused = next((suffix for suffix in _REFUSED if key.endswith(suffix)), None)
        if refused:
            raise LoraError(
                f"{lora.name}: {shorten(key)} makes this {_REFUSED[refused]}, which is not "
                "supported; use LoRA, LoHa, LoKr, DoRA (.dora_scale), .diff, .diff_b or .set_weight"
            )
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix:
            name = key.removesuffix(suffix)
            modules.setdefault(name, _Module(lora, name, {})).keys[suffix] = key
    return list(modules.values())


# --- Module names -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A tensor of the model, or some of its rows, that a module name means."""

    component: str
    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None
    spellings: frozenset[str]
    """Of the module name: "native", "diffusers" or both."""

    @property
    def target(self) -> tuple[str, str]:
        return self.component, self.tensor


_PREFIX = re.compile(
    r"(?P<text_encoder>text_encoders?(_\d)?_|qwen3_4b_|lora_te\d*_|te\d*_)"
    r"|(?P<network>diffusion_model_|transformer_|unet_|lora_unet_|lora_transformer_)"
    r"|(base_model|model|lycoris)_"
)

# The forms that ComfyUI knows, weakest first: where a file names a place twice, the last counts.
_COMFYUI_FORMS = (
    ("lora_unet_", "native"),
    ("diffusion_model_", "native"),
    ("diffusion_model_", "diffusers"),
    ("transformer_", "diffusers"),
    ("lycoris_", "diffusers"),
    ("text_encoders_qwen3_4b_transformer_model_", "native"),
)


class _NameIndex:
    """Every name of every tensor that a LoRA can change."""

    def __init__(self, targets: Mapping[str, Shapes]) -> None:
        self._places: dict[tuple[str, str], _Place] = {}
        for component in (NETWORK, TEXT_ENCODER):
            shapes = targets.get(component, {})
            others = diffusers_names(component, shapes)
            for tensor, shape in shapes.items():
                self._add_native(component, tensor, tuple(shape), others[tensor])
                self._add_diffusers(component, tensor, tuple(shape), others[tensor])

    def find(self, module: str) -> tuple[_Place, int] | None:
        """Return the place that a module name means and how strong that form of its name is."""
        flat = module.replace(".", "_")
        start, component = 0, ""
        while True:
            for owner in (component,) if component else (NETWORK, TEXT_ENCODER):
                if place := self._places.get((owner, flat[start:])):
                    return place, _strength_of_form(flat[:start], place)
            prefix = _PREFIX.match(flat, start)
            if not prefix:
                return None
            component = component or _owner(prefix)
            start = prefix.end()

    def _add_native(
        self, component: str, tensor: str, shape: tuple[int, ...], others: Sequence[str]
    ) -> None:
        spellings = {"native", "diffusers"} if tensor in others else {"native"}
        place = _Place(component, tensor, shape, None, frozenset(spellings))
        self._places[component, _flat_module(tensor)] = place

    def _add_diffusers(
        self, component: str, tensor: str, shape: tuple[int, ...], others: Sequence[str]
    ) -> None:
        """Parts of a fused tensor (q, k, v) are equal shares of its rows, in order."""
        share = shape[0] // len(others) if shape else 0
        for index, name in enumerate(others):
            if name == tensor:
                continue
            rows = (index * share, (index + 1) * share) if len(others) > 1 else None
            part = (share, *shape[1:]) if rows else shape
            place = _Place(component, tensor, part, rows, frozenset({"diffusers"}))
            flat = _flat_module(name)
            self._places[component, flat] = place
            self._places.setdefault((component, flat.removesuffix("_0")), place)  # to_out.0


def _flat_module(tensor: str) -> str:
    return tensor.removesuffix(".weight").removeprefix("model.").replace(".", "_")


def _owner(prefix: re.Match[str]) -> str:
    return TEXT_ENCODER if prefix["text_encoder"] else NETWORK if prefix["network"] else ""


def _strength_of_form(prefix: str, place: _Place) -> int:
    known = (
        index
        for index, (form, spelling) in enumerate(_COMFYUI_FORMS)
        if form == prefix and spelling in place.spellings
    )
    return max(known, default=-1)


# --- Matching -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LoraMatch:
    """What a LoRA does to a model. Every key of the file is in one of `used`, `inert`, `unused`."""

    patches: Mapping[tuple[str, str], tuple[Patch, ...]]
    """(component, native tensor name) -> its patches in order."""
    used: frozenset[str]
    """Keys that change a weight."""
    inert: frozenset[str]
    """Keys that were understood but change nothing: they belong to a tensor that is never read, or
    stronger keys name the same place."""
    unused: tuple[str, ...]
    """Keys that mean nothing to this model, in file order."""

    @property
    def coverage(self) -> str:
        known = len(self.used) + len(self.inert)
        return f"{known} of {known + len(self.unused)} tensors used"


@dataclass(frozen=True, eq=False)
class _Claim:
    """A patch that a file wants at a place; the claim of the highest precedence gets it."""

    target: tuple[str, str]
    patch: Patch
    precedence: tuple[int, int]
    keys: tuple[str, ...]


# ComfyUI reads patches for these but applies patches to weights and biases of modules only.
_PAD_TOKENS = frozenset({"x_pad_token", "cap_pad_token"})


def match_lora(
    lora: Lora,
    targets: Mapping[str, Shapes],
    inert: Mapping[str, AbstractSet[str]] | None = None,
) -> LoraMatch:
    """Find the tensor of the model that each key of a LoRA is for, and check that it fits there.

    Time is linear in the number of keys plus tensors.

    Args:
        lora: From `read_lora`.
        targets: Component -> native tensor name -> shape, of the complete model.
        inert: Component -> native names among the targets that the model never reads (the text
            encoder's last layer): their keys are understood and dropped.

    Raises:
        LoraError: A kind of LoRA that is not supported, a factor without its partner, or factors
            whose shapes do not fit each other or the weight.
    """
    index = _NameIndex(targets)
    modules = [(module, index.find(module.name)) for module in _group_by_module(lora)]
    silent = {(component, name) for component, names in (inert or {}).items() for name in names}
    silent |= {(NETWORK, name) for name in _PAD_TOKENS}
    known: set[str] = set()
    claims: list[_Claim] = []
    strangers = sum(len(module.keys) for module, found in modules if not found)
    for module, found in modules:
        if not found:
            continue
        place, form = found
        known |= set(module.keys.values())
        if place.target in silent:
            continue
        try:
            claims += _claims(module, place, form)
        except LoraError as error:
            hint = f"; {strangers} more tensors name no module of this model" if strangers else ""
            raise LoraError(f"{error}{hint}") from None
        bias = _bias_of(place, targets)
        if bias:
            claims += _bias_claims(module, bias, form)
        else:
            known -= {module.keys[suffix] for suffix in _BIAS_DIFFERENCES if module.has(suffix)}
    return _settle(lora, claims, known)


def require_match(match: LoraMatch, lora: Lora, *, strict: bool = True) -> None:
    """Refuse a LoRA of which some keys mean nothing to this model and no other key changes it.

    Args:
        match: From `match_lora`.
        lora: The LoRA matched.
        strict: Refuse it also where other keys do change the model.

    Raises:
        LoraError: Names the coverage and the first unused keys.
    """
    if not match.unused or (match.used and not strict):
        return
    reason = (
        "strict=False (--no-strict-lora) applies the rest"
        if match.used
        else "the file is a LoRA for another model, or of no supported form; use one trained for "
        "this model"
    )
    raise LoraError(
        f"{lora.name}: {match.coverage}, first unused: {some_names(match.unused)}; {reason}"
    )


def _settle(lora: Lora, claims: Sequence[_Claim], known: AbstractSet[str]) -> LoraMatch:
    """Give each place to its strongest claim; order whole tensors before slices of them."""
    winners: dict[tuple[tuple[str, str], tuple[int, int] | None], _Claim] = {}
    for claim in sorted(claims, key=lambda claim: claim.precedence):
        winners[claim.target, claim.patch.rows] = claim
    patches: dict[tuple[str, str], tuple[Patch, ...]] = {}
    for claim in sorted(winners.values(), key=lambda claim: claim.patch.rows or (-1, -1)):
        patches[claim.target] = (*patches.get(claim.target, ()), claim.patch)
    used = frozenset(key for claim in winners.values() for key in claim.keys)
    unused = tuple(key for key in lora.tensors if key not in known)
    return LoraMatch(patches, used, frozenset(known) - used, unused)


def _claims(module: _Module, place: _Place, form: int) -> Iterator[_Claim]:
    """Yield what a module's keys want for its weight; of several kinds a later one counts."""
    for kind, build in enumerate((_build_lora, _build_loha, _build_lokr)):
        built = build(module)
        if built:
            update, rank, suffixes = built
            _require_fit(module, update, place, suffixes)
            _require_same_size(module, place)
            magnitude = _magnitude(module, place)
            patch = Patch(update, place.rows, module.scale(rank), magnitude)
            keys = tuple(module.keys[s] for s in (*suffixes, *_SETTINGS) if module.has(s))
            yield _Claim(place.target, patch, (form, kind), keys)
    for kind, suffix in enumerate((*_WEIGHT_DIFFERENCES, ".set_weight"), 3):
        if module.has(suffix):
            yield _whole_claim(module, suffix, place, (form, kind))
    if module.has(".dora_scale") and len(module.keys.keys() - set(_SETTINGS)) == 0:
        raise module.error(
            f"{shorten(module.keys['.dora_scale'])} has no LoRA beside it; the file is incomplete"
        )


def _bias_claims(module: _Module, bias: _Place, form: int) -> Iterator[_Claim]:
    for kind, suffix in enumerate(_BIAS_DIFFERENCES):
        if module.has(suffix):
            yield _whole_claim(module, suffix, bias, (form, kind))


def _whole_claim(
    module: _Module, suffix: str, place: _Place, precedence: tuple[int, int]
) -> _Claim:
    value = module.tensor(suffix)
    update = Replacement(value) if suffix == ".set_weight" else Difference(value)
    _require_fit(module, update, place, (suffix,))
    patch = Patch(update, place.rows)
    return _Claim(place.target, patch, precedence, (module.keys[suffix],))


def _bias_of(place: _Place, targets: Mapping[str, Shapes]) -> _Place | None:
    """Return the bias that stands beside a whole weight, if the model has one."""
    name = place.tensor.removesuffix(".weight") + ".bias"
    shape = targets[place.component].get(name)
    if shape is None or place.rows is not None or not place.tensor.endswith(".weight"):
        return None
    return _Place(place.component, name, tuple(shape), None, place.spellings)


_Built = tuple[LowRank | Hadamard | Kronecker, int | None, tuple[str, ...]]
"""An update, the rank that alpha is divided by (None: no alpha), and the suffixes it is made of."""


def _build_lora(module: _Module) -> _Built | None:
    for pair in _LORA_PAIRS:
        if module.has(*pair):
            update = module.pair(*pair)
            return update, update.down.shape[0], pair
    return None


def _build_loha(module: _Module) -> _Built | None:
    suffixes = tuple(suffix for pair in _LOHA_PAIRS for suffix in pair)
    if not module.has(*suffixes):
        return None
    first, second = (module.pair(*pair) for pair in _LOHA_PAIRS)
    if first.shape != second.shape:
        raise module.error(f"{module.describe(*suffixes)} make two matrices of different shapes")
    return Hadamard(first, second), first.down.shape[0], suffixes


def _build_lokr(module: _Module) -> _Built | None:
    if not module.has(*(suffix for factor in _LOKR_FACTORS for suffix in factor)):
        return None
    factors: list[Tensor | LowRank] = []
    suffixes: tuple[str, ...] = ()
    rank = None
    for whole, left, right in _LOKR_FACTORS:
        if module.has(whole):
            value = module.tensor(whole)
            factors.append(value.reshape(_matrix_shape(value.shape)))
            suffixes += (whole,)
        else:
            factor = module.pair(left, right)
            factors.append(factor)
            suffixes += (left, right)
            rank = factor.down.shape[0]
    return Kronecker(*factors), rank, suffixes


def _require_fit(module: _Module, update: Update, place: _Place, suffixes: Sequence[str]) -> None:
    if update.shape != _matrix_shape(place.shape):
        part = "" if place.rows is None else f" (rows {place.rows[0]} to {place.rows[1] - 1})"
        raise module.error(
            f"{module.describe(*suffixes)} would change a weight of {list(update.shape)}, but "
            f"{place.tensor}{part} is {list(place.shape)}; the LoRA is for another model"
        )


def _require_same_size(module: _Module, place: _Place) -> None:
    """Refuse `.reshape_weight` (a LoRA that makes its layer larger) unless it changes nothing."""
    if not module.has(".reshape_weight"):
        return
    wanted = module.tensor(".reshape_weight").tolist()
    if wanted != list(place.shape):
        raise module.error(
            f"{module.describe('.reshape_weight')} asks for the shape {shorten(str(wanted))}, but "
            f"{place.tensor} is {list(place.shape)} and cannot grow; the LoRA is for another model"
        )


def _magnitude(module: _Module, place: _Place) -> Tensor | None:
    """Return DoRA's m as [rows, 1] or [1, columns]; a square weight takes [n] as rows."""
    if not module.has(".dora_scale"):
        return None
    value = module.tensor(".dora_scale")
    rows, columns = _matrix_shape(place.shape)
    if value.ndim and value.numel() == rows == value.shape[0]:
        return value.reshape(rows, 1)
    if value.ndim and value.numel() == columns and value.shape[0] in (1, columns):
        return value.reshape(1, columns)
    raise module.error(
        f"{module.describe('.dora_scale')} must have one number per row [{rows}, 1] or per column "
        f"[1, {columns}] of {place.tensor}"
    )
