"""turbo's samplers as a scheduler of diffusers, so that its pipelines follow the same plan.

A pipeline calls a scheduler once after each network call; a sampler calls the network whenever it
wants. A generator-like worker thread turns one into the other: the sampler runs until it needs the
network, hands over the latent, and waits for the pipeline's answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from turbo.latent import from_sampler
from turbo.pipeline import PreparedStage, StageNoise
from turbo.samplers import SAMPLERS

_STOP = object()


class SamplerScheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Walks one stage's schedule with its sampler; made anew for each picture's stage.

    Args:
        prepared: The stage.
        noise: Its random numbers.
        start: The noisy latent that it begins with, as the sampler sees it.
    """

    def __init__(self, prepared: PreparedStage, noise: StageNoise, start: Tensor) -> None:
        super().__init__()
        self._evaluations = prepared.trace.evaluations
        self._worker = _Worker(lambda denoise: _sample(prepared, noise, start, denoise))
        self.latent, _ = self._worker.begin()
        """The latent of the first network call."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        **_: Any,
    ) -> None:
        """The sampler's own evaluations, whatever the pipeline asks for."""
        sigmas = torch.tensor(self._evaluations, dtype=torch.float32, device=device)
        self.sigmas = sigmas
        self.timesteps = sigmas * 1000
        self._done = 0

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:
        """Give the sampler a network call's answer; returns the latent of the next call."""
        denoised = sample - self._evaluations[self._done] * model_output
        self._done += 1
        latent, sigma = self._worker.answer(denoised)
        if sigma is not None and sigma != self._evaluations[self._done]:
            raise RuntimeError(f"the sampler asks at sigma {sigma}, not as its trace did")
        return (latent,)

    def close(self) -> None:
        """End a sampler that was left in the middle."""
        self._worker.close()


def _sample(
    prepared: PreparedStage,
    noise: StageNoise,
    start: Tensor,
    denoise: Callable[[Tensor, float], Tensor],
) -> Tensor:
    draws = iter(noise.steps)
    sample = SAMPLERS[prepared.stage.sampler].sample
    return from_sampler(
        sample(denoise, start, prepared.followed, lambda sigma, sigma_next: next(draws))
    )


class _StoppedError(Exception):
    """The pipeline wants no more."""


class _Worker:
    """Runs a function that calls back, one call at a time, under somebody else's control."""

    def __init__(self, run: Callable[[Callable[[Tensor, float], Tensor]], Tensor]) -> None:
        self._run = run
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def begin(self) -> tuple[Tensor, float | None]:
        self._thread.start()
        return self._next()

    def answer(self, denoised: Tensor) -> tuple[Tensor, float | None]:
        self._answers.put(denoised)
        return self._next()

    def close(self) -> None:
        self._answers.put(_STOP)
        self._thread.join()

    def _next(self) -> tuple[Tensor, float | None]:
        """The latent and sigma of the next call; the sampler's result and None at its end."""
        asked = self._asked.get()
        if isinstance(asked, BaseException):
            raise asked
        latent, sigma = asked
        return latent, sigma

    def _work(self) -> None:
        try:
            with torch.inference_mode():  # a thread has its own mode
                self._asked.put((self._run(self._denoise), None))
        except _StoppedError:
            pass
        except BaseException as error:
            self._asked.put(error)

    def _denoise(self, latent: Tensor, sigma: float) -> Tensor:
        self._asked.put((latent, sigma))
        answer = self._answers.get()
        if answer is _STOP:
            raise _StoppedError
        denoised: Tensor = answer
        return denoised
