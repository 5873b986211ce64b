"""An SGLang server as a side of a comparison, over the OpenAI images API.

The plan's single stage is what it is asked for; the server's own sampler and schedule for the model
run it. Times are wall times of a request: coding the PNG and its transfer are in `total`, and for
ratios the other side's PNG is added to its total.

Source: https://github.com/sgl-project/sglang (docs/diffusion/openai_api.md).
"""

from __future__ import annotations

import time
from typing import Any

from bench.images_api import AnswerError, post, read_answer, read_json, request_body
from bench.side import MissingRivalError, OutsideSide, Request, Round, SideError
from bench.single_stage import only_stage
from turbo.comfyui_http import ServerHttp, Unreachable
from turbo.errors import BadInputError
from turbo.messages import one_line
from turbo.plan import Plan

ASK_SECONDS = 30.0
INCLUDED = ("coding the PNG", "its transfer")
"""In `total`, and not told apart."""


class SglangSide(OutsideSide):
    """A running server.

    Args:
        url: Its address without the route; None is an error that says what to give.
        plan: Its single stage gives size, steps and guidance.
        name: Its name in the comparison.
        approximate: Whether the server was started with options that change the picture.
        best: Whether it was started with its fastest options.
        run_seconds: How long a picture may take.
    """

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
        super().__init__(name, approximate=approximate, best=best)
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
        described = read_json(answer) if status == 200 else None
        self._model = described if isinstance(described, dict) else {}
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
            status, answer = post(self._http, body, self._run_seconds)
        except Unreachable as error:
            raise SideError(
                f"no answer from SGLang at {self._url} to a picture's request ({error})"
            ) from error
        finally:
            self.part = ""
        total = time.perf_counter() - begin
        try:
            image, _ = read_answer(status, answer, (self._stage.width, self._stage.height))
        except AnswerError as error:
            raise SideError(f"SGLang at {self._url}: {error}") from error
        return Round(seconds={"total": total}, image=image, total_has_png=True, spans=2)

    def close(self) -> None:
        """The server is not ours and stays."""
        self._http = None

    def _body(self, request: Request) -> dict[str, Any]:
        stage = self._stage
        return request_body(
            request.prompt,
            (stage.width, stage.height),
            request.seed,
            negative_prompt=request.negative_prompt,
            generator_device="cpu",  # where ComfyUI draws its noise
            num_inference_steps=stage.steps,
            guidance_scale=stage.cfg - 1,  # diffusers' formula for this model: 0 is off
            output_format="png",
        )
