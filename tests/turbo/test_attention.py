"""Backends of the network's attention: one formula, a choice for each shape, clear refusals."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from turbo.compile import capture, compiled

from turbo import attention as module
from turbo import cli
from turbo.attention import (
    AUTO,
    CANDIDATES,
    FLEX,
    SDPA,
    AttentionChoice,
    attend,
    measure_attention,
    pick_attention,
    usable_attention,
    why_not,
)
from turbo.engine import Engine
from turbo.errors import BadInputError
from turbo.plan import ATTENTION, Performance, Plan, Stage
from turbo.testing import make_tiny_model
from turbo.transformer import Block, Transformer, TransformerConfig, run_block

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PINNED = [name for name in ATTENTION if name not in (AUTO, SDPA, FLEX)]
PLAN = Plan(stages=(Stage(name="only", height=64, width=48, steps=2, cfg=2.0),))
CONFIG = TransformerConfig(
    dim=64,
    heads=2,
    head_dim=32,
    ffn_dim=96,
    layers=2,
    noise_refiners=1,
    context_refiners=1,
    caption_dim=48,
    time_dim=16,
    time_hidden_dim=32,
    channels=4,
)
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without CUDA")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("attention") / "model")


def load(path: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(path, **{"plan": PLAN, "device": "cpu", **options})


def qkv(tokens: int, *, heads: int = 2, head_dim: int = 32, batch: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).unbind(2)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head in float64."""
    mixed = torch.empty_like(q, dtype=torch.float64)
    for picture, head in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[2])):
        one = (picture, slice(None), head)
        scores = q[one].double() @ k[one].double().T / q.shape[-1] ** 0.5
        mixed[one] = scores.softmax(-1) @ v[one].double()
    return mixed


def with_random_weights(network: Transformer) -> Transformer:
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / 8)
    return network


# One formula.


@torch.inference_mode()
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 32), (2, 77)])
def test_sdpa_is_the_formula(batch: int, tokens: int):
    q, k, v = qkv(tokens, batch=batch)
    mixed = attend(SDPA, q, k, v)
    assert mixed.shape == q.shape
    torch.testing.assert_close(mixed.double(), formula(q, k, v), rtol=0, atol=1e-6)


@compiles
@torch.inference_mode()
def test_flex_runs_on_a_cpu_and_is_the_formula():
    assert pick_attention(FLEX, CPU, torch.float32, 32) == FLEX  # tries it out
    q, k, v = qkv(32, heads=1)  # as in the trial, so that nothing more is compiled
    mixed = attend(FLEX, q, k, v)
    torch.testing.assert_close(mixed.double(), formula(q, k, v), rtol=0, atol=1e-6)
    assert torch.equal(attend(FLEX, q, k, v), mixed)
    # A capture's search for host reads steps around compiled code, and here must not fall over it.
    captured = capture(lambda *inputs: attend(FLEX, *inputs), [q, k, v], backend="replay")
    assert torch.equal(captured(q, k, v), mixed)


@compiles
@torch.inference_mode()
def test_a_block_compiles_in_one_piece_with_flex():
    network = with_random_weights(Transformer(CONFIG))
    [block] = network.noise_refiner
    assert isinstance(block, Block)
    x, factors = torch.randn(1, 64, 64), torch.rand(4, 64)
    rotary = network.rotary_table(16, 16, 0)
    run = compiled(run_block, name="block", strict=True)
    torch.testing.assert_close(
        run(block, x, factors, rotary, FLEX),
        run_block(block, x, factors, rotary),
        rtol=0,
        atol=1e-5,
    )
    assert run.graphs == 1


@torch.inference_mode()
def test_a_pinned_kernel_is_one_operation_in_a_compiled_block():
    """With PyTorch's own flash kernel for CPUs, which pinning reaches where the engine does not."""
    network = with_random_weights(Transformer(CONFIG))
    [block] = network.noise_refiner
    assert isinstance(block, Block)
    found: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        found.extend(str(node.target) for node in calls)
        return graph

    inputs = (torch.randn(1, 64, 64), torch.rand(4, 64), network.rotary_table(16, 16, 0))
    run = torch.compile(run_block, backend=keep, fullgraph=True, dynamic=False)
    for pinned in (run(block, *inputs, "flash"), block(*inputs, "flash")):
        torch.testing.assert_close(pinned, block(*inputs), rtol=0, atol=1e-5)
    assert [name for name in found if "attention" in name] == ["turbo.attention.default"]
    torch.compiler.reset()


class _SeenAttention(TorchFunctionMode):
    """Notes how `F.scaled_dot_product_attention` is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Any, Any]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = options.get("attn_mask"), options.get("is_causal", False)
            self.calls.append((len(args), *given))
        return func(*args, **options)


def test_no_attention_of_a_request_has_a_mask(model: Path):
    engine = load(model)
    with _SeenAttention() as seen:
        engine.generate("a cat", negative_prompt="blurry", seed=1)
    assert {(count, mask) for count, mask, _ in seen.calls} == {(3, None)}
    causal = [is_causal for _, _, is_causal in seen.calls if is_causal]
    assert len(causal) == 2 * len(engine.models.text_encoder.layers)  # two prompts
    assert len(seen.calls) > len(causal)


# A choice for each shape.


def test_a_shape_keeps_the_backend_of_its_first_use():
    choice = AttentionChoice(AUTO)
    assert choice.is_open(1, 64)
    assert choice.of(torch.empty(1, 64, 8)) == SDPA
    assert not choice.is_open(1, 64)
    assert choice.is_open(2, 64)
    choice.fix(2, 64, "flash")
    assert choice.of(torch.empty(2, 64, 8)) == "flash"
    with pytest.raises(ValueError, match="1 x 64 tokens have had their attention before"):
        choice.fix(1, 64, "flash")


def test_what_was_asked_for_by_name_holds_for_every_shape():
    choice = AttentionChoice("cudnn")
    assert not choice.is_open(1, 64)
    assert choice.of(torch.empty(1, 64, 8)) == "cudnn"


@torch.inference_mode()
def test_each_part_of_the_network_has_the_backend_of_its_own_number_of_tokens():
    network = with_random_weights(Transformer(CONFIG))
    latent, features = torch.randn(1, 4, 16, 16), torch.randn(1, 32, 48)
    image, both = network.token_counts(16, 16, [32])
    network.attention = choice = AttentionChoice(AUTO)
    for tokens, name in ((32, "flash"), (image, "cudnn"), (both, "efficient")):
        choice.fix(1, tokens, name)
    seen: list[tuple[int, str]] = []

    def note(block: Block, x: Tensor, factors: Tensor, rotary: Tensor, attention: str) -> Tensor:
        seen.append((x.shape[1], attention))
        return run_block(block, x, factors, rotary)

    length, rotary = torch.tensor(32), network.rotary_table(0, 0, 32)
    caption = network.refine_padded(features, length, rotary, run=note)
    table, rotary = network.modulation_table([0.5]), network.rotary_table(16, 16, 32)
    network(latent, caption, table[0], rotary, refine=note, join=note)
    assert seen == [(32, "flash"), (64, "cudnn"), (96, "efficient"), (96, "efficient")]


@pytest.mark.parametrize(
    ("microseconds", "chosen"),
    [
        ({"sdpa": 10.0, "cudnn": 9.0, "flash": 11.0}, "cudnn"),
        ({"sdpa": 10.0, "cudnn": 9.6}, "sdpa"),  # may be noise
        ({"sdpa": 10.0}, "sdpa"),
        ({"cudnn": 9.0, "flash": 8.9}, "cudnn"),
        ({"sdpa": 10.0, "cudnn": 9.0, "flash": 8.9, "efficient": 8.0}, "efficient"),
        ({}, "sdpa"),
    ],
)
def test_the_fastest_is_taken_if_it_is_clearly_faster(microseconds, chosen: str):
    assert module._fastest(microseconds) == chosen


@no_cuda
@torch.inference_mode()
def test_open_shapes_are_measured_once_with_what_can_run():
    choice = AttentionChoice(AUTO)
    choice.of(torch.empty(1, 32, 64))
    given: dict[str, Any] = {"heads": 2, "head_dim": 32, "device": CPU, "dtype": torch.float32}
    shapes = [(1, 32), (1, 64), (1, 96), (1, 64)]
    times = measure_attention(choice, shapes, **given)
    assert [(one.batch, one.tokens, one.chosen) for one in times] == [(1, 64, SDPA), (1, 96, SDPA)]
    assert all(one.microseconds.keys() == {SDPA} for one in times)
    assert all(one.microseconds[SDPA] > 0 for one in times)
    assert measure_attention(choice, shapes, **given) == ()
    assert measure_attention(AttentionChoice(SDPA), shapes, **given) == ()


class Memory(dict[str, Any]):
    recall = dict.get
    remember = dict.__setitem__


@no_cuda
@torch.inference_mode()
def test_what_an_earlier_process_chose_is_not_measured_again():
    given: dict[str, Any] = {"heads": 2, "head_dim": 32, "device": CPU, "dtype": torch.float32}
    memory = Memory({"attention-1x64": "cudnn", "attention-1x96": SDPA})  # no cudnn here
    choice = AttentionChoice(AUTO)
    times = measure_attention(choice, [(1, 32), (1, 64), (1, 96)], memory=memory, **given)
    assert [one.tokens for one in times] == [32, 64]
    assert not choice.is_open(1, 96)
    assert memory == dict.fromkeys([f"attention-1x{tokens}" for tokens in (64, 96, 32)], SDPA)


@torch.inference_mode()
def test_measuring_touches_no_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    module._random_qkv(1, 32, 2, 32, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


# What is refused.


@no_cuda
@pytest.mark.parametrize("backend", PINNED)
def test_on_a_cpu_other_kernels_are_refused_with_what_can_run(backend: str):
    message = (
        rf"^attention '{backend}' needs a CUDA device, got cpu; on cpu use auto or sdpa or flex$"
    )
    with pytest.raises(BadInputError, match=message):
        pick_attention(backend, CPU, torch.float32, 128)


def test_an_unknown_name_is_answered_with_all():
    names = "auto, sdpa, cudnn, flash, efficient, xformers, flex"
    with pytest.raises(BadInputError, match=f"^attention must be one of {names}, got 'sage'$"):
        pick_attention("sage", CPU, torch.float32, 128)


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_kernels_for_half_precision_say_so(backend: str):
    problem = why_not(backend, CUDA, torch.float32, 128)
    assert problem == "takes bfloat16 and float16, the network calculates in float32"


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="it is installed")
def test_without_xformers_the_message_says_what_to_install():
    problem = why_not("xformers", CUDA, torch.bfloat16, 128)
    assert problem == "needs the package xformers, which is not installed (pip install xformers)"


def test_flex_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = "'flex' needs a C\\+\\+ compiler, and no-such-compiler is not found; install one; on"
    with pytest.raises(BadInputError, match=message):
        pick_attention(FLEX, CPU, torch.float32, 32)
    assert usable_attention(CPU, torch.float32) == (SDPA,)


@torch.inference_mode()
def test_a_trial_that_fails_says_why_in_one_line():
    problem = module._failed_trial("cudnn", CPU, torch.float32, 32)
    assert problem is not None
    assert problem.startswith("cannot run here: No viable backend")
    assert "\n" not in problem


def test_the_cause_that_pytorch_tells_in_a_warning_is_the_one_given():
    told = [
        "Flash attention kernel not used because: (Triggered internally at a.cpp:1.)",
        "Flash attention needs head_dim at most 256. Got 512. (Triggered internally at a.cpp:2.)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at a.cpp:3.)",
    ]
    refusal = module._refusal(RuntimeError("No available kernel. Aborting execution."), told)
    assert refusal == "cannot run here: Flash attention needs head_dim at most 256. Got 512"
    assert module._refusal(RuntimeError("out of luck.\nx"), []) == "cannot run here: out of luck. x"


# A whole engine.


def test_on_a_cpu_auto_is_sdpa_and_has_nothing_to_measure(model: Path):
    engine = load(model)
    report = engine.warmup()
    assert engine.models.transformer.attention.asked == SDPA
    assert report.attention == ()
    assert "attention" not in report.seconds
    assert engine.generate("a cat", seed=1).metadata[0]["attention"] == SDPA


@no_cuda
def test_an_engine_refuses_what_cannot_run_wherever_it_was_asked_for(model: Path):
    with pytest.raises(BadInputError, match="attention 'cudnn' needs a CUDA device"):
        load(model, attention="cudnn")
    plan = replace(PLAN, performance=Performance(attention="flash"))
    with pytest.raises(BadInputError, match="attention 'flash' needs a CUDA device"):
        load(model, plan=plan)
    assert load(model, plan=plan, attention="sdpa").models.transformer.attention.asked == SDPA


@no_cuda
def test_the_command_line_refuses_it_before_loading(capsys: pytest.CaptureFixture[str]):
    for more in ([], ["--dry-run"]):
        assert cli.main(["generate", "x", "--attention", "efficient", "--quiet", *more]) == 2
        assert "attention 'efficient' needs a CUDA device" in capsys.readouterr().err


def test_the_command_lines_choices_are_the_plans():
    assert cli.ATTENTION == ATTENTION
    assert set(CANDIDATES) < set(ATTENTION)


# On a GPU.

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def bfloat16_qkv() -> Iterator[tuple[Tensor, ...]]:
    with torch.inference_mode(), torch.cuda.device(CUDA):
        yield tuple(part.to(CUDA, torch.bfloat16) for part in qkv(2336, heads=30, head_dim=128))


def distance(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("backend", [pytest.param(name, marks=gpu) for name in [*PINNED, FLEX]])
def test_on_a_gpu_each_errs_at_most_twice_as_far_as_sdpa(backend: str, bfloat16_qkv):
    problem = why_not(backend, CUDA, torch.bfloat16, 128)
    if problem is not None:
        pytest.skip(f"{backend} {problem}")
    exact = attend(SDPA, *(part.float() for part in bfloat16_qkv))
    usual, result = attend(SDPA, *bfloat16_qkv), attend(backend, *bfloat16_qkv)
    assert distance(result, exact) <= 2 * distance(usual, exact)
    captured = capture(lambda *inputs: attend(backend, *inputs), bfloat16_qkv)
    assert torch.equal(captured(*bfloat16_qkv), result)


@pytest.mark.parametrize("tokens", [pytest.param(count, marks=gpu) for count in (224, 640, 2336)])
def test_on_a_gpu_auto_takes_the_fastest_that_can_run(tokens: int):
    choice = AttentionChoice(pick_attention(AUTO, CUDA, torch.bfloat16, 128))
    with torch.inference_mode(), torch.cuda.device(CUDA):
        [times] = measure_attention(
            choice, [(1, tokens)], heads=30, head_dim=128, device=CUDA, dtype=torch.bfloat16
        )
    assert SDPA in times.microseconds
    assert times.chosen == module._fastest(times.microseconds)
    assert choice.of(torch.empty(1, tokens, 8)) == times.chosen
