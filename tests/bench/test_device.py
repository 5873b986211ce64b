"""``bench device`` at tiny sizes on the CPU: what it counts, measures, checks and keeps."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import arithmetic, device
from bench.machine import describe_machine
from bench.model_parts import network
from bench.process_parts import summary_of
from bench.processes import run_together
from bench.random_model import FULL, PROMPT_TOKENS
from bench.results import Found, Part, Results, recorded, run_parts
from bench.setting import Judge, Setting, require_near
from bench.timing import Meter, summarise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting() -> Setting:
    made = Setting(CPU, small=True)
    made.seconds = 0.01
    return made


def test_a_full_size_network_call_counts_as_in_the_table_of_limits():
    config, caption = FULL.network_config, arithmetic.caption_refiner(FULL.network_config, 64)
    calls = [
        arithmetic.network_call(config, size, 64, batch)
        for size, batch in (((28, 22), 2), ((54, 42), 1), ((108, 84), 1))
    ]
    # The table counts the caption's refining in every call, for each of its captions.
    counted = [calls[0] + 2 * caption, calls[1] + caption, calls[2] + caption]
    assert [round(count / 1e12, 3) for count in counted] == [5.124, 7.449, 29.131]


def test_prompt_and_decoder_count_as_in_the_table_of_limits():
    assert arithmetic.text_encoder(FULL.text_encoder_config, 64) / 1e12 == pytest.approx(0.45, 0.02)
    decoded = arithmetic.decoder(FULL.autoencoder_config, (108, 84)) / 1e12
    assert decoded == pytest.approx(5.66, 0.002)


def test_matrix_products_have_the_rows_of_joint_and_image_tokens():
    shapes = arithmetic.block_products(FULL.network_config, (28, 22), 64, batch=2)
    assert shapes["joint qkv"] == (448, 11520, 3840)
    assert shapes["joint w13"] == (448, 20480, 3840)
    assert shapes["refiner w2"] == (320, 3840, 10240)
    assert len(shapes) == 8


def test_the_full_size_is_that_of_the_real_files(shared: Path):
    from turbo.testing import autoencoder_shapes, qwen3_shapes, zimage_shapes

    made = [
        zimage_shapes(FULL.network),
        qwen3_shapes(FULL.text_encoder),
        autoencoder_shapes(FULL.autoencoder),
    ]
    files = json.loads((shared / "manifest" / "state_dict_shapes.json").read_text())
    for shapes, file in zip(made, files.values()):
        assert shapes == {name: tuple(file[name][0]) for name in shapes}


def test_every_part_that_runs_in_this_process_finds_its_numbers(setting: Setting):
    parts = {part.name: part for part in device.make_parts(setting)}
    found: dict[str, Found] = {}
    for name in ("machine", "matmul", "prompt", "decode", "picture", "fp8", "kernels", "attention"):
        found[name] = {}
        parts[name].run(found[name], 60)
    assert found["machine"]["torch"] == torch.__version__
    assert found["matmul"]["stage1"]["joint qkv"]["share_of_limit"] > 0
    assert found["prompt"]["prompt to caption"]["captured"]["median_ms"] > 0
    assert found["decode"]["captured"]["tflop"] > 0
    fast = found["picture"]["no cache"]["captured"]
    assert 0 < fast["outside_share"] < 1
    assert set(fast["skipped_of_calls"]) == {"stage1", "stage2", "stage3"}
    for numbers in found["fp8"].values():
        assert 0 < numbers["distance"] < numbers["another_seed_distance"] / 2
        assert numbers["median_ms"] > 0
    assert found["kernels"]["stage3"]["latent_upscale"]["eager"]["device"]["median_us"] > 0
    by_backend = found["attention"]["stage3"]
    assert by_backend["sdpa"]["share_of_limit"] > 0
    assert "'cudnn' needs a CUDA device, got cpu" in by_backend["cudnn"]["withheld"]
    assert any("of the limit" in line for line in device.table(found))


def test_a_captured_call_equals_the_uncaptured_one(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("bench.model_parts.VARIANTS", ("eager", "captured"))
    found: Found = {}
    network(setting, found, 60)
    assert found["stage1"]["batch"] == 2
    assert all(found[stage]["captured"]["equals_uncaptured"] for stage in ("stage1", "stage3"))


def test_a_wrong_result_has_no_number(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    side = setting.side("captured")
    right = side.models.network
    monkeypatch.setattr(side.models, "network", lambda *inputs: right(*inputs) * 1.1)
    monkeypatch.setattr("bench.model_parts.VARIANTS", ("eager", "captured"))
    found: Found = {}
    network(setting, found, 60)
    assert found["stage3"]["captured"].keys() == {"withheld"}
    assert "check failed" in found["stage3"]["captured"]["withheld"]
    assert found["stage3"]["eager"]["median_ms"] > 0


def test_low_precision_may_err_twice_as_far_as_eager_code():
    reference = torch.ones(4)
    judge = Judge(reference, reference * 1.1)
    assert judge.check(reference * 1.19)["distance"] == pytest.approx(0.19)
    with pytest.raises(ValueError, match="check failed"):
        judge.check(reference * 1.21)
    with pytest.raises(ValueError, match="nan"):
        require_near(torch.tensor([float("nan")]), torch.ones(1), 1.0)


def test_prompts_have_the_tokens_that_are_promised(setting: Setting):
    words = setting.model.models.tokenizer
    for letter in "qzxjk":
        for text in (letter, letter.upper()):
            assert len(words.encode_prompt(setting.model.prompt(text))) == PROMPT_TOKENS


def test_the_file_is_whole_and_partial_until_the_last_part(tmp_path: Path):
    path = tmp_path / "made" / "results.json"
    seen: list[dict] = []

    def first(found: Found, seconds: float) -> None:
        found["number"] = 1

    def second(found: Found, seconds: float) -> None:
        seen.append(json.loads(path.read_text()))

    run_parts([Part("a", first, 9), Part("b", second, 9)], Results(path, {"x": 1}), seconds=60)
    assert seen[0]["partial"]
    assert seen[0]["parts"]["a"]["number"] == 1
    final = json.loads(path.read_text())
    assert (final["partial"], final["x"], [*final["parts"]]) == (False, 1, ["a", "b"])
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_failing_and_a_late_part_are_recorded_and_the_others_run(tmp_path: Path):
    path = tmp_path / "results.json"

    def fail(found: Found, seconds: float) -> None:
        found["before"] = 1
        raise RuntimeError("no such thing")

    def late(found: Found, seconds: float) -> None:
        found["before"] = 2
        time.sleep(10)

    def good(found: Found, seconds: float) -> None:
        with recorded(found, "inner") as numbers:
            numbers["half"] = 1
            raise ValueError("not checked")

    parts = [Part("fail", fail, 9), Part("late", late, 3.2), Part("good", good, 9)]
    run_parts(parts, Results(path, {}), seconds=60)
    found = json.loads(path.read_text())["parts"]
    assert found["fail"]["error"] == {"type": "RuntimeError", "message": "no such thing"}
    assert found["fail"]["before"] == 1
    assert found["late"]["error"]["type"] == "OutOfTimeError"
    assert found["late"]["before"] == 2
    assert found["good"]["inner"] == {"withheld": "ValueError: not checked"}


def test_a_stopped_run_keeps_what_it_has(tmp_path: Path):
    path = tmp_path / "results.json"

    def stop(found: Found, seconds: float) -> None:
        found["so far"] = 1
        with recorded(found, "unchecked") as numbers:
            numbers["half"] = 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parts([Part("stop", stop, 9)], Results(path, {}), seconds=60)
    kept = json.loads(path.read_text())
    assert kept["partial"]
    assert kept["parts"]["stop"]["so far"] == 1
    assert kept["parts"]["stop"]["unchecked"] == {"withheld": "KeyboardInterrupt: "}


def test_parts_for_which_no_time_is_left_are_not_begun():
    results = Results(None, {})
    run_parts([Part("a", lambda found, seconds: found.update(ran=1), 9)], results, seconds=1)
    assert "no time was left" in results.data["parts"]["a"]["error"]["message"]


def test_processes_run_side_by_side_and_end_with_the_time():
    python = [sys.executable, "-c"]
    begin = time.monotonic()
    finished = run_together(
        {
            "quick": [*python, "print('FAIL one'); print('1 passed, 1 failed'); exit(1)"],
            "slow": [*python, "import time; print('begun', flush=True); time.sleep(60)"],
        },
        seconds=3,
    )
    assert time.monotonic() - begin < 20
    quick, slow = summary_of(finished["quick"]), summary_of(finished["slow"])
    assert (quick["code"], quick["failures"]) == (1, ["FAIL one"])
    assert quick["closing"][-1] == "1 passed, 1 failed"
    assert (slow["timed_out"], slow["passed"], slow["closing"]) == (True, False, ["begun"])


def test_times_are_summed_up_by_name_and_given_with_their_spread():
    meter = Meter(CPU)
    nap = meter.metered("nap", time.sleep)
    nap(0.01)
    nap(0.01)
    assert meter.read_s()["nap"] >= 0.02
    assert meter.read_s() == {}
    summary = summarise([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (summary["p20_ms"], summary["median_ms"], summary["p80_ms"]) == (2.0, 3.5, 5.0)


def test_the_machine_is_described_with_its_commit(monkeypatch: pytest.MonkeyPatch):
    assert describe_machine()["threads"] == torch.get_num_threads()
    monkeypatch.setattr("bench.machine._output", lambda *command: None)
    monkeypatch.setenv("TURBO_COMMIT", "abc-dirty")
    assert describe_machine()["commit"] == "abc-dirty"


def test_the_command_runs_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "results.json"
    options = ["--small", "--device", "cpu", "--only", "machine", "matmul", "-o", str(path)]
    assert device.main(options) == 0
    written = json.loads(path.read_text())
    assert [*written["parts"]] == ["machine", "matmul"]
    assert not written["partial"]
    assert "matmul / limit" in capsys.readouterr().out
    assert device.main(["--device", "cpu"]) == 2
