"""A stand-in for ComfyUI as a program: ``python -m tests.bench.comfyui_stand_in PORT MODELS HOW``.

It plays any workflow node by node as the real server does, in no time. HOW says what goes wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.turbo.fake_comfyui import FakeComfyUI, play_steps, saved
from turbo.comfyui_workflow import FLOWMATCH_NODE, FLOWMATCH_SCHEDULER

SAMPLERS = ("KSampler", "SamplerCustom")
NODE_INFO: dict[str, dict[str, Any]] = {
    "/object_info/KSampler": {"KSampler": {"input": {"scheduler": [[FLOWMATCH_SCHEDULER]]}}},
    "/object_info/FlowMatch": {FLOWMATCH_NODE: {}},
}


def play_workflow(
    fake: FakeComfyUI, prompt_id: str, begin: Callable[[str], None] = lambda class_type: None
) -> None:
    """Play the workflow that was posted last; `begin` is told the class of each node."""
    prompts = [body["prompt"] for path, body in fake.posted if path == "/prompt"]
    workflow = prompts[-1]
    with fake.connected:  # whoever posted it may not be listening yet
        fake.connected.wait_for(lambda: fake.connections >= len(prompts))
    fake.send("execution_start", prompt_id=prompt_id)
    fake.send("execution_cached", nodes=[], prompt_id=prompt_id)
    outputs = {}
    for node, entry in workflow.items():
        if entry["class_type"] in SAMPLERS:
            play_steps(fake, prompt_id, node, 3)
        else:
            fake.send("executing", node=node, prompt_id=prompt_id)
        begin(entry["class_type"])
        if entry["class_type"] == "SaveImage":
            outputs[node] = saved(f"{node}.png")
    fake.send("execution_success", prompt_id=prompt_id)
    fake.finish(prompt_id, outputs)
    fake.send("executing", node=None, prompt_id=prompt_id)


def knows_its_nodes(fake: FakeComfyUI) -> FakeComfyUI:
    """The server with the node pack that plans need."""
    for path, info in NODE_INFO.items():
        fake.overrides[path] = partial(_answer, info)
    return fake


def _answer(info: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps(info).encode()


def main() -> None:
    port, models, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    print("models:", *sorted(os.listdir(models)), flush=True)
    if how == "ends":
        sys.exit("no module named einops")
    if how == "silent":
        signal.pause()
    if how == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    fake = knows_its_nodes(FakeComfyUI(port))

    def begin(class_type: str) -> None:
        if class_type == "EasyCache":
            print("EasyCache - skipped 5/16 steps (1.45x speedup).", flush=True)
        if class_type == "VAEDecode" and how == "dies":
            print("out of memory", flush=True)
            os._exit(9)
        if class_type == "VAEDecode" and how == "hangs":
            threading.Event().wait()

    fake.play = lambda fake, prompt_id: play_workflow(fake, prompt_id, begin)
    signal.pause()


if __name__ == "__main__":
    main()
