"""The same places and arithmetic as for the kernels' own tests."""

from __future__ import annotations

from tests.kernels.conftest import (
    arithmetic_of_a_gpu,
    chosen_fusion,
    poisoned_memory,
    pytest_generate_tests,
)

__all__ = ["arithmetic_of_a_gpu", "chosen_fusion", "poisoned_memory", "pytest_generate_tests"]
