"""The contract of a captured callable: copy in, run, read out, and never another kind of input."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from turbo.compile import CaptureError, GraphPool, InputError, SignatureError, capture

from tests.compile.places import EVERY, WITH_BUFFERS, needs_cuda

Place = tuple[str, str]


def double_and_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x + y, x.sum()


def ones(*shape: int, device: str = "cpu") -> Tensor:
    return torch.ones(*shape, device=device)


# Running.


@pytest.mark.parametrize("place", EVERY)
def test_a_captured_callable_gives_what_the_callable_gives(place: Place):
    backend, device = place
    captured = capture(double_and_sum, (ones(2, 3, device=device),) * 2, backend=backend)
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(2, 2, 3, device=device)
        for result, expected in zip(captured(x, y), double_and_sum(x, y)):
            assert torch.equal(result, expected)
    assert captured.calls == 3
    assert captured.backend == backend


@pytest.mark.parametrize("place", EVERY)
def test_one_tensor_comes_back_as_one_tensor(place: Place):
    backend, device = place
    captured = capture(torch.exp, (ones(3, device=device),), backend=backend)
    assert torch.equal(captured(torch.zeros(3, device=device)), ones(3, device=device))


@pytest.mark.parametrize("place", WITH_BUFFERS)
def test_the_next_call_overwrites_the_outputs(place: Place):
    backend, device = place
    captured = capture(torch.neg, (ones(3, device=device),), backend=backend)
    first = captured(ones(3, device=device))
    kept, second = first.clone(), captured(5 * ones(3, device=device))
    assert second.data_ptr() == first.data_ptr()
    assert first.tolist() == [-5.0] * 3
    assert kept.tolist() == [-1.0] * 3


@pytest.mark.parametrize("place", EVERY)
def test_fresh_results_last(place: Place):
    backend, device = place
    captured = capture(double_and_sum, (ones(2, device=device),) * 2, backend=backend)
    first, _ = captured.fresh(ones(2, device=device), ones(2, device=device))
    captured(torch.zeros(2, device=device), torch.zeros(2, device=device))
    assert first.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("place", WITH_BUFFERS)
def test_a_result_may_be_the_next_input(place: Place):
    backend, device = place
    captured = capture(lambda x: 2 * x, (ones(2, device=device),), backend=backend)
    x = ones(2, device=device)
    for _ in range(3):
        x = captured(x)
    assert x.tolist() == [8.0, 8.0]


@pytest.mark.parametrize("place", EVERY)
def test_the_caller_keeps_its_tensors(place: Place):
    backend, device = place
    x = ones(3, device=device)
    captured = capture(torch.Tensor.neg, (x,), backend=backend)
    captured(x).add_(1)
    assert x.tolist() == [1.0] * 3


@pytest.mark.parametrize("place", EVERY)
def test_weights_may_change_in_place(place: Place):
    backend, device = place
    weight = ones(2, 2, device=device)
    captured = capture(lambda x: x @ weight, (ones(1, 2, device=device),), backend=backend)
    weight.mul_(10)
    assert captured(ones(1, 2, device=device)).tolist() == [[20.0, 20.0]]


@pytest.mark.parametrize("place", WITH_BUFFERS)
def test_a_caller_may_write_into_the_buffers_and_replay(place: Place):
    backend, device = place
    captured = capture(torch.neg, (ones(2, device=device),), backend=backend)
    captured.inputs[0].fill_(7)
    assert captured.replay().tolist() == [-7.0, -7.0]


def test_eager_has_no_buffers_to_replay():
    captured = capture(torch.neg, (ones(2),), backend="eager")
    assert captured.inputs == ()
    assert captured.buffer_bytes == 0
    with pytest.raises(CaptureError, match="has no buffers"):
        captured.replay()


@pytest.mark.parametrize("place", WITH_BUFFERS)
def test_buffers_work_inside_and_outside_inference_mode(place: Place):
    backend, device = place
    with torch.inference_mode():
        captured = capture(torch.neg, (ones(2, device=device),), backend=backend)
        captured(ones(2, device=device))
    captured(2 * ones(2, device=device)).add_(1)
    with torch.inference_mode():
        assert captured(ones(2, device=device)).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("place", EVERY)
def test_nothing_is_recorded_for_gradients(place: Place):
    backend, device = place
    x = ones(2, device=device).requires_grad_()
    captured = capture(torch.neg, (x,), backend=backend)
    assert not captured(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_any_dtype_goes_through_the_buffers(dtype: torch.dtype):
    captured = capture(torch.clone, (torch.zeros(3, dtype=dtype),), backend="replay")
    x = torch.tensor([0, 1, 1], dtype=dtype)
    assert torch.equal(captured(x), x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)])
def test_any_shape_goes_through_the_buffers(shape: tuple[int, ...]):
    captured = capture(torch.neg, (torch.ones(shape),), backend="replay")
    assert captured(torch.ones(shape)).shape == shape


# Refusing.

WRONG = {
    "shape": (lambda x: x[:, :2].contiguous(), r"input 1 is float32\[2, 2\].*float32\[2, 3\]"),
    "dimensions": (lambda x: x[None], r"input 1 is float32\[1, 2, 3\]"),
    "dtype": (lambda x: x.double(), "input 1 is float64"),
    "device": (lambda x: x.to("meta"), "input 1 is float32.* on meta, made for .* on c"),
    "strides": (lambda x: x.t().contiguous().t(), r"with strides \(1, 2\)"),
    "type": (lambda x: 1.5, r"input 1 is 1\.5, made for float32"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("place", EVERY)
def test_another_kind_of_input_is_refused(place: Place, wrong: str):
    backend, device = place
    change, message = WRONG[wrong]
    x = ones(2, 3, device=device)
    captured = capture(double_and_sum, (x, x), backend=backend, name="stage 1")
    with pytest.raises(SignatureError, match=f"^stage 1: .*{message}"):
        captured(x, change(x))
    assert captured.calls == 0


@pytest.mark.parametrize("place", EVERY)
def test_another_number_of_inputs_is_refused(place: Place):
    backend, device = place
    x = ones(2, device=device)
    captured = capture(double_and_sum, (x, x), backend=backend)
    with pytest.raises(SignatureError, match=r"made for 2 inputs \(float32\[2\] .*given 1:"):
        captured(x)


def test_layouts_are_told_apart_by_class_not_by_strides_that_say_nothing():
    x = torch.ones(1, 2, 3, 4)
    captured = capture(torch.neg, (x,), backend="replay")
    captured(torch.ones(2, 1, 3, 4).transpose(0, 1))  # contiguous for a size of 1
    with pytest.raises(SignatureError, match=r"input 0 is .*, channels_last, made for"):
        captured(x.to(memory_format=torch.channels_last))
    last = capture(torch.neg, (x.to(memory_format=torch.channels_last),), backend="replay")
    assert last(x.to(memory_format=torch.channels_last)).shape == x.shape
    with pytest.raises(SignatureError, match=r"made for .*, channels_last"):
        last(x)


def test_a_buffer_cannot_repeat_its_memory():
    with pytest.raises(InputError, match=r"input 0 repeats its memory .*contiguous"):
        capture(torch.neg, (torch.ones(1).expand(4),), backend="replay")


@pytest.mark.parametrize(
    ("value", "said"), [({"x": 1}, "dict"), ([1], "list"), ((), "tuple"), (None, "NoneType")]
)
def test_results_must_be_tensors(value: Any, said: str):
    with pytest.raises(InputError, match=f"tuple of tensors, it returned {said}"):
        capture(lambda x: value, (ones(2),), backend="replay")


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match="one of cuda-graph, replay, eager, got 'graph'"):
        capture(torch.neg, (ones(2),), backend="graph")
    with pytest.raises(InputError, match="warmup must be 0 or more runs, got -1"):
        capture(torch.neg, (ones(2),), backend="replay", warmup=-1)
    not_tensors: Any = [2.0]
    with pytest.raises(InputError, match="example inputs must be tensors"):
        capture(torch.neg, not_tensors, backend="replay")


# Inputs that keep their address.


@pytest.mark.parametrize("place", WITH_BUFFERS)
def test_a_static_input_is_read_where_it_lies(place: Place):
    backend, device = place
    x, features = ones(2, device=device), ones(2, device=device)
    captured = capture(double_and_sum, (x, features), backend=backend, static=(1,))
    assert captured.inputs[1] is features
    features.fill_(10)
    assert captured(x, features)[0].tolist() == [12.0, 12.0]


@pytest.mark.parametrize("place", EVERY)
def test_another_address_of_a_static_input_is_refused(place: Place):
    backend, device = place
    x = ones(2, device=device)
    captured = capture(double_and_sum, (x, x.clone()), backend=backend, static=(1,))
    with pytest.raises(SignatureError, match=r"input 1 .* is static at address 0x.*copy_"):
        captured(x, x.clone())


@pytest.mark.parametrize("position", [2, -1])
def test_static_must_name_an_input(position: int):
    with pytest.raises(InputError, match=f"static names input {position}"):
        capture(double_and_sum, (ones(2), ones(2)), backend="replay", static=(position,))


# What a graph cannot do, the replay backend refuses, too.


def test_a_callable_may_not_change_what_it_returns():
    lengths = iter([3, 3, 2])
    captured = capture(lambda x: x[: next(lengths)], (ones(3),), backend="replay")
    with pytest.raises(CaptureError, match=r"returned \(float32\[2\].*but \(float32\[3\]"):
        captured(ones(3))


READS = {
    "item": lambda x: x * x.sum().item(),
    "branch": lambda x: x if x.sum() > 0 else -x,
    "mask": lambda x: x[x > 0],
    "mask write": lambda x: x.clone().index_put_((x > 0,), x),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: x + torch.equal(x, x),
    "repeats": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("place", WITH_BUFFERS)
def test_reading_a_value_on_the_host_is_refused(place: Place, read: str):
    backend, device = place
    with pytest.raises(CaptureError, match=r"on the host.*a graph cannot do that"):
        capture(READS[read], (ones(3, device=device),), backend=backend, name=read)


@pytest.mark.parametrize("place", WITH_BUFFERS)
def test_what_needs_no_value_on_the_host_is_allowed(place: Place):
    backend, device = place

    def fn(x: Tensor) -> Tensor:
        x = torch.where(x > 0, x, -x).masked_fill(x > 5, 0)
        x[x < 0] = 1.0  # one value: a masked fill
        return x.repeat_interleave(2, dim=0)[torch.arange(2, device=x.device)]

    captured = capture(fn, (ones(3, device=device),), backend=backend)
    assert captured(-ones(3, device=device)).tolist() == [1.0, 1.0]


def test_host_reads_can_be_allowed():
    captured = capture(READS["item"], (ones(3),), backend="replay", allow_host_reads=True)
    assert captured(2 * ones(3)).tolist() == [12.0] * 3


def test_poison_shows_results_that_were_not_cloned():
    captured = capture(
        lambda x: (x + 1, x.long(), x > 0), (ones(2),), backend="replay", poison=True
    )
    real, whole, truth = captured(ones(2))
    again = captured(ones(2))
    assert real.isnan().all()
    assert whole.tolist() == [2**63 - 1] * 2
    assert not truth.any()
    assert again[0].tolist() == [2.0, 2.0]


def test_poison_leaves_a_result_that_is_the_next_input():
    captured = capture(lambda x: 2 * x, (ones(2),), backend="replay", poison=True)
    assert captured(captured(ones(2))).tolist() == [4.0, 4.0]


# Failing and stepping down.


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_graph_without_a_cuda_device_is_an_error():
    with pytest.raises(CaptureError, match=r'no CUDA device.*backend="replay"'):
        capture(torch.neg, (ones(2),), backend="cuda-graph")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_stepping_down_is_logged_in_one_line(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        captured = capture(torch.neg, (ones(2),), backend="cuda-graph", strict=False, name="stage")
    assert captured.backend == "replay"
    assert captured(ones(2)).tolist() == [-1.0, -1.0]
    (record,) = caplog.records
    assert record.message.startswith("stage: this process has no CUDA device")
    assert record.message.endswith("; replay is used instead")
    assert "\n" not in record.message


def test_a_callable_that_cannot_be_captured_can_run_eagerly(caplog: pytest.LogCaptureFixture):
    captured = capture(READS["item"], (ones(2),), backend="replay", strict=False)
    assert captured.backend == "eager"
    assert captured(ones(2)).tolist() == [2.0, 2.0]
    assert "eager is used instead" in caplog.text


def test_the_callable_s_own_error_is_in_the_message():
    def fails(x: Tensor) -> Tensor:
        raise ZeroDivisionError("first line\nsecond line")

    with pytest.raises(CaptureError, match=r"^fails: cannot be captured: first line$") as caught:
        capture(fails, (ones(2),), backend="replay", strict=False, name="fails")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_in_a_call_leaves_the_capture_usable():
    fails = False

    def fn(x: Tensor) -> Tensor:
        if fails:
            raise ZeroDivisionError
        return x + 1

    captured = capture(fn, (ones(2),), backend="replay")
    fails = True
    with pytest.raises(ZeroDivisionError):
        captured(ones(2))
    fails = False
    assert captured(ones(2)).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("place", EVERY)
def test_a_closed_capture_is_refused_and_its_results_stay(place: Place):
    backend, device = place
    captured = capture(torch.neg, (ones(2, device=device),), backend=backend)
    result = captured(ones(2, device=device))
    captured.close()
    captured.close()
    assert result.tolist() == [-1.0, -1.0]
    with pytest.raises(CaptureError, match="was dropped; capture it again"):
        captured(ones(2, device=device))


# Counting and threads.


def test_bytes_of_buffers_are_counted_once_and_without_the_caller_s():
    captured = capture(double_and_sum, (ones(4), ones(4)), backend="replay", static=(1,))
    assert captured.buffer_bytes == 16 + 16 + 4
    assert captured.pool_bytes == 0


def test_the_callable_runs_as_often_as_asked_before_the_first_call():
    runs = 0

    def fn(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return x + 1

    capture(fn, (ones(2),), backend="replay", warmup=3, allow_host_reads=True)
    assert runs == 3
    capture(fn, (ones(2),), backend="replay", warmup=3)
    assert runs == 3 + 4  # and once to look for host reads
    capture(fn, (ones(2),), backend="eager", warmup=0)
    assert runs == 7


@pytest.mark.parametrize("place", EVERY)
def test_threads_get_their_own_fresh_results(place: Place):
    backend, device = place
    captured = capture(double_and_sum, (ones(64, device=device),) * 2, backend=backend)
    wrong: list[float] = []

    def work(value: float) -> None:
        x = torch.full((64,), value, device=device)
        for _ in range(50):
            result, total = captured.fresh(x, x)
            if not (result.eq(3 * value).all() and total.item() == 64 * value):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert captured.calls == 200


def test_a_pool_may_be_shared():
    pool = GraphPool()
    first = capture(torch.neg, (ones(2),), backend="replay", pool=pool)
    second = capture(lambda x: first(x) * 2, (ones(2),), backend="replay", pool=pool)
    assert second(ones(2)).tolist() == [-2.0, -2.0]


# Only where there is a CUDA device.


@pytest.mark.parametrize("stream", ["default", "side"])
@pytest.mark.parametrize("place", [pytest.param(("cuda-graph", "cuda"), marks=needs_cuda)])
def test_calls_from_two_streams_follow_one_another(place: Place, stream: str):
    x = torch.randn(512, 512, device="cuda")
    captured = capture(lambda x: x @ x @ x @ x, (x,))
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    results = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2 if stream == "side" else 0]):
            results.append(captured.fresh(x * turn))
    torch.cuda.synchronize()
    for turn, result in enumerate(results):
        y = x * turn
        torch.testing.assert_close(result, y @ y @ y @ y)


@pytest.mark.parametrize("place", [pytest.param("cuda-graph", marks=needs_cuda)])
def test_graphs_of_one_pool_keep_each_other_s_results(place: str):
    pool, x = GraphPool(), torch.randn(256, 256, device="cuda")
    graphs = [
        capture(lambda x, n=n: (x * n) @ x + n, (x,), pool=pool, name=str(n)) for n in range(4)
    ]
    results = [graph(x) for graph in graphs]
    for n, result in reversed(list(enumerate(results))):
        torch.testing.assert_close(result, (x * n) @ x + n)


@pytest.mark.parametrize("place", [pytest.param("cuda-graph", marks=needs_cuda)])
def test_a_recording_that_fails_leaves_earlier_graphs_usable(place: str):
    pool, x = GraphPool(), torch.ones(4, device="cuda")
    good = capture(torch.neg, (x,), pool=pool)

    def fails(x: Tensor) -> Tensor:
        y = x + 1  # of a graph without any work PyTorch warns
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while recording")
        return y

    with pytest.raises(CaptureError, match="not while recording"):
        capture(fails, (x,), pool=pool)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert good(x).tolist() == [-1.0] * 4
    assert capture(torch.exp, (x,), pool=pool)(0 * x).tolist() == [1.0] * 4


@pytest.mark.parametrize("place", [pytest.param("cuda-graph", marks=needs_cuda)])
def test_memory_that_runs_out_is_given_back(place: str):
    pool, x = GraphPool(), torch.ones(4, device="cuda")
    good = capture(torch.neg, (x,), pool=pool)
    before = torch.cuda.memory_reserved()

    def hungry(x: Tensor) -> Tensor:
        _, total = torch.cuda.mem_get_info()
        held = [torch.empty(total // 4, dtype=torch.uint8, device="cuda") for _ in range(6)]
        return x + held[0][0]

    with pytest.raises(
        CaptureError, match="memory ran out while capturing over 16 bytes"
    ) as caught:
        capture(hungry, (x,), pool=pool)
    assert caught.value.needed_bytes == 16
    assert torch.cuda.memory_reserved() <= before + 2**21
    assert good(x).tolist() == [-1.0] * 4


@pytest.mark.parametrize("place", [pytest.param("cuda-graph", marks=needs_cuda)])
def test_a_graph_s_inputs_must_be_on_its_device(place: str):
    with pytest.raises(CaptureError, match="all inputs on one CUDA device, they are on cpu, cuda"):
        capture(double_and_sum, (ones(2, device="cuda"), ones(2)))
