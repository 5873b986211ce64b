"""OpenAI's images API as a client of the benchmark's uses it: one picture a request, checked.

Source: https://platform.openai.com/docs/api-reference/images/create; SGLang's answers are like it
(https://github.com/sgl-project/sglang, docs/diffusion/openai_api.md).
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, NoReturn

from PIL import Image

from bench.pictures import decode_picture
from bench.side import SideError
from turbo.comfyui_http import ServerHttp
from turbo.messages import one_line

ROUTE = "/v1/images/generations"
ANSWER_LIMIT = 512 * 2**20
"""Largest answer, in bytes."""


class AnswerError(SideError):
    """An answer that is an error, or no picture as it was asked for."""


def request_body(prompt: str, size: tuple[int, int], seed: int, **more: Any) -> dict[str, Any]:
    """What asks for one picture of (width, height) pixels."""
    width, height = size
    asked = {"prompt": prompt, "n": 1, "size": f"{width}x{height}", "seed": seed}
    return {**asked, "response_format": "b64_json", **more}


def post(http: ServerHttp, body: dict[str, Any], timeout_s: float) -> tuple[int, bytes]:
    """Send a request; returns status and answer, for `read_answer`.

    Raises:
        Unreachable: No whole answer came in time.
    """
    return http.exchange(ROUTE, body, limit=ANSWER_LIMIT, timeout=timeout_s)


def read_answer(
    status: int, answer: bytes, size: tuple[int, int], formats: tuple[str, ...] = ("PNG",)
) -> tuple[Image.Image, dict[str, Any]]:
    """The picture in an answer, RGB, and all that the answer says.

    Raises:
        AnswerError: The server refused, or the picture is missing, damaged or of another size.
    """
    data = read_json(answer)
    if status != 200:
        _refuse(status, data)
    if not isinstance(data, dict):
        raise AnswerError("the answer is no JSON object")
    try:
        image = decode_picture(_coded_picture(data), formats)
    except ValueError as error:
        raise AnswerError("the answer's picture cannot be decoded") from error
    if image.size != size:
        raise AnswerError(
            f"a picture of {image.width}x{image.height} came, asked for was {size[0]}x{size[1]}"
        )
    return image, data


def read_json(answer: bytes) -> object:
    """An answer's value; None if it is no JSON."""
    try:
        value: object = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value


def _refuse(status: int, data: object) -> NoReturn:
    """Raise the error that a server reported, in its own words: OpenAI's form, or FastAPI's."""
    said: object = data
    if isinstance(data, dict):
        said = data.get("error", data.get("detail", data.get("message")))
    if isinstance(said, dict):
        said = said.get("message")
    shown = f": {one_line(said, limit=160)}" if isinstance(said, str) and said else ""
    raise AnswerError(f"status {status}{shown}")


def _coded_picture(data: dict[str, Any]) -> bytes:
    pictures = data.get("data")
    first = pictures[0] if isinstance(pictures, list) and pictures else None
    encoded = first.get("b64_json") if isinstance(first, dict) else None
    if not isinstance(encoded, str):
        raise AnswerError("the answer has no data[0].b64_json")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise AnswerError("the answer's picture cannot be decoded") from error
