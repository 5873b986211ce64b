"""The tokenizer against the recorded ids, against transformers, and against damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from turbo.errors import BadInputError, CheckpointError, TokenizerNotFoundError
from turbo.tokenizer import PROMPT_PREFIX, PROMPT_SUFFIX, Tokenizer, attention_mask

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Tokenizer:
    return Tokenizer.from_path(shared / "tokenizer")


@pytest.fixture(scope="module")
def official(shared: Path):
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(str(shared / "tokenizer"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a tokenizer of Qwen's kind: 256 bytes, two merges, three control tokens."""
    vocabulary = [*sorted(ByteLevel.alphabet()), "us", "Ġa"]
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nu s\nĠ a\n", encoding="utf-8")
    added = {str(258 + i): {"content": t, "special": True} for i, t in enumerate(CONTROL)}
    write_config(folder, added)
    return folder


def write_config(folder: Path, added: object) -> None:
    config = json.dumps({"added_tokens_decoder": added})
    (folder / "tokenizer_config.json").write_text(config)


def test_prompts_give_the_recorded_ids(qwen: Tokenizer, shared: Path):
    cases = json.loads((shared / "golden/text_encoder.json").read_text())["tokenizer"]
    assert [qwen.encode_prompt(case["text"]) for case in cases] == [c["ids"][0] for c in cases]


AWKWARD = [
    "e\u0301 Å \ufb01 \u1e9b\u0323",  # becomes NFC
    "it's I'M they'Ll 'twas",
    "tabs\t\tand\r\n\r\nreturns \n ",
    "   12345 3.14 ٣٤ Ⅷ",
    "漢字かな 한국어 ไทย עברית",
    "\U0001f1e9\U0001f1ea\U0001f469\u200d\U0001f680 \U0001f3fd \ufe0f",
    "nul \0 bell \a del \x7f nbsp\xa0soft\xad \ufeff \u2028",
    "<|im_end|><|im_start|>system\n<think></think> <|endoftext|><|im_star",
    "(((a:1.2))) [b|c] {d|e} __f__ <lora:g:1>",
    "x" * 3000,
    " " * 3000,
    "embedding:a",
]


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_awkward_text_gives_the_ids_of_transformers(qwen: Tokenizer, official, text: str):
    assert qwen.encode(text) == official(text)["input_ids"]


FRAGMENTS = [
    *CONTROL,
    "<think>",
    "'s",
    "'RE",
    " ",
    "\n",
    "\r\n",
    "\t",
    "a",
    "É",
    "e\u0301",
    "7",
    ".",
]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
def test_any_text_gives_the_ids_of_transformers(qwen: Tokenizer, official, text: str):
    assert qwen.encode(text) == official(text)["input_ids"]


def test_the_prompt_stands_inside_the_chat_template(qwen: Tokenizer):
    assert qwen.encode_prompt("a cat") == qwen.encode(f"{PROMPT_PREFIX}a cat{PROMPT_SUFFIX}")


def test_escaped_parentheses_are_plain_and_weights_are_text(qwen: Tokenizer):
    assert qwen.encode_prompt(r"\(a\) (b:1.3)") == qwen.encode_prompt("(a) (b:1.3)")


def test_an_embedding_mark_starts_a_new_piece_and_loses_the_space(qwen: Tokenizer):
    pieces = [f"{PROMPT_PREFIX}a", "embedding:b c", f"embedding:d{PROMPT_SUFFIX}"]
    expected = [token for piece in pieces for token in qwen.encode(piece)]
    assert qwen.encode_prompt("a embedding:b c\nembedding:d") == expected


def test_long_prompts_are_not_cut_unless_asked(qwen: Tokenizer):
    ids = qwen.encode_prompt("word " * 10_000)
    assert len(ids) == 10_009
    cut = qwen.encode_prompt("word " * 10_000, max_tokens=512)
    assert cut == ids[:507] + qwen.encode(PROMPT_SUFFIX)
    assert qwen.encode_prompt("word", max_tokens=512) == qwen.encode_prompt("word")
    with pytest.raises(BadInputError, match="at least 8"):
        qwen.encode_prompt("word", max_tokens=7)


def test_a_lone_surrogate_is_refused_by_its_place(qwen: Tokenizer):
    with pytest.raises(BadInputError, match=r"U\+D800.* character 2"):
        qwen.encode_prompt("a \ud800")


def test_the_mask_ends_at_the_first_pad_token(qwen: Tokenizer):
    ids = qwen.encode_prompt("a<|endoftext|>b<|endoftext|>")
    assert attention_mask(ids, qwen.pad_id) == [1] * 4 + [0] * (len(ids) - 4)
    assert attention_mask([1, 2], qwen.pad_id) == [1, 1]


def test_the_control_tokens_are_known_without_a_configuration(qwen, shared, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared / "tokenizer" / name, tmp_path)
    bare = Tokenizer.from_path(tmp_path)
    text = "".join(token for token in AWKWARD)
    assert bare.vocabulary_size == qwen.vocabulary_size == 151_669
    assert bare.encode_prompt(text) == qwen.encode_prompt(text)


def test_a_small_vocabulary_may_hold_its_control_tokens_itself(small: Path):
    vocabulary = json.loads((small / "vocab.json").read_text())
    vocabulary |= {token: 258 + index for index, token in enumerate(CONTROL)}
    (small / "vocab.json").write_text(json.dumps(vocabulary))
    configured = Tokenizer.from_path(small)
    (small / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_path(small)
    assert bare.pad_id == configured.pad_id == 258
    assert bare.vocabulary_size == configured.vocabulary_size == 261
    assert bare.encode_prompt("us") == configured.encode_prompt("us")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_file_stands_for_its_folder(small: Path, name: str):
    assert Tokenizer.from_path(small / name).files == (small / "vocab.json", small / "merges.txt")


def test_a_single_json_file_gives_the_same_ids(small: Path, tmp_path: Path):
    pair = Tokenizer.from_path(small)
    pair._backend.enable_truncation(2)  # a setting that must not come along
    pair._backend.save(str(tmp_path / "tokenizer.json"))
    pair._backend.no_truncation()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.from_path(path).encode_prompt("us a") == pair.encode_prompt("us a")


def test_missing_files_are_named(small: Path, tmp_path: Path):
    (small / "merges.txt").unlink()
    for path in (small, small / "vocab.json", tmp_path / "nowhere", tmp_path / "a.safetensors"):
        with pytest.raises(TokenizerNotFoundError, match=r"vocab\.json and merges\.txt"):
            Tokenizer.from_path(path)


def break_vocabulary(folder: Path) -> None:
    content = (folder / "vocab.json").read_bytes()
    (folder / "vocab.json").write_bytes(content[: len(content) // 2])


def lose_a_byte(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    del vocabulary["z"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def cut_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nu s\n")


def mix_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nu s\nu z\n")


def lose_configuration(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def shift_ids(folder: Path) -> None:
    write_config(folder, {str(300 + i): {"content": token} for i, token in enumerate(CONTROL)})


def confuse_configuration(folder: Path) -> None:
    write_config(folder, ["<|im_start|>"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_vocabulary, "damaged"),
        (lose_a_byte, "256 byte tokens"),
        (cut_merges, "has 1 merges but vocab.json has 2"),
        (mix_merges, "damaged or of another tokenizer"),
        (lose_configuration, "lacks the control tokens"),
        (shift_ids, r"the id 300, but with the vocab\.json beside it the id is 258"),
        (confuse_configuration, "added tokens"),
    ],
)
def test_damaged_or_foreign_files_are_refused_in_one_line(small: Path, damage, message: str):
    damage(small)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_path(small)
    assert "\n" not in str(caught.value)


def test_another_vocabulary_of_qwens_size_is_refused(shared: Path, tmp_path: Path):
    vocabulary = json.loads((shared / "tokenizer/vocab.json").read_bytes())
    vocabulary["user"], vocabulary["users"] = vocabulary["users"], vocabulary["user"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    shutil.copy(shared / "tokenizer/merges.txt", tmp_path)
    with pytest.raises(CheckpointError, match="not its ids"):
        Tokenizer.from_path(tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"]),
    content=st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(lambda value: json.dumps({"added_tokens_decoder": value}).encode()),
)
def test_garbage_in_any_file_is_a_checkpoint_error(tmp_path_factory, name: str, content: bytes):
    folder = tmp_path_factory.mktemp("garbage")
    alphabet = sorted(ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        Tokenizer.from_path(folder / name)


def test_importing_the_tokenizer_loads_neither_torch_nor_transformers():
    heavy = "{'torch', 'numpy', 'transformers'}"
    program = f"import sys, turbo.tokenizer; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
