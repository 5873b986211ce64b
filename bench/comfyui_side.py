"""ComfyUI as a side of a comparison: the plan as a workflow, on a server of ours or a given one.

A server of ours is started on a free loopback port over links to the model's files and ended with
the side. Times come from the events of the server's WebSocket: see `bench.comfyui_times`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.child import Child, free_port
from bench.comfyui_server import NO_SERVER, Launch, link_models, names_of
from bench.comfyui_times import Watch
from bench.pictures import decode_picture
from bench.servers import require_same_memory
from bench.side import MissingRivalError, OutsideSide, Request, Round, SideError
from turbo.comfyui_client import ComfyUIClient
from turbo.comfyui_http import ServerHttp, Unreachable
from turbo.comfyui_workflow import (
    FLOWMATCH_SCHEDULER,
    LoraInput,
    ModelNames,
    Workflow,
    picture_node,
    required_nodes,
    workflow_from_plan,
)
from turbo.errors import TurboError
from turbo.messages import one_line
from turbo.model_files import ModelFiles
from turbo.plan import Plan, Stage
from turbo.samplers import sampler_sigmas, trace_sampler
from turbo.sigmas import stage_sigmas

ASK_SECONDS = 30.0
"""How long one answer may take."""
SILENT_SECONDS = 5.0
"""Without an event for so long the server is asked whether it still works. Rarely: it costs it
some milliseconds of the picture that is being timed."""
ATTEMPTS = 2
EMPTYING_SECONDS = 2.0
"""A server empties its caches in its own time and does not tell when it has."""
END_SECONDS = 2.0
"""How long a process that no longer answers has to turn out to be dead."""
_SKIPPED = re.compile(r"EasyCache - skipped (\d+)/\d+ steps")


class ComfyUISide(OutsideSide):
    """A ComfyUI server.

    Args:
        files: The model.
        plan: What it follows.
        url: A running server, which has the same files under the same names; the pictures stay in
            its output folder.
        launch: How to start one, in place of `url`.
        loras: As `workflow_from_plan` takes them; names in the model's LoRA folder.
        save_stages: Also fetch the pictures of the stages before the last; their time is not in
            `total`.
        name: Its name in the comparison.
        approximate: Whether its flags change the picture by more than rounding.
        best: Whether its flags make it its fastest.
        start_seconds: How long a server of ours may take until it answers.
        run_seconds: How long a picture may take.
    """

    def __init__(
        self,
        files: ModelFiles,
        plan: Plan,
        *,
        url: str | None = None,
        launch: Launch | None = None,
        loras: Sequence[LoraInput] = (),
        save_stages: bool = False,
        name: str = "comfyui",
        approximate: bool = False,
        best: bool = False,
        start_seconds: float = 300.0,
        run_seconds: float = 3600.0,
    ) -> None:
        super().__init__(name, approximate=approximate, best=best)
        self.url = url
        self._files = files
        self._plan = plan.resolved()
        self._launch = launch
        self._loras = tuple(loras)
        self._save_stages = save_stages
        self._start_seconds = start_seconds
        self._run_seconds = run_seconds
        self._names: ModelNames | None = None
        self._http: ServerHttp | None = None
        self._child: Child | None = None
        self._scratch: Path | None = None
        self._stats: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """Versions and arguments as the server tells them, and what it had to have."""
        system, device = self._system(), self._device()
        ours = self._launch is not None
        return {
            "program": "ComfyUI",
            "version": system.get("comfyui_version"),
            "torch": system.get("pytorch_version"),
            "python": str(system.get("python_version")).partition(" ")[0],
            "device": device.get("name"),
            "dtype": self._dtype(),
            "arguments": _lasting(system.get("argv", ())),
            "started": "by this run" if ours else "before this run",
            "OMP_NUM_THREADS": torch.get_num_threads() if ours else None,
            "needs": dict(sorted(self._needs().items())),
        }

    def start(self) -> dict[str, float]:
        """Start a server or greet the given one; its weights are read by its first picture.

        Returns:
            `process`, the seconds until a server of ours answered.

        Raises:
            MissingRivalError: There is no server, or it lacks a node.
            SideError: It does not start, or the model's files are not for it.
        """
        begin = time.perf_counter()
        try:
            if self.url is None:
                self._start_server()
                took = {"process": time.perf_counter() - begin}
            else:
                self._greet_server(self.url)
                took = {}
            self._check_needs()
        except BaseException:
            self.close()
            raise
        return took

    def paint(self, request: Request) -> Round:
        """Make a picture.

        Raises:
            SideError: It could not, or did not compute all of it.
        """
        workflow = self._workflow(request)
        watch = Watch(workflow, self._plan, self._enter)
        logged = self._child.log.stat().st_size if self._child is not None else 0
        try:
            pictures = self._run(workflow, watch)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C
                self.close()
            raise
        finally:
            self.part = ""
        wanted = picture_node(self._plan)
        if not pictures.get(wanted):
            raise SideError(f"ComfyUI at {self.url} finished without a picture")
        return Round(
            seconds=watch.seconds(),
            image=decode_picture(pictures[wanted][0]),
            stage_images=self._stage_images(workflow, pictures),
            skips=self._skips(logged),
            spans=watch.events,
        )

    def processes(self) -> tuple[int, ...]:
        """The server's process and its children; empty for a server that was given."""
        return self._child.processes() if self._child is not None else ()

    def device_memory_gib(self) -> dict[str, float] | None:
        """Of the server's own process, as it tells it; None on a CPU."""
        if self._http is None or self._device().get("type") in (None, "cpu"):
            return None
        try:
            [device, *_] = self._http.ask("/system_stats")["devices"]
            reserved, free = device["torch_vram_total"], device["torch_vram_free"]
        except (Unreachable, TurboError, LookupError, TypeError, ValueError):
            return None
        return {"allocated": (reserved - free) / 2**30, "reserved": reserved / 2**30}

    def close(self) -> None:
        """End a server of ours and remove its files."""
        child, self._child = self._child, None
        try:
            if child is not None:
                self.url = self._http = None
                child.end()
        finally:
            scratch, self._scratch = self._scratch, None
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)

    # ------------------------------------------------------------ the server

    def _start_server(self) -> None:
        if self._launch is None:
            raise MissingRivalError(NO_SERVER)
        self._launch.check()
        self._scratch = Path(tempfile.mkdtemp(prefix="turbo-bench-"))
        models = self._scratch / "models"
        self._names = link_models(self._files, models)
        port = free_port()
        temporary = self._scratch / "tmp"  # so that what a killed server leaves goes with ours
        temporary.mkdir()
        environment = {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "TMPDIR": str(temporary),
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
        }
        self._child = Child(
            "ComfyUI",
            self._launch.arguments(port, models, self._scratch),
            self._scratch / "log",
            folder=self._launch.folder,
            environment=environment,
        )
        self.url = f"http://127.0.0.1:{port}"
        self._http = ServerHttp(self.url, ASK_SECONDS)
        self._child.wait_for(self._answers, self._start_seconds, "while it started")

    def _greet_server(self, url: str) -> None:
        if self._launch is not None:
            raise MissingRivalError("give ComfyUI's address or how to start it, not both")
        try:
            self._http = ServerHttp(url, ASK_SECONDS)
            self._stats = self._http.ask("/system_stats")
            require_same_memory("ComfyUI", url, self._system().get("ram_total"))
            # What it answers from its cache would not be measured.
            self._http.exchange("/free", {"unload_models": True, "free_memory": True})
        except Unreachable as error:
            raise MissingRivalError(
                f"no answer from ComfyUI at {url} ({error}); start it, or check --comfyui-url"
            ) from error
        except TurboError as error:
            raise MissingRivalError(str(error)) from error
        self._names = names_of(self._files)
        time.sleep(EMPTYING_SECONDS)

    def _answers(self) -> bool:
        try:
            self._stats = self._server().ask("/system_stats")
        except Unreachable:
            return False
        except TurboError as error:
            raise SideError(str(error)) from error
        return True

    def _server(self) -> ServerHttp:
        if self._http is None:
            raise SideError(f"{self.name} is not started")
        return self._http

    def _dtype(self) -> str | None:
        """Of its weights, where this run told it; else it is its own business."""
        launch = self._launch
        return None if launch is None or launch.command is not None else launch.dtype

    def _system(self) -> dict[str, Any]:
        system = self._stats.get("system")
        return system if isinstance(system, dict) else {}

    def _device(self) -> dict[str, Any]:
        devices = self._stats.get("devices") or [{}]
        return devices[0] if isinstance(devices[0], dict) else {}

    # ------------------------------------------------------------ the workflow

    def _workflow(self, request: Request) -> Workflow:
        return workflow_from_plan(
            self._plan,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            seed=request.seed,
            loras=self._loras,
            models=self._names,
            filename_prefix=f"turbo_bench_{uuid.uuid4().hex[:8]}",
            standard_nodes=True,
            save_stages=self._save_stages,
        )

    def _needs(self) -> dict[str, str]:
        """Nodes and schedulers that ComfyUI itself lacks -> the pack that has them."""
        return required_nodes(self._workflow(Request(prompt="", negative_prompt="", seed=0)))

    def _check_needs(self) -> None:
        needs = self._needs()
        missing = [name for name in needs if not self._has(name)]
        if missing:
            packs = " and ".join(sorted({needs[name] for name in missing}))
            raise MissingRivalError(
                f"ComfyUI at {self.url} lacks {' and '.join(missing)}; install {packs} in its "
                "custom_nodes folder"
            )

    def _has(self, name: str) -> bool:
        node = "KSampler" if name == FLOWMATCH_SCHEDULER else name
        path = f"/object_info/{urllib.parse.quote(node, safe='')}"
        try:
            known = self._server().ask(path)
        except Unreachable as error:
            raise SideError(f"no answer from ComfyUI at {self.url} to {path} ({error})") from error
        except TurboError as error:
            raise SideError(str(error)) from error
        return node in known and (node == name or f'"{name}"' in json.dumps(known[node]))

    # ------------------------------------------------------------ a run

    def _enter(self, part: str) -> None:
        self.part = part

    def _run(self, workflow: Workflow, watch: Watch) -> dict[str, list[bytes]]:
        client = ComfyUIClient(
            self._server().url,
            timeout=ASK_SECONDS,
            run_timeout=self._run_seconds,
            poll_interval=SILENT_SECONDS,
            attempts=ATTEMPTS,
        )
        try:
            return client.run(workflow, on_event=watch)
        except TurboError as error:
            self._check_alive()
            said = str(error).replace("with run_timeout", "with --timeout")
            raise SideError(said) from error

    def _check_alive(self) -> None:
        """Say so if the reason for an error is that our server has ended."""
        end = time.monotonic() + END_SECONDS
        while self._child is not None and time.monotonic() < end:
            self._child.check("during a picture")
            time.sleep(0.05)

    def _stage_images(
        self, workflow: Workflow, pictures: dict[str, list[bytes]]
    ) -> dict[str, Image.Image]:
        last = picture_node(self._plan)
        prefixes = {n: workflow[n]["inputs"]["filename_prefix"] for n in pictures if n != last}
        names = {node: prefix.split("_", 3)[3] for node, prefix in prefixes.items()}
        return {name: decode_picture(pictures[node][0]) for node, name in names.items()}

    def _skips(self, logged: int) -> dict[str, tuple[int, int]]:
        """Network calls that EasyCache saved, from our server's log from a byte on."""
        if self._child is None:
            return {}
        stages = [stage for stage in self._plan.stages if stage.easycache is not None]
        saved = [int(number) for number in _SKIPPED.findall(self._child.text(logged))]
        if len(saved) != len(stages):
            return {}
        # Its line divides by sampler steps, which may take more than one call.
        return {s.name: (n, _calls(s)) for s, n in zip(stages, saved)}


def _calls(stage: Stage) -> int:
    sigmas = sampler_sigmas(stage.sampler, stage_sigmas(stage), stage.shift)
    return len(trace_sampler(stage.sampler, sigmas).evaluations)


def _lasting(words: Sequence[object]) -> list[str]:
    """A server's arguments without the port and the folders, which are others in each run."""
    lasting = []
    for word, before in zip(words, ("", *map(str, words))):
        text = one_line(word)
        is_of_the_run = before == "--port" or before.endswith(("-directory", "-config"))
        lasting.append("…" if is_of_the_run else _last_part(text))
    return lasting


def _last_part(text: str) -> str:
    """An argument without the folders of this machine."""
    return text.rpartition("/")[2] if text.startswith(("/", "~")) else text
