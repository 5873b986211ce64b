"""An SGLang server as a side of a comparison, over the OpenAI images API.

The plan's single stage is what it is asked for; the server's own sampler and schedule for the model
run it. Times are wall times of a request: coding the PNG and its transfer are in `total`, and for
ratios the other side's PNG is added to its total.

Source: https://github.com/sgl-project/sglang (docs/diffusion/openai_api.md).
"""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from bench.side import MissingRivalError, Request, Round, SideError
from bench.single_stage import only_stage, open_picture
from turbo.comfyui_http import ServerHttp, Unreachable
from turbo.errors import BadInputError
from turbo.messages import one_line
from turbo.plan import Plan

ROUTE = "/v1/images/generations"
ASK_SECONDS = 30.0
INCLUDED = ("coding the PNG", "its transfer")
"""In `total`, and not told apart."""
ANSWER_LIMIT = 512 * 2**20
"""Largest answer, in bytes."""


class SglangSide:
    """A running server.

    Args:
        url: Its address without the route; None is an error that says what to give.
        plan: Its single stage gives size, steps and guidance.
        name: Its name in the comparison.
        approximate: Whether the server was started with options that change the picture.
        best: Whether it was started with its fastest options.
        run_seconds: How long a picture may take.
    """

    in_process = False

    def __init__(
        self,
        url: str | None,
        plan: Plan,
        *,
        name: str = "sglang",
        approximate: bool = False,
        best: bool = False,
        run_seconds: float = 3600.0,
    ) -> None:
        self.name = name
        self.approximate = approximate
        self.best = best
        self.part = ""
        self._url = url
        self._stage = only_stage(plan)
        self._run_seconds = run_seconds
        self._http: ServerHttp | None = None
        self._model: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """What the server says about its model, without folders."""
        told = ("pipeline_name", "num_gpus", "dit_precision", "vae_precision")
        path = self._model.get("model_path")
        return {
            "program": "SGLang",
            "model": str(path).rstrip("/").rpartition("/")[2] if path else None,
            **{key: self._model.get(key) for key in told},
            "guidance_scale": self._stage.cfg - 1,
            "total_includes": list(INCLUDED),
            "started": "before this run",
        }

    def start(self) -> dict[str, float]:
        """Greet the server.

        Raises:
            MissingRivalError: There is none.
        """
        if self._url is None:
            raise MissingRivalError(
                "no SGLang to compare with: start `sglang serve` and give its address with "
                "--sglang-url"
            )
        try:
            self._http = ServerHttp(self._url, ASK_SECONDS)
            status, answer = self._http.exchange("/models")
        except BadInputError as error:
            raise MissingRivalError(
                f"{one_line(self._url)} is no server address; give one such as "
                "http://127.0.0.1:30000 with --sglang-url"
            ) from error
        except Unreachable as error:
            raise MissingRivalError(
                f"no answer from SGLang at {self._url} ({error}); start it, or check --sglang-url"
            ) from error
        described = _json(answer) if status == 200 else None
        self._model = described if isinstance(described, dict) else {}
        return {}

    def check(self) -> dict[str, Any]:
        """Nothing can be told of it alone: its pictures are compared with the other sides'."""
        return {"compared_with": "the other sides' pictures"}

    def others(self) -> dict[str, dict[str, Any]]:
        """Nothing besides its rounds."""
        return {}

    def paint(self, request: Request) -> Round:
        """Make a picture.

        Raises:
            SideError: The server is away, refuses, fails or answers nonsense.
        """
        if self._http is None:
            raise SideError(f"{self.name} is not started")
        body = self._body(request)
        self.part = self._stage.name
        begin = time.perf_counter()
        try:
            status, answer = self._http.exchange(
                ROUTE, body, limit=ANSWER_LIMIT, timeout=self._run_seconds
            )
        except Unreachable as error:
            raise SideError(
                f"no answer from SGLang at {self._url} to a picture's request ({error})"
            ) from error
        finally:
            self.part = ""
        total = time.perf_counter() - begin
        data = self._picture(status, _json(answer))
        image = open_picture(data, self._stage, f"SGLang at {self._url}")
        return Round(seconds={"total": total}, image=image, total_has_png=True, spans=2)

    def processes(self) -> tuple[int, ...]:
        """Not known."""
        return ()

    def device_memory_gib(self) -> dict[str, float] | None:
        """Not known."""
        return None

    def close(self) -> None:
        """The server is not ours and stays."""
        self._http = None

    def _body(self, request: Request) -> dict[str, Any]:
        stage = self._stage
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "size": f"{stage.width}x{stage.height}",
            "seed": request.seed,
            "generator_device": "cpu",  # where ComfyUI draws its noise
            "num_inference_steps": stage.steps,
            "guidance_scale": stage.cfg - 1,  # diffusers' formula for this model: 0 is off
            "n": 1,
            "response_format": "b64_json",
            "output_format": "png",
        }

    def _picture(self, status: int, answer: object) -> bytes:
        """The PNG file in an answer."""
        if status != 200:
            raise SideError(f"SGLang at {self._url} has status {status}: {_reason(answer)}")
        try:
            return base64.b64decode(answer["data"][0]["b64_json"], validate=True)  # type: ignore[index]
        except (LookupError, TypeError, ValueError) as error:
            raise SideError(
                f"unexpected answer from {self._url} to {ROUTE}: no picture as b64_json; check "
                "that this is the address of an SGLang diffusion server"
            ) from error


def _json(answer: bytes) -> object:
    try:
        value: object = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value


def _reason(answer: object) -> str:
    """Why, in the words of an error answer: OpenAI's form, or FastAPI's."""
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("detail", answer.get("message")))
        if isinstance(error, dict):
            error = error.get("message")
        if error:
            return one_line(error)
    return "no reason given"
