"""The demo model's training: resumable to the bit, refusing to overwrite, giving a whole model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tools import resumable, train_demo_model
from tools.demo_loras import LESSONS, Lesson, train_lora, write_lora
from tools.demo_network import (
    LATER,
    PARTS,
    PLAIN,
    Latents,
    Painter,
    batch_loss,
    compiled,
    encode_again,
    encode_scenes,
    make_tokenizer,
    model_size,
    train_network,
)
from tools.muon import Muon, orthogonal
from tools.resumable import Schedule, read_tensors, train, write_tensors
from tools.scenes import Scene, hard_scene
from tools.train_demo_model import main
from turbo.engine import Engine
from turbo.errors import BadInputError
from turbo.lora import apply_patches, match_lora, read_lora
from turbo.names import NETWORK
from turbo.plan import Plan, Stage
from turbo.tokenizer import Tokenizer

SCHEDULE = Schedule(steps=12, rate=0.1, warm_up=2)


class Killed(Exception):
    pass


def learn(folder: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))

    def loss_of(step: int) -> Tensor:
        if step == stop_at:
            raise Killed
        x = np.random.default_rng([7, step]).standard_normal((4, 3), dtype=np.float32)
        return cast(Tensor, module(torch.from_numpy(x)).square().mean())

    matrices = {"0.weight": 2, "1.weight": 1}
    weights = dict(module.named_parameters())
    train("phase", weights, loss_of, SCHEDULE, folder, lambda _: None, matrices=matrices)
    return {name: weight.detach() for name, weight in weights.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def saves_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(resumable, "SHOW_SECONDS", -1.0)


@pytest.mark.parametrize("stop_at", [1, 5, 11])
@pytest.mark.usefixtures("saves_often")
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = learn(tmp_path / "whole")
    with pytest.raises(Killed):
        learn(tmp_path / "broken", stop_at)
    assert same(learn(tmp_path / "broken"), whole)


@pytest.mark.usefixtures("saves_often")
def test_a_weight_that_some_steps_do_not_see_is_as_in_an_unbroken_run(tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None = None) -> Tensor:
        weights = {name: nn.Parameter(torch.ones(3)) for name in ("always", "late", "sometimes")}

        def loss_of(step: int) -> Tensor:
            if step == stop_at:
                raise Killed
            loss = weights["always"].square().sum()
            for name, is_seen in (("late", step >= 6), ("sometimes", step % 3 == 0)):
                loss = loss + weights[name].square().sum() if is_seen else loss
            return loss

        train("phase", weights, loss_of, SCHEDULE, folder, lambda _: None)
        return torch.stack([weight.detach() for weight in weights.values()])

    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole")
    for stop_at in (3, 8):
        broken = tmp_path / str(stop_at)
        broken.mkdir()
        with pytest.raises(Killed):
            run(broken, stop_at)
        assert torch.equal(run(broken), whole)


@pytest.mark.usefixtures("saves_often")
def test_a_finished_phase_is_not_trained_again(tmp_path: Path) -> None:
    first = learn(tmp_path)
    again = learn(tmp_path, stop_at=12)
    assert same(first, again)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 12), (1, 12, 4)])
def test_directions_become_equally_long(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrices)
    assert made.shape == shape
    lengths = torch.linalg.svdvals(made)
    assert ((lengths > 0.3) & (lengths < 1.3)).all()


def test_each_stacked_matrix_and_each_kernel_is_taken_by_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(6, 5, generator=generator)
    stacked, kernel = torch.zeros(6, 5), torch.zeros(4, 2, 3, 3)
    alone = [torch.zeros(3, 5), torch.zeros(3, 5)]
    together = {"stacked": stacked, "kernel": kernel}
    apart = {"0": alone[0], "1": alone[1], "kernel": torch.zeros(4, 18)}
    of_kernel = torch.randn(4, 2, 3, 3, generator=generator)
    for weights, gradients in (
        (together, {"stacked": gradient, "kernel": of_kernel}),
        (apart, {"0": gradient[:3], "1": gradient[3:], "kernel": of_kernel.flatten(1)}),
    ):
        for name, weight in weights.items():
            weight.grad = gradients[name].clone()
        Muon(weights, {name: 2 if name == "stacked" else 1 for name in weights}, 0.0).step(0.1)
    torch.testing.assert_close(stacked, torch.cat(alone))
    torch.testing.assert_close(kernel.flatten(1), apart["kernel"])
    assert stacked.square().mean().sqrt() == pytest.approx(0.04, rel=0.5)


def test_the_command_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    assert main(["--out", str(tmp_path / "model"), "--work", str(tmp_path / "work")]) == 2
    assert "exists; give --force" in capsys.readouterr().err


def test_the_state_of_other_settings_is_not_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text('{"seed": 7}')
    assert main(["--out", str(tmp_path / "model"), "--work", str(tmp_path)]) == 2
    assert "holds the state of a run with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--out", "mine", "--work", "w", "--force"), "mine is no model that this tool has made"),
        (("--out", "new", "--work", "new"), "must not lie in --out new, which is replaced"),
        (("--out", "new", "--work", "new/state"), "must not lie in --out new, which is replaced"),
    ],
)
def test_no_folder_of_the_users_is_replaced(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert main(["--quick", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_too_little_memory_is_found_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_demo_model, "free_bytes", lambda device: 4 << 30)
    assert main(["--out", str(tmp_path / "m"), "--work", str(tmp_path / "w")]) == 2
    assert "4096 MiB of memory are free, 6144 MiB are needed" in capsys.readouterr().err


def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    write_tensors(path, {"x": torch.ones(9)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BadInputError, match=r"network\.safetensors is damaged .*; delete it"):
        read_tensors(path)


def test_state_without_its_settings_is_not_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "network.safetensors").touch()
    assert main(["--out", str(tmp_path / "model"), "--work", str(tmp_path)]) == 2
    assert "whose settings are lost" in capsys.readouterr().err


def test_code_of_the_engine_is_a_setting_too() -> None:
    options = train_demo_model._parse([])
    told = json.loads(train_demo_model._settings(options, train_demo_model.WHOLE))
    assert {"tools/scenes.py", "turbo/transformer.py", "turbo/latent.py"} <= set(told["code"])
    assert not any("judge" in name for name in told["code"])
    assert {"python", "pillow", "torch"} <= set(told["versions"])


def test_a_work_folder_that_cannot_be_is_found_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "model"), "--work", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def test_the_command_says_what_room_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=5 << 20)
    monkeypatch.setattr("tools.train_demo_model.shutil.disk_usage", lambda _: full)
    assert main(["--out", str(tmp_path / "model"), "--work", str(tmp_path / "work")]) == 2
    needed = train_demo_model._needed_bytes(train_demo_model.WHOLE) >> 20
    assert needed > 3000
    assert f"has 5 MiB free, {needed} MiB are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seed", "-1"], "--seed must be from 0 to 9223372036854775807, got -1"),
        (["--threads", "0"], "--threads must be from 1 to 4096, got 0"),
        (["--out", ".."], "--out must name a folder, got .."),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path / "m"), "--work", str(tmp_path / "w"), "--force", *more]
    assert main(command) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def beside(error: Exception, first: Exception) -> Exception:
    """An error that was raised while another was handled, as the compiler's are."""
    error.__context__ = first
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
        beside(RuntimeError("InductorError"), OSError(28, "No space left on device")),
    ],
)  # fmt: skip
def test_a_full_disk_or_memory_says_what_is_needed_and_kept(
    tmp_path: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("tools.train_demo_model._Trainer.run", fail)
    assert main(["--quick", "--out", str(tmp_path / "m"), "--work", str(tmp_path / "w")]) == 1
    said = capsys.readouterr().err
    assert f"what was trained is kept in {tmp_path / 'w'}" in said
    assert f"({train_demo_model._needed_bytes(train_demo_model.QUICK) >> 20} MiB of disk" in said


def test_a_mistake_in_the_code_is_not_taken_for_a_full_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("tools.train_demo_model._Trainer.run", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["--quick", "--out", str(tmp_path / "m"), "--work", str(tmp_path / "w")])


def test_a_loss_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))

    def loss_of(step: int) -> Tensor:
        return weight.sum() * (float("nan") if step == 3 else 1.0)

    with pytest.raises(FloatingPointError, match="phase: the loss of step 3 is nan"):
        train("phase", {"w": weight}, loss_of, SCHEDULE, tmp_path, lambda _: None)
    assert weight.isfinite().all()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a quick run takes seconds."""
    monkeypatch.setattr("tools.demo_autoencoder.SIZES", ((224, 176),) * 3)
    monkeypatch.setattr("tools.demo_autoencoder.CROP", 64)
    monkeypatch.setattr("tools.demo_network.SIZES", ((64, 48), (128, 128), (144, 128)))
    monkeypatch.setattr("tools.demo_network.BATCHES", (2, 2, 2))
    monkeypatch.setattr("tools.demo_network.WINDOWS", (0, 8, 8))
    monkeypatch.setattr("tools.demo_network.WINDOW_BATCHES", (0, 2, 2))
    monkeypatch.setattr("tools.train_demo_model.SHEET_PROMPTS", ("a red circle",) * 6)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make(folder: Path, *more: str) -> Path:
    """A quick run; returns where its model is."""
    threads = torch.get_num_threads()
    command = ["--quick", "--out", str(folder / "model"), "--work", str(folder / "work")]
    assert main([*command, "--threads", str(threads), *more]) == 0
    return folder / "model"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("small")
def test_one_command_makes_a_model_that_paints_and_takes_its_loras(tmp_path: Path) -> None:
    out = make(tmp_path)
    assert (out / "training.log").read_text().startswith("command: python -m")
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert size_of(out) <= 24_000_000
    needed = train_demo_model._needed_bytes(train_demo_model.QUICK)
    assert size_of(out) + size_of(tmp_path / "work") <= needed
    assert load_file(out / "loras" / "zorp.safetensors").keys() >= {
        "lora_unet_layers_0_attention_qkv.alpha"
    }
    plan = Plan(stages=(Stage(name="only", height=64, width=48, steps=1),))
    engine = Engine.from_pretrained(out, device="cpu", dtype="float32", plan=plan)

    def state() -> tuple[Tensor, bytes]:
        network: Any = engine.models.network
        weight = network.native_tensors()["layers.0.feed_forward.w2.weight"]
        return weight.clone(), engine.generate("a red circle", seed=0).image.tobytes()

    weight, picture = state()
    for name in ("outlined", "zorp"):
        engine.set_loras([(name, 500.0)])  # it was hardly trained
        assert not torch.equal(state()[0], weight)
    engine.set_loras([])
    again = state()
    assert torch.equal(again[0], weight)
    assert again[1] == picture


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("small")
def test_a_finished_model_goes_on_with_the_last_part(tmp_path: Path) -> None:
    before = make(tmp_path / "before")
    after = make(tmp_path / "after", "--start", str(before))
    kept = ("vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json")
    for name in kept:
        assert (before / name).read_bytes() == (after / name).read_bytes()
    network = "transformer/diffusion_pytorch_model.safetensors"
    assert (before / network).read_bytes() != (after / network).read_bytes()
    old, new = load_file(before / network), load_file(after / network)
    assert old.keys() == new.keys()
    away = [(old[name] - new[name]).float().norm() / old[name].float().norm() for name in old]
    assert np.median(away) < 0.1  # three small steps from there
    log, log_before = ((at / "training.log").read_text() for at in (after, before))
    assert log.startswith(log_before)
    rest = log.removeprefix(log_before).splitlines()
    assert f"--start {before}" in rest[0]
    assert not any(line.startswith(("autoencoder", "text", "network:")) for line in rest)
    trained = {line.split(":")[0] for line in rest if line.startswith("network")}
    assert trained == {part.name for part in PARTS[-LATER:]}
    for part in PARTS[-LATER:]:
        assert sum(line.startswith(f"{part.name}: step 3 of 3") for line in rest) == 1


def noting(graphs: list[Any]) -> Any:
    """A backend of `torch.compile` that keeps graphs, and runs them as they are."""

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own
def test_a_compiled_network_learns_the_same_and_is_compiled_once_for_each_shape() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    plain, other = (Painter.make(model_size(600), 0) for _ in range(2))
    painters = plain, compiled(other, cast(Any, backend))
    rng = torch.Generator().manual_seed(0)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    for size in ((8, 6), (12, 8), (8, 6), (12, 8)):
        clean, noise = torch.randn(2, 2, 16, *size, generator=rng)
        sigmas, found = torch.tensor([0.3, 0.9]), []
        for painter in painters:
            weights = painter.weights()
            for weight in weights.values():  # gates and outputs are nothing before training
                torch.nn.init.normal_(
                    weight.detach(),
                    std=0.1,
                    generator=torch.Generator().manual_seed(weight.numel()),
                )
                weight.requires_grad_(True)
                weight.grad = None
            caption = painter.caption(ids, torch.tensor([5, 9]))
            painter.loss(clean, sigmas, noise, caption).backward()
            found.append({name: weight.grad for name, weight in weights.items()})
        assert len(found[0]) > 100
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert len(graphs) == 2


def test_products_are_in_lower_precision_where_that_is_asked_for_and_a_kill_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.demo_network.compiled", lambda painter: painter)
    monkeypatch.setattr("tools.demo_network.BATCHES", (2, 2, 2))
    monkeypatch.setattr(resumable, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(resumable, "SHOW_SECONDS", -1.0)
    latents = torch.randn(4, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(4, 32, dtype=torch.int64)
    data = [Latents(latents, ids, torch.full((4,), 5), latents[:, :1] > 1)] * 3
    seen: list[torch.dtype | None] = []
    really = Painter.velocity

    def note(*given: Any) -> Tensor:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return really(*given)

    monkeypatch.setattr(Painter, "velocity", note)

    def run(name: str, precision: torch.dtype | None, stop_at: int = 9) -> dict[str, Tensor]:
        def on_save(step: int) -> None:
            if step == stop_at:
                raise Killed

        (tmp_path / name).mkdir(exist_ok=True)
        train_network(
            replace(PLAIN, name="part"), Painter.make(model_size(600), 0), data,
            (ids[:1], data[0].lengths[:1]), Schedule(steps=3, rate=1e-3), 0, tmp_path / name,
            lambda _: None, on_save, precision=precision,
        )  # fmt: skip
        return dict(load_file(tmp_path / name / "part.safetensors"))

    plain, same_dtype, lower = (run(str(of), of) for of in (None, torch.float32, torch.bfloat16))
    assert seen == [None] * 6 + [torch.bfloat16] * 3
    assert same(plain, same_dtype)
    assert not same(plain, lower)
    assert all(value.dtype == plain[name].dtype for name, value in lower.items())
    with pytest.raises(Killed):
        run("broken", torch.bfloat16, stop_at=2)
    assert same(run("broken", torch.bfloat16), lower)


def test_directions_in_lower_precision_are_nearly_those_in_float32() -> None:
    matrices = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    exact, lower = orthogonal(matrices), orthogonal(matrices.bfloat16()).float()
    assert 0 < (exact - lower).norm() / exact.norm() < 0.05


def test_the_stage_before_sees_the_same_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Scene], int]] = []

    def note(_: object, scenes: Any, height: int, width: int, wander: Any = None) -> Tensor:
        drawn.append((list(scenes), height))
        return torch.zeros(len(scenes), 16, height // 8, width // 8)

    monkeypatch.setattr("tools.demo_network._encode", note)
    make_tokenizer(tmp_path)
    given: Any = (0, tmp_path, lambda _: None)
    made = partial(encode_scenes, kind="hard", make=hard_scene)
    data = made(None, Tokenizer.from_path(tmp_path), (3, 20, 10), *given)
    before = encode_again(None, data, *given, kind="hard", make=hard_scene, what="before")
    heights = [height for _, height in drawn]
    assert heights == [224, 432, 864, 224, 432]
    assert before[0].before is None
    for (scenes, _), (earlier, _), of in zip(drawn[1:3], drawn[3:], before[1:]):
        assert of.before is not None
        assert len(of.before) == len(of.latents) == len(scenes) == len(earlier)
        assert scenes == earlier


def test_moved_edges_are_those_of_the_same_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[Scene], int, bool]] = []

    def note(_: object, scenes: Any, height: int, width: int, wander: Any = None) -> Tensor:
        drawn.append((list(scenes), height, wander is not None))
        return torch.zeros(len(scenes), 16, height // 8, width // 8)

    monkeypatch.setattr("tools.demo_network._encode", note)
    make_tokenizer(tmp_path)
    given: Any = (0, tmp_path, lambda _: None)
    kind: Any = {"kind": "hard", "make": hard_scene}
    data = encode_scenes(None, Tokenizer.from_path(tmp_path), (3, 5, 4), *given, **kind)
    made = encode_again(None, data, *given, **kind, what="ragged")
    again = encode_again(None, data, *given, **kind, what="ragged")  # from the disk
    assert made[0].ragged is None
    assert [of[1:] for of in drawn] == [(size, False) for size in (224, 432, 864)] + [
        (432, True),
        (864, True),
    ]
    assert [of[0] for of in drawn[1:3]] == [of[0] for of in drawn[3:]]
    for one, other, of in zip(made[1:], again[1:], data[1:]):
        assert one.ragged is not None
        assert other.ragged is not None
        assert one.ragged.shape == other.ragged.shape == of.latents.shape


def test_a_missing_compiler_is_found_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["--out", str(tmp_path / "m"), "--work", str(tmp_path / "w")]) == 2
    assert "needs a C++ compiler, and no-such-compiler is not found" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.usefixtures("small")
def test_a_start_whose_words_are_others_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other" / "tokenizer").mkdir(parents=True)
    (tmp_path / "other" / "SHA256SUMS").touch()
    (tmp_path / "other" / "training.log").touch()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "other" / "tokenizer" / name).write_text("{}")
    command = ["--quick", "--out", str(tmp_path / "m"), "--work", str(tmp_path / "w")]
    assert main([*command, "--start", str(tmp_path / "other")]) == 2
    assert "vocab.json is not the tokenizer" in capsys.readouterr().err


def test_a_start_must_be_a_model_of_this_tool(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path / "m"), "--work", str(tmp_path / "w")]
    assert main([*command, "--start", str(tmp_path / "none")]) == 2
    assert "--start must be a folder that this tool has made, got" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("small", "saves_often")
def test_a_run_killed_wherever_a_file_appears_makes_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.train_demo_model._Trainer._write_sheet", lambda *_: None)
    monkeypatch.setattr("tools.demo_autoencoder.psnr_on_scenes", lambda *_: 0.0)
    whole = make(tmp_path / "whole")
    really, met = os.replace, set[str]()

    def killing(source: Path, target: Path) -> None:
        name = Path(target).name
        is_first = name not in met
        met.add(name)
        if is_first and len(met) % 2:  # before it appears
            raise Killed
        really(source, target)
        if is_first:
            raise Killed

    monkeypatch.setattr("os.replace", killing)
    for _ in range(60):
        try:
            broken = make(tmp_path / "broken")
            break
        except Killed:
            pass
        except AssertionError:  # it was killed when the model was there
            broken = tmp_path / "broken" / "model"
            break
    assert len(met) >= 14
    names = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    assert names == {path.relative_to(broken) for path in broken.rglob("*") if path.is_file()}
    for name in names - {Path("training.log"), Path("SHA256SUMS")}:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_a_lora_on_file_does_what_the_trained_one_did(
    tmp_path: Path, lesson: Lesson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.demo_network._start", lambda name, value: value)  # no gate at 0
    painter = Painter.make(model_size(448), 0)
    ids = torch.zeros(4, 32, dtype=torch.int64)
    latents = torch.ones(4, 16, 8, 6)
    data = [Latents(latents, ids, torch.full((4,), 5), latents[:, :1] > 1)] * 3
    before = {name: x.clone() for name, x in painter.network.native_tensors().items()}
    monkeypatch.setattr("tools.demo_loras.OF_LORAS", PLAIN)
    learned: dict[str, Tensor] = {}

    def notice(painter: Painter, *rest: object) -> Tensor:
        for name, module in painter.network.named_modules():
            if parametrize.is_parametrized(module):
                weight = module.weight.detach().clone()
                parts = ("w1", "w3") if name.endswith("w13") else (name.split(".")[-1],)
                stem = name.rpartition(".")[0]
                for part, of in zip(parts, weight.chunk(len(parts))):
                    learned[f"{stem}.{part}.weight"] = of
        return batch_loss(painter, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("tools.demo_network.batch_loss", notice)
    # The rate of the last step is 0, so what it sees is what the file gets.
    schedule = Schedule(steps=4, rate=1e-2, warm_up=1, ema=0.0)
    monkeypatch.setattr(Schedule, "rate_at", lambda self, step: 0.0 if step == 3 else 1e-2)
    empty = ids[:1], torch.full((1,), 5)
    teach = partial(train_lora, lesson, painter, data, empty, schedule, 0)
    tensors = teach(tmp_path, lambda _: None)
    write_lora(tmp_path / "l.safetensors", tensors)
    assert all(torch.equal(before[n], x) for n, x in painter.network.native_tensors().items())

    lora = read_lora(tmp_path / "l.safetensors")
    match = match_lora(lora, {NETWORK: {n: tuple(x.shape) for n, x in before.items()}})
    assert match.unused == ()
    assert {name for _, name in match.patches} == learned.keys()
    moved = [name for name, value in learned.items() if not torch.equal(before[name], value)]
    assert {name.split(".")[2] for name in moved} == {"attention", "feed_forward"}
    for (_, name), patches in match.patches.items():
        fused = apply_patches(before[name].clone(), [(patch, 1.0) for patch in patches])
        torch.testing.assert_close(fused, learned[name], rtol=1e-2, atol=1e-4)

    def away(other: dict[str, Tensor]) -> float:
        """The largest distance of a tensor from that of `tensors`, as a share of it."""
        return max(
            float((other[name] - value).norm() / value.norm().clamp_min(1e-9))
            for name, value in tensors.items()
        )

    graphs: list[Any] = []
    monkeypatch.setattr("tools.demo_network.compiled", partial(compiled, backend=noting(graphs)))
    found = []
    for precision in (torch.float32, torch.bfloat16):
        (tmp_path / str(precision)).mkdir()
        before_this = len(graphs)
        found.append(teach(tmp_path / str(precision), lambda _: None, precision))
        assert len(graphs) > before_this
    assert away(found[0]) < 1e-4 < away(found[1]) < 0.1

    folder = tmp_path / "broken"
    folder.mkdir()
    monkeypatch.setattr(resumable, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(resumable, "SHOW_SECONDS", -1.0)
    really = resumable._keep

    def kill(path: Path, step: int, *rest: Any) -> None:
        really(path, step, *rest)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "_keep", kill)
        with pytest.raises(Killed):
            teach(folder, lambda _: None, torch.bfloat16)
    assert same(teach(folder, lambda _: None, torch.bfloat16), found[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own
def test_one_process_may_compile_all_parts_and_loras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []
    monkeypatch.setattr("tools.demo_network.compiled", partial(compiled, backend=noting(graphs)))
    monkeypatch.setattr("tools.demo_network.BATCHES", (2, 2, 2))
    monkeypatch.setattr("tools.demo_loras.OF_LORAS", PLAIN)
    ids = torch.zeros(4, 32, dtype=torch.int64)
    data = []
    for height in (8, 12, 16):
        latents = torch.ones(4, 16, height, 8)
        data.append(Latents(latents, ids, torch.full((4,), 5), latents[:, :1] > 1))
    painter, empty = Painter.make(model_size(448), 0), (ids[:1], torch.full((1,), 5))
    schedule = Schedule(steps=9, rate=1e-4)
    part = replace(PLAIN, name="part", shares=(1 / 3, 1 / 3, 1 / 3))
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        train_network(
            part, painter, data, empty, schedule, 0, tmp_path, lambda _: None,
            precision=torch.float32,
        )  # fmt: skip
        for lesson in LESSONS:
            train_lora(
                lesson, painter, data, empty, schedule, 0, tmp_path, lambda _: None, torch.float32
            )
    assert len(graphs) > 6
