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
from tools.resumable import Schedule, train
from tools.train_demo_model import main
from turbo.engine import Engine
from turbo.plan import Plan, Stage

SCHEDULE = Schedule(steps=12, rate=0.1, warm_up=2)


class Killed(Exception):
    pass


def learn(folder: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    module = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)

    def loss_of(step: int) -> Tensor:
        if step == stop_at:
            raise Killed
        x = np.random.default_rng([7, step]).standard_normal((4, 3), dtype=np.float32)
        return cast(Tensor, module(torch.from_numpy(x)).square().mean())

    train("phase", dict(module.named_parameters()), loss_of, SCHEDULE, folder, lambda _: None)
    return {"weight": module.weight.detach()}


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
    assert torch.equal(learn(tmp_path / "broken")["weight"], whole["weight"])


@pytest.mark.usefixtures("saves_often")
def test_a_finished_phase_is_not_trained_again(tmp_path: Path) -> None:
    first = learn(tmp_path)
    again = learn(tmp_path, stop_at=12)
    assert torch.equal(first["weight"], again["weight"])


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
