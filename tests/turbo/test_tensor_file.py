"""Files that are written tensor by tensor hold what was announced, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from turbo.tensor_file import Outline, write_streamed

OUTLINE: Outline = {"a": (torch.float32, (2, 3)), "b": (torch.bfloat16, (4,))}
TENSORS = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}


def test_what_was_announced_is_written(tmp_path: Path):
    write_streamed(tmp_path / "f", OUTLINE, reversed(TENSORS.items()))
    read = load_file(tmp_path / "f")
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": TENSORS["a"]}, "1 tensors never came, such as b"),
        (TENSORS | {"b": torch.zeros(5, dtype=torch.bfloat16)}, r"b is torch.bfloat16 of \[5\]"),
        (TENSORS | {"b": torch.zeros(4)}, r"b is torch.float32 of \[4\]"),
        (TENSORS | {"c": torch.zeros(4)}, "c is torch.float32 .* announced is None of"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, given: dict[str, torch.Tensor], says: str):
    with pytest.raises(ValueError, match=says):
        write_streamed(tmp_path / "f", OUTLINE, given.items())


def test_a_type_without_a_name_in_files_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="a: no file holds"):
        write_streamed(tmp_path / "f", {"a": (torch.complex64, (1,))}, [])
