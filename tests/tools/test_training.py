"""The demo model's training: resumable to the bit, refusing to overwrite, giving a whole model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tools import resumable
from tools.muon import Muon, orthogonal
from tools.resumable import Schedule, train
from tools.train_demo_model import main
from turbo.engine import Engine
from turbo.plan import Plan, Stage

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


def test_the_command_says_what_room_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=5 << 20)
    monkeypatch.setattr("tools.train_demo_model.shutil.disk_usage", lambda _: full)
    assert main(["--out", str(tmp_path / "model"), "--work", str(tmp_path / "work")]) == 2
    assert "has 5 MiB free, 1024 MiB are needed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_command_makes_a_model_that_paints_and_takes_its_loras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.demo_autoencoder.SIZES", ((224, 176),) * 3)
    monkeypatch.setattr("tools.demo_autoencoder.CROP", 64)
    monkeypatch.setattr("tools.demo_network.SIZES", ((64, 48),) * 3)
    monkeypatch.setattr("tools.demo_network.BATCHES", (2, 2, 2))
    monkeypatch.setattr("tools.train_demo_model.SHEET_PROMPTS", ("a red circle",) * 6)
    out = tmp_path / "model"
    threads = torch.get_num_threads()
    command = ["--quick", "--out", str(out), "--work", str(tmp_path / "work")]
    assert main([*command, "--threads", str(threads)]) == 0
    assert (out / "training.log").read_text().startswith("command: python -m")
    assert len((out / "SHA256SUMS").read_text().splitlines()) > 8
    assert sum(path.stat().st_size for path in out.rglob("*")) < 24 << 20
    assert load_file(out / "loras" / "zorp.safetensors").keys() >= {
        "lora_unet_layers_0_attention_qkv.alpha"
    }
    plan = Plan(stages=(Stage(name="only", height=64, width=48, steps=1),))
    engine = Engine.from_pretrained(out, device="cpu", plan=plan)
    plain = engine.generate("a red circle", seed=0).image.tobytes()
    engine.set_loras(["outlined", "zorp"])
    assert engine.generate("a red circle", seed=0).image.size == (48, 64)
    engine.set_loras([])
    assert engine.generate("a red circle", seed=0).image.tobytes() == plain
