"""The tests of the kernels, and of the loop that uses them, once more on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED

TESTS = Path(__file__).resolve().parent.parent
FOLDERS = [TESTS / "kernels", TESTS / "turbo" / "kernels"]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_all_kernel_tests_pass_in_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, FOLDERS)],
        cwd=TESTS.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
