"""Prompt text to token ids: Qwen2's byte-level BPE and Z-Image's chat template.

Built with the `tokenizers` library alone; neither torch nor transformers is imported. The meaning
is ComfyUI's: no length limit, no start or end token, no prompt weights (``(word:1.3)`` is text).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from turbo.errors import BadInputError, CheckpointError, TokenizerNotFoundError

PROMPT_PREFIX = "<|im_start|>user\n"
PROMPT_SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PAD_TOKEN = "<|endoftext|>"

# Qwen's split of text into words: https://github.com/QwenLM/Qwen (tokenization note), Apache-2.0.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen's tokens above the BPE vocabulary, ids 151643 to 151668. To a decoder the later ones are not
# "special", which makes no difference to encoding.
_QWEN_VOCABULARY = 151_643
_QWEN_CONTROL_TOKENS = (
    PAD_TOKEN,
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_PAIR_NAMES = ("vocab.json", "merges.txt", "tokenizer_config.json")
_REQUIRED_TOKENS = ("<|im_start|>", "<|im_end|>", PAD_TOKEN)

# What the empty prompt must become with the real vocabulary. Another vocabulary of the same size
# would give plausible ids and a different picture.
_QWEN_EMPTY_PROMPT = [151644, 872, 198, 151645, 198, 151644, 77091, 198]

# ComfyUI keeps an escaped parenthesis as NUL and \1 or \2 for a while, so those pairs become
# parentheses as well.
_ESCAPED_PARENTHESES = (("\\)", ")"), ("\\(", "("), ("\0\1", ")"), ("\0\2", "("))

# ComfyUI starts a new piece of text here and drops the space or newline, embeddings or not.
_EMBEDDING_MARK = re.compile(r"[ \n](?=embedding:)")


class Tokenizer:
    """Maps prompts to the ids that Z-Image's text encoder was trained with.

    Attributes:
        files: The files it was read from.
        pad_id: Id of ``<|endoftext|>``; see `attention_mask`.
        vocabulary_size: Ids are below this; the text encoder needs at least as many embeddings.
    """

    def __init__(self, backend: BackendTokenizer, files: Sequence[Path]) -> None:
        """Wrap a `tokenizers` pipeline that knows Qwen's control tokens; see `from_path`."""
        self.files = tuple(files)
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        control = _control_ids(backend, self.files[0])
        self.pad_id = control[PAD_TOKEN]
        self.vocabulary_size = max(
            backend.get_vocab_size(with_added_tokens=True), 1 + max(control.values())
        )
        self._suffix = self.encode(PROMPT_SUFFIX)
        _require_known_ids(self)

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer from a folder, or from one of its files.

        Args:
            path: Folder with ``vocab.json`` and ``merges.txt`` (and ``tokenizer_config.json``,
                whose added tokens are then used) or with ``tokenizer.json``; or one of the files.

        Raises:
            TokenizerNotFoundError: The files are not there.
            CheckpointError: A file is damaged or belongs to another model.
        """
        path = Path(path)
        if path.is_dir() or path.name in _PAIR_NAMES:
            folder = path if path.is_dir() else path.parent
            vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
            if vocabulary.is_file() and merges.is_file():
                return cls(_read_pair(vocabulary, merges), (vocabulary, merges))
        whole = path / "tokenizer.json" if path.is_dir() else path
        if whole.suffix == ".json" and whole.name not in _PAIR_NAMES and whole.is_file():
            return cls(_read_whole(whole), (whole,))
        raise TokenizerNotFoundError(
            f"no tokenizer at {path}: give a folder with vocab.json and merges.txt (and "
            "tokenizer_config.json), or with tokenizer.json"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: no template; control tokens in it become control ids.

        Raises:
            BadInputError: The text holds a lone surrogate, which no encoding can express.
        """
        _require_text(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompt(self, prompt: str, *, max_tokens: int | None = None) -> list[int]:
        r"""Ids of a prompt inside the chat template.

        ``\(`` and ``\)`` mean plain parentheses. Control tokens written in the prompt, such as
        ``<|im_end|>``, act as control tokens, as in every tool that runs this model. An empty
        prompt is the template alone (8 tokens with the real vocabulary).

        Args:
            prompt: Any text; only lone surrogates are refused.
            max_tokens: Cut the end of the prompt so that no more ids come out, the template's own
                included; its end is always kept. None: no limit.

        Raises:
            BadInputError: A lone surrogate, or `max_tokens` has no room for the template.
        """
        _require_text(prompt)
        for escaped, plain in _ESCAPED_PARENTHESES:
            prompt = prompt.replace(escaped, plain)
        pieces = _EMBEDDING_MARK.split(PROMPT_PREFIX + prompt + PROMPT_SUFFIX)
        ids = [token for piece in pieces for token in self.encode(piece)]
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        least = len(self.encode(PROMPT_PREFIX)) + len(self._suffix)
        if max_tokens < least:
            raise BadInputError(
                f"max_tokens must be at least {least}, the length of the chat template, "
                f"got {max_tokens}"
            )
        return ids[: max_tokens - len(self._suffix)] + self._suffix


def attention_mask(ids: Sequence[int], pad_id: int) -> list[int]:
    """1 for every token before the first pad token, 0 from there on.

    Only a prompt that spells out ``<|endoftext|>`` has zeros: nothing else makes a pad token here.
    """
    visible = ids.index(pad_id) if pad_id in ids else len(ids)
    return [1] * visible + [0] * (len(ids) - visible)


def _require_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"the prompt holds a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}, which is not text; remove it"
        ) from None


def _read_pair(vocabulary: Path, merges: Path) -> BackendTokenizer:
    try:
        model = BPE.from_file(str(vocabulary), str(merges))
        text = merges.read_bytes().strip(b"\n")
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(
            f"cannot read the tokenizer files {vocabulary} and {merges.name}: {_one_line(error)}; "
            "the files are damaged or of another tokenizer"
        ) from None
    merge_count = text.count(b"\n") + 1 - text.startswith(b"#version")
    backend = BackendTokenizer(model)
    backend.normalizer = NFC()
    backend.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(WORDS), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    _require_bytes(backend, vocabulary)
    config = vocabulary.with_name("tokenizer_config.json")
    added = _read_added_tokens(config) if config.is_file() else {}
    added = added or _usual_control_tokens(backend)
    _require_all_merges(backend, merge_count, added, vocabulary, merges)
    _add_tokens(backend, added, config)
    return backend


def _read_whole(path: Path) -> BackendTokenizer:
    try:
        backend = BackendTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise CheckpointError(
            f"cannot read the tokenizer file {path}: {_one_line(error)}; the file is damaged"
        ) from None
    _require_bytes(backend, path)
    return backend


def _read_added_tokens(path: Path) -> dict[int, AddedToken]:
    """Added tokens of a tokenizer_config.json, by id."""
    try:
        config = json.loads(path.read_bytes())
        entries: Mapping[str, Mapping[str, Any]] = config.get("added_tokens_decoder", {})
        return {
            int(token_id): AddedToken(
                str(entry["content"]),
                single_word=bool(entry.get("single_word", False)),
                lstrip=bool(entry.get("lstrip", False)),
                rstrip=bool(entry.get("rstrip", False)),
                normalized=bool(entry.get("normalized", False)),
                special=bool(entry.get("special", False)),
            )
            for token_id, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot read the added tokens of {path}: {_one_line(error)}; the file is damaged"
        ) from None


def _usual_control_tokens(backend: BackendTokenizer) -> dict[int, AddedToken]:
    """Qwen's own list, for a folder without one: above Qwen's vocabulary, or as far as a smaller
    vocabulary names them."""
    size = backend.get_vocab_size(with_added_tokens=False)
    usual: dict[int, AddedToken] = {}
    for offset, name in enumerate(_QWEN_CONTROL_TOKENS):
        token_id = size + offset if size == _QWEN_VOCABULARY else backend.token_to_id(name)
        if token_id is not None:
            usual[token_id] = AddedToken(name, normalized=False, special=True)
    return usual


def _add_tokens(backend: BackendTokenizer, added: dict[int, AddedToken], config: Path) -> None:
    for token_id, token in sorted(added.items(), key=lambda item: item[0]):
        backend.add_tokens([token])  # takes the vocabulary's id, or the next free one
        given = backend.token_to_id(token.content)
        if given != token_id:
            raise CheckpointError(
                f"{config} gives {token.content} the id {token_id}, but with the vocab.json beside "
                f"it the id is {given}: the files are not of one tokenizer"
            )


def _require_all_merges(
    backend: BackendTokenizer,
    merge_count: int,
    added: dict[int, AddedToken],
    vocabulary: Path,
    merges: Path,
) -> None:
    """A cut off merges.txt still reads, and then tokenizes differently: compare the two files."""
    unmerged = {token.content for token in added.values()} | set(ByteLevel.alphabet())
    inside = sum(backend.token_to_id(token) is not None for token in unmerged)
    merged = backend.get_vocab_size(with_added_tokens=False) - inside
    if merge_count < merged:
        raise CheckpointError(
            f"{merges} has {merge_count} merges but {vocabulary.name} has {merged} merged tokens: "
            "it is cut off or of another tokenizer"
        )


def _require_bytes(backend: BackendTokenizer, file: Path) -> None:
    if any(backend.token_to_id(char) is None for char in ByteLevel.alphabet()):
        raise CheckpointError(
            f"the tokenizer {file} lacks some of the 256 byte tokens: it is not Qwen's"
        )


def _control_ids(backend: BackendTokenizer, file: Path) -> dict[str, int]:
    """Ids of the added tokens by name; the ones that the template needs are among them."""
    ids = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}
    missing = [token for token in _REQUIRED_TOKENS if token not in ids]
    if missing:
        raise CheckpointError(
            f"the tokenizer {file} lacks the control tokens {' '.join(missing)}: it is not Qwen's; "
            "if it is, put its tokenizer_config.json beside it"
        )
    return ids


def _require_known_ids(tokenizer: Tokenizer) -> None:
    if tokenizer._backend.get_vocab_size(with_added_tokens=False) != _QWEN_VOCABULARY:
        return  # a small model's own vocabulary
    ids = tokenizer.encode_prompt("")
    if ids != _QWEN_EMPTY_PROMPT:
        raise CheckpointError(
            f"the tokenizer {tokenizer.files[0]} has Qwen's size but not its ids: the empty prompt "
            f"must become {_QWEN_EMPTY_PROMPT}, got {ids}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
