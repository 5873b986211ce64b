from __future__ import annotations

import _thread
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from bench import child, comfyui_side
from bench.child import Child
from bench.comfyui_server import Launch, link_models
from bench.comfyui_side import ComfyUISide
from bench.side import MissingRivalError, Request, SideError
from tests.bench.comfyui_stand_in import knows_its_nodes, play_workflow
from tests.conftest import REPOSITORY
from tests.turbo.fake_comfyui import FakeComfyUI, fake_comfyui
from turbo.comfyui_workflow import ModelNames
from turbo.model_files import ModelFiles, find_model_files
from turbo.plan import DEFAULT_PLAN
from turbo.testing import make_tiny_model

REQUEST = Request(prompt="a lighthouse", negative_prompt="blurry", seed=42)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    return find_model_files(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    monkeypatch.setattr(comfyui_side, "EMPTYING_SECONDS", 0.0)
    monkeypatch.setattr(comfyui_side, "SILENT_SECONDS", 0.05)


@pytest.fixture
def made(files) -> Iterator[Callable[..., ComfyUISide]]:
    """Makes sides around the stand-in for the program; none outlives the test."""
    sides = []

    def make(how: str = "whole", **options: Any) -> ComfyUISide:
        words = f"{sys.executable} -m tests.bench.comfyui_stand_in {{port}} {{models}} {how}"
        sides.append(
            ComfyUISide(
                files, DEFAULT_PLAN, launch=Launch(command=words, folder=REPOSITORY), **options
            )
        )
        return sides[-1]

    yield make
    for side in sides:
        side.close()


@pytest.fixture
def server() -> Iterator[FakeComfyUI]:
    with fake_comfyui() as fake:
        fake.play = play_workflow
        yield knows_its_nodes(fake)


def port_of(side: ComfyUISide) -> int:
    assert side.url is not None
    return int(side.url.rpartition(":")[2])


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_running(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def line_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- a server of ours


def test_a_server_is_started_asked_for_pictures_and_gone_after_close(made):
    side = made()
    assert list(side.start()) == ["process"]
    [process], port = side.processes(), port_of(side)
    for prompt in ("a lighthouse", "a harbour"):
        picture = side.paint(replace(REQUEST, prompt=prompt))
        assert {"stage1", "stage2", "stage3", "prompt", "decode", "png", "total"} <= set(
            picture.seconds
        )
        assert picture.image.mode == "RGB"
        assert picture.spans > 0
    side.close()
    side.close()
    assert not psutil.pid_exists(process)
    assert not is_listening(port)
    assert side.processes() == ()


def test_saved_network_calls_are_read_from_the_log_and_wanted_ones_from_the_plan(made):
    side = made()
    side.start()
    assert side.paint(REQUEST).skips == {"stage2": (5, 16), "stage3": (5, 31)}


def test_pictures_of_earlier_stages_are_fetched_if_wanted(made):
    side = made(save_stages=True)
    side.start()
    picture = side.paint(REQUEST)
    assert set(picture.stage_images) == {"stage1", "stage2"}
    assert picture.seconds["stage1 picture"] >= 0


def test_the_part_that_runs_is_known_while_it_runs(made):
    side = made("hangs")
    side.start()
    seen = _interrupt_in(side, "decode")
    with pytest.raises(KeyboardInterrupt):
        side.paint(REQUEST)
    assert seen == ["decode"]
    assert side.part == ""


def _interrupt_in(side: ComfyUISide, part: str) -> list[str]:
    """Press Ctrl-C when the side comes to a part."""
    seen = []

    def press() -> None:
        while side.part != part:
            time.sleep(0.01)
        seen.append(side.part)
        _thread.interrupt_main()

    threading.Thread(target=press, daemon=True).start()
    return seen


def test_ctrl_c_in_a_picture_ends_the_server_at_once(made):
    side = made("hangs")
    side.start()
    [process], port = side.processes(), port_of(side)
    _interrupt_in(side, "decode")
    with pytest.raises(KeyboardInterrupt):
        side.paint(REQUEST)
    assert not psutil.pid_exists(process)
    assert not is_listening(port)


def test_a_server_that_ends_while_it_starts_is_quoted(made):
    side = made("ends")
    with pytest.raises(SideError) as caught:
        side.start()
    message = line_of(caught)
    assert "ended with code 1 while it started" in message
    assert "no module named einops" in message
    assert side.processes() == ()


def test_a_server_that_never_answers_is_given_up_and_ended(made):
    side = made("silent", start_seconds=0.3)
    with pytest.raises(SideError, match=r"no answer within 0\.3 s while it started"):
        side.start()
    assert side.processes() == ()


def test_a_server_that_dies_in_a_picture_is_quoted(made):
    side = made("dies")
    side.start()
    with pytest.raises(SideError) as caught:
        side.paint(REQUEST)
    message = line_of(caught)
    assert "ended with code 9 during a picture" in message
    assert message.endswith("out of memory")


def test_a_server_that_does_not_want_to_end_is_killed(made, monkeypatch):
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.2)
    side = made("stubborn")
    side.start()
    [process] = side.processes()
    side.close()
    assert not psutil.pid_exists(process)


def test_a_process_that_the_server_started_ends_with_it(tmp_path):
    script = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
        "'import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); "
        "signal.pause()']); import signal; signal.pause()"
    )
    process = Child("a rival", [sys.executable, "-c", script], tmp_path / "log")
    process.wait_for(lambda: "1" in process.text(), 60, "while it started")
    [_, grandchild] = process.processes()
    process.end()
    while is_running(grandchild):
        time.sleep(0.01)


def test_a_program_that_is_not_there_is_a_missing_rival(files):
    side = ComfyUISide(files, DEFAULT_PLAN, launch=Launch(command="no-such-program {port}"))
    with pytest.raises(MissingRivalError, match="cannot run no-such-program for ComfyUI"):
        side.start()


# ---------------------------------------------------------------- what is started


def test_nothing_to_start_says_what_to_give(files):
    for launch in (None, Launch()):
        with pytest.raises(MissingRivalError, match="--comfyui-url") as caught:
            ComfyUISide(files, DEFAULT_PLAN, launch=launch).start()
        line_of(caught)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch(command="serve.py --models {models}"), "where the port goes"),
        (Launch(folder=Path("/no/such/folder")), "no such folder"),
        (Launch(folder=REPOSITORY), "holds no main.py"),
    ],
)
def test_an_installation_that_cannot_be_started_says_why(files, launch, message):
    with pytest.raises(MissingRivalError, match=message) as caught:
        ComfyUISide(files, DEFAULT_PLAN, launch=launch).start()
    line_of(caught)


def test_an_installation_is_started_with_its_own_python_and_our_files_first(tmp_path):
    own = tmp_path / "ComfyUI" / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    launch = Launch(folder=tmp_path / "ComfyUI", dtype="bfloat16", flags=("--fast",))
    words = launch.arguments(8123, tmp_path / "models", tmp_path)
    assert words[:6] == [str(own), "main.py", "--listen", "127.0.0.1", "--port", "8123"]
    assert {"--cpu", "--bf16-unet", "--bf16-vae", "--bf16-text-enc"} < set(words)
    assert words[-1] == "--fast"
    paths = yaml.safe_load(Path(words[words.index("--extra-model-paths-config") + 1]).read_text())
    section = paths["turbo_bench"]
    assert section["is_default"] is True
    assert section["base_path"] == str(tmp_path / "models")
    assert section["diffusion_models"] == "diffusion_models/"


def test_a_command_gets_the_port_and_the_models_folder_without_a_shell(tmp_path):
    launch = Launch(command="serve '{models}/x y' --port {port}", flags=("--cpu",))
    assert launch.arguments(81, tmp_path, tmp_path) == [
        *("serve", f"{tmp_path}/x y", "--port", "81", "--cpu")
    ]


def test_links_lead_to_the_model_files_under_their_own_names(files, tmp_path):
    names = link_models(files, tmp_path / "models")
    assert names == ModelNames()
    link = tmp_path / "models" / "text_encoders" / "qwen_3_4b.safetensors"
    assert link.read_bytes() == files.text_encoder.read_bytes()
    assert (tmp_path / "models" / "loras").is_dir()


def test_one_file_with_everything_is_linked_as_a_checkpoint(files, tmp_path):
    whole = tmp_path / "whole.safetensors"
    whole.write_bytes(b"all of it")
    one = replace(files, layout="all-in-one", network=whole, text_encoder=whole, vae=whole)
    assert link_models(one, tmp_path / "models") == ModelNames(checkpoint="whole.safetensors")
    assert (tmp_path / "models/checkpoints/whole.safetensors").read_bytes() == b"all of it"


def test_a_diffusers_folder_is_nothing_for_comfyui(files, tmp_path):
    with pytest.raises(SideError, match="a diffusers folder"):
        link_models(replace(files, layout="diffusers"), tmp_path / "models")


# ---------------------------------------------------------------- a server that runs already


def test_a_server_behind_a_tunnel_is_refused(server, files):
    stats = {"system": {"ram_total": 2**50}}
    server.overrides["/system_stats"] = lambda: (200, json.dumps(stats).encode())
    with pytest.raises(MissingRivalError, match="it runs elsewhere") as caught:
        ComfyUISide(files, DEFAULT_PLAN, url=server.url).start()
    line_of(caught)


def test_a_given_servers_caches_are_emptied_before_the_first_picture(files, server):
    side = ComfyUISide(files, DEFAULT_PLAN, url=server.url)
    assert side.start() == {}
    side.paint(REQUEST)
    assert [path for path, _ in server.posted] == ["/free", "/prompt"]
    assert server.posted[0][1] == {"unload_models": True, "free_memory": True}
    assert side.processes() == ()
    side.close()
    assert is_listening(int(server.url.rpartition(":")[2]))


def test_the_server_gets_the_plan_with_the_rounds_texts_and_seed(files, server):
    side = ComfyUISide(files, DEFAULT_PLAN, url=server.url, loras=[("style.safetensors", 0.5)])
    side.start()
    side.paint(REQUEST)
    workflow = server.posted[-1][1]["prompt"]
    assert workflow["6"]["inputs"]["text"] == "a lighthouse"
    assert workflow["7"]["inputs"]["text"] == "blurry"
    assert workflow["325"]["inputs"]["noise_seed"] == 42 + 2
    assert workflow["343"]["inputs"]["lora_name"] == "style.safetensors"


def test_a_server_without_the_node_pack_says_what_to_install(files, server):
    server.overrides = {"/object_info": lambda: (200, b"{}")}
    with pytest.raises(MissingRivalError) as caught:
        ComfyUISide(files, DEFAULT_PLAN, url=server.url).start()
    assert "install ComfyUI-EulerDiscreteScheduler in its custom_nodes folder" in line_of(caught)


def test_a_scheduler_that_the_server_does_not_list_is_missing(files, server):
    server.overrides["/object_info/KSampler"] = lambda: (200, b'{"KSampler": {"input": {}}}')
    with pytest.raises(MissingRivalError, match="lacks FlowMatchEulerDiscreteScheduler; install"):
        ComfyUISide(files, DEFAULT_PLAN, url=server.url).start()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "not an address"])
def test_a_server_that_is_not_there_is_a_missing_rival(files, url):
    with pytest.raises(MissingRivalError) as caught:
        ComfyUISide(files, DEFAULT_PLAN, url=url).start()
    assert url in line_of(caught)


def test_a_refusal_is_one_line_of_the_servers_own_words(files, server):
    side = ComfyUISide(files, DEFAULT_PLAN, url=server.url)
    side.start()
    server.refusal = {"error": {"message": "Value not in list", "details": "unet_name"}}
    with pytest.raises(SideError, match="Value not in list: unet_name") as caught:
        side.paint(REQUEST)
    line_of(caught)


def test_a_server_that_goes_away_in_a_picture_is_one_line(files, server):
    side = ComfyUISide(files, DEFAULT_PLAN, url=server.url)
    side.start()
    server.play = lambda fake, prompt_id: fake.die()
    with pytest.raises(SideError, match="no answer from ComfyUI") as caught:
        side.paint(REQUEST)
    line_of(caught)


def test_device_memory_is_that_of_the_servers_own_tensors(files, server):
    device = {
        "name": "a GPU",
        "type": "cuda",
        "torch_vram_total": 6 << 30,
        "torch_vram_free": 2 << 30,
    }
    stats = {"system": {"comfyui_version": "0.8.0"}, "devices": [device]}
    server.overrides["/system_stats"] = lambda: (200, json.dumps(stats).encode())
    side = ComfyUISide(files, DEFAULT_PLAN, url=server.url)
    side.start()
    assert side.device_memory_gib() == {"allocated": 4.0, "reserved": 6.0}


def test_settings_tell_versions_and_needs_but_no_folders(files, server):
    arguments = ["/home/someone/ComfyUI/main.py", "--port", "1", "--output-directory", "/tmp/x/out"]
    stats = {
        "system": {"comfyui_version": "0.8.0", "pytorch_version": "2.13.0", "argv": arguments},
        "devices": [{"name": "cpu", "type": "cpu"}],
    }
    server.overrides["/system_stats"] = lambda: (200, json.dumps(stats).encode())
    side = ComfyUISide(files, DEFAULT_PLAN, url=server.url)
    side.start()
    settings = side.settings()
    assert (settings["version"], settings["torch"]) == ("0.8.0", "2.13.0")
    assert settings["arguments"] == ["main.py", "--port", "…", "--output-directory", "…"]
    assert "ComfyUI-EulerDiscreteScheduler" in settings["needs"].values()
    assert side.device_memory_gib() is None
