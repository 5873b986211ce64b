"""A bounded collection of captures: keys, order, counters, threads, and running out of memory."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from turbo.compile import CaptureError, Captures, InputError, SignatureError, Wanted

from tests.compile.places import EVERY

Place = tuple[str, str]


def ones(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(*shape, device=device)


@pytest.mark.parametrize("place", EVERY)
def test_a_key_is_captured_once_and_replayed_afterwards(place: Place):
    backend, device = place
    captures = Captures(backend=backend)
    for value in (1.0, 2.0, 3.0):
        x = torch.full((2,), value, device=device)
        assert captures.call("neg", torch.neg, x).tolist() == [-value] * 2
    counters = captures.counters
    assert (counters.captures, counters.misses, counters.replays) == (1, 1, 3)
    assert (counters.evictions, counters.failures, counters.compilations) == (0, 0, 0)


def test_a_key_stands_for_one_kind_of_input():
    captures = Captures(backend="replay")
    captures.call(("stage 1", 32), torch.neg, ones(2))
    with pytest.raises(SignatureError, match=r"\('stage 1', 32\): input 0 is float32\[3\]"):
        captures.call(("stage 1", 32), torch.neg, ones(3))
    captures.call(("stage 1", 64), torch.neg, ones(3))
    assert list(captures) == [("stage 1", 32), ("stage 1", 64)]


@pytest.mark.parametrize("place", EVERY)
def test_the_least_recently_used_capture_is_dropped(place: Place):
    backend, device = place
    captures, x = Captures(backend=backend, limit=2), ones(2, device=device)
    for key in ("a", "b", "a", "c"):
        captures.call(key, torch.neg, x)
    assert list(captures) == ["a", "c"]
    assert "b" not in captures
    assert len(captures) == 2
    counters = captures.counters
    assert (counters.captures, counters.evictions, counters.misses) == (3, 1, 3)
    assert counters.replays == 4  # the dropped one's call is still counted


def test_a_dropped_capture_that_someone_holds_is_refused():
    captures = Captures(backend="replay", limit=1)
    held = captures.capture("a", torch.neg, (ones(2),))
    result = held(ones(2))
    captures.capture("b", torch.neg, (ones(2),))
    with pytest.raises(CaptureError, match="a: this capture was dropped"):
        held(ones(2))
    assert result.tolist() == [-1.0, -1.0]


def test_captures_can_be_dropped_by_hand():
    captures = Captures(backend="replay")
    for key in "abc":
        captures.call(key, torch.neg, ones(2))
    captures.discard("b")
    captures.discard("never there")
    assert list(captures) == ["a", "c"]
    assert captures.get("b") is None
    captures.clear()
    assert len(captures) == 0
    assert captures.counters.replays == 3


def test_warming_up_captures_the_largest_inputs_first():
    captures, seen = Captures(backend="replay"), []
    wanted = [Wanted(n, torch.neg, (ones(n),)) for n in (2, 8, 4)]
    report = captures.warm_up(wanted, on_progress=lambda *step: seen.append(step))
    assert seen == [(8, 0, 3), (4, 1, 3), (2, 2, 3)]
    assert [line.key for line in report] == [8, 4, 2]
    assert [line.buffer_bytes for line in report] == [64, 32, 16]
    assert all(line.seconds > 0 and line.backend == "replay" for line in report)
    captures.warm_up(wanted)
    assert captures.counters.captures == 3


def test_warming_up_more_than_is_kept_is_refused():
    captures = Captures(backend="replay", limit=2)
    with pytest.raises(InputError, match="3 captures wanted, but limit is 2"):
        captures.warm_up([Wanted(n, torch.neg, (ones(n),)) for n in (1, 2, 3)])
    assert captures.counters.captures == 0


def test_warming_up_drops_what_nobody_wanted_first():
    captures = Captures(backend="replay", limit=3)
    for n in (1, 2, 3):
        captures.call(n, torch.neg, ones(n))
    captures.warm_up([Wanted(n, torch.neg, (ones(n),)) for n in (1, 4)])
    assert set(captures) == {1, 3, 4}
    assert (captures.counters.captures, captures.counters.evictions) == (4, 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("place", EVERY)
def test_running_out_of_memory_drops_the_failing_capture_only(place: Place, error: Exception):
    backend, device = place
    captures, x = Captures(backend=backend), ones(2, device=device)
    captures.call("small", torch.neg, x)

    def hungry(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(CaptureError, match=r"^large: memory ran out .* over 8 bytes") as caught:
        captures.call("large", hungry, x)
    assert caught.value.key == "large"
    assert caught.value.needed_bytes == 8
    assert "1 other captures hold" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(captures) == ["small"]
    assert captures.call("small", torch.neg, x).tolist() == [-1.0, -1.0]
    assert captures.call("large", torch.exp, 0 * x).tolist() == [1.0, 1.0]
    assert captures.counters.failures == 1


def test_another_failure_names_the_key_and_no_bytes():
    captures = Captures(backend="replay")
    with pytest.raises(CaptureError, match=r"^reads: .* on the host") as caught:
        captures.call("reads", lambda x: x * x.sum().item(), ones(2))
    assert caught.value.key == "reads"
    assert caught.value.needed_bytes is None


def test_a_failed_capture_makes_no_room():
    captures = Captures(backend="replay", limit=1)
    captures.call("a", torch.neg, ones(2))
    with pytest.raises(CaptureError):
        captures.call("b", lambda x: x + x.sum().item(), ones(2))
    assert list(captures) == ["a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_stepping_down_holds_for_the_whole_collection():
    with pytest.raises(CaptureError, match="no CUDA device"):
        Captures().call("a", torch.neg, ones(2))
    captures = Captures(strict=False)
    captures.call("a", torch.neg, ones(2))
    assert [line.backend for line in captures.report()] == ["replay"]


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match="backend must be one of"):
        Captures(backend="graph")
    with pytest.raises(InputError, match="at least 1 capture, got 0"):
        Captures(limit=0)


@pytest.mark.parametrize("place", EVERY)
def test_threads_may_share_a_collection(place: Place):
    backend, device = place
    captures, failures = Captures(backend=backend, limit=2), []

    def work(seed: int) -> None:
        try:
            for turn in range(30):
                size = 1 + (seed + turn) % 3
                captures.call(size, torch.neg, ones(size, device=device))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counters = captures.counters
    assert counters.replays == 120
    assert counters.captures == counters.misses == counters.evictions + 2
