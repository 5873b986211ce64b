"""Noise schedules with ComfyUI's meaning: plain functions that return falling sigmas.

Every function returns Python floats that are exact float32 values. `shift` is the flow-matching
shift s of ``S(t) = s t / (1 + (s - 1) t)``; the table of 1000 shifted sigmas stands for the model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from turbo.errors import BadInputError
from turbo.plan import Stage

TIMESTEPS = 1000
DROP_PENULTIMATE = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc"})
"""Samplers for which a KSampler makes one step more and drops the next-to-last sigma."""


def as_float32(value: float) -> float:
    """The float32 value nearest to `value`: the reference's sigmas are float32 everywhere."""
    return struct.unpack("f", struct.pack("f", value))[0]  # type: ignore[no-any-return]


def shift_sigma(t: float, shift: float) -> float:
    """``S(t)``: push noise levels towards 1; the identity for shift 1."""
    return shift * t / (1 + (shift - 1) * t)


def percent_to_sigma(percent: float, shift: float) -> float:
    """Noise level at which a share of the schedule is done; exactly 1 and 0 at its ends."""
    if percent <= 0:
        return 1.0
    if percent >= 1:
        return 0.0
    return shift_sigma(1 - percent, shift)


def stage_sigmas(stage: Stage) -> tuple[float, ...]:
    """The falling noise levels of a stage: one denoising step for each neighbouring pair.

    Raises:
        BadInputError: The scheduler cannot make that many different steps.
    """
    if stage.node == "ksampler":
        sigmas = ksampler_sigmas(
            stage.scheduler,
            stage.steps,
            stage.denoise,
            stage.shift,
            drop_penultimate=stage.sampler in DROP_PENULTIMATE,
        )
    elif stage.scheduler == "flowmatch_node":
        sigmas = flowmatch_node_sigmas(stage.steps, stage.shift)
        sigmas = sigmas if stage.denoise >= 1 else _partial_flowmatch(stage)
    else:
        sigmas = basic_sigmas(stage.scheduler, stage.steps, stage.denoise, stage.shift)
    require_falling(stage, sigmas)
    return sigmas


def require_falling(stage: Stage, sigmas: Sequence[float]) -> None:
    """Refuse a schedule that does not fall at every step, which no sampler can follow.

    Raises:
        BadInputError: Two sigmas are equal (more steps than the model has sigmas), or one is NaN.
    """
    if not all(sigma > sigma_next for sigma, sigma_next in pairwise(sigmas)):
        raise BadInputError(
            f"scheduler {stage.scheduler!r} has no falling schedule for the {stage.steps} step(s) "
            f"at denoise {stage.denoise:g} of {stage.name}; use other steps, a larger denoise or "
            "another scheduler"
        )


def ksampler_sigmas(
    scheduler: str, steps: int, denoise: float, shift: float, *, drop_penultimate: bool = False
) -> tuple[float, ...]:
    """What a KSampler node makes of a scheduler name: its last `steps` + 1 values of a longer run.

    Args:
        scheduler: A key of `SCHEDULES`.
        steps: Denoising steps.
        denoise: Share of the schedule to run, in (0, 1]; the full schedule has steps / denoise.
        shift: Flow-matching shift.
        drop_penultimate: The sampler is one of `DROP_PENULTIMATE`.
    """

    def full(count: int) -> tuple[float, ...]:
        if not drop_penultimate:
            return full_sigmas(scheduler, count, shift)
        sigmas = full_sigmas(scheduler, count + 1, shift)
        return (*sigmas[:-2], sigmas[-1])

    if denoise > 0.9999:
        return full(steps)
    return full(int(steps / denoise))[-(steps + 1) :]


def basic_sigmas(scheduler: str, steps: int, denoise: float, shift: float) -> tuple[float, ...]:
    """What a BasicScheduler node makes of a scheduler name; always cut to the last steps + 1."""
    total = int(steps / denoise) if denoise < 1 else steps
    return full_sigmas(scheduler, total, shift)[-(steps + 1) :]


def flowmatch_node_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """The separate FlowMatchEulerDiscrete sigmas node; the smallest sigma is shifted twice."""
    line = torch.linspace(1, shift_sigma(1 / TIMESTEPS, shift), steps, dtype=torch.float64)
    return _falling(shift * line / (1 + (shift - 1) * line))


def _partial_flowmatch(stage: Stage) -> tuple[float, ...]:
    total = int(stage.steps / stage.denoise)
    return flowmatch_node_sigmas(total, stage.shift)[-(stage.steps + 1) :]


@lru_cache(maxsize=256)
def full_sigmas(scheduler: str, steps: int, shift: float) -> tuple[float, ...]:
    """The whole schedule of a scheduler name, from the largest sigma to 0."""
    return SCHEDULES[scheduler](steps, shift)


@lru_cache(maxsize=16)
def sigma_table(shift: float) -> Tensor:
    """The 1000 sigmas of the model, rising, float32."""
    t = torch.arange(1, TIMESTEPS + 1) / TIMESTEPS
    return shift * t / (1 + (shift - 1) * t)


def _range(shift: float) -> tuple[float, float]:
    table = sigma_table(shift)
    return float(table[0]), float(table[-1])


def _falling(sigmas: Tensor) -> tuple[float, ...]:
    return (*sigmas.float().tolist(), 0.0)


def _simple(steps: int, shift: float) -> tuple[float, ...]:
    stride = TIMESTEPS / steps
    indices = [TIMESTEPS - 1 - int(k * stride) for k in range(steps)]
    return _falling(sigma_table(shift)[indices])


def _ddim_uniform(steps: int, shift: float) -> tuple[float, ...]:
    stride = max(TIMESTEPS // steps, 1)
    return _falling(sigma_table(shift)[1::stride].flip(0))


def _normal(steps: int, shift: float) -> tuple[float, ...]:
    lowest, highest = _range(shift)
    line = torch.linspace(highest, lowest, steps)  # already shifted, and shifted once more here
    return _falling(shift * line / (1 + (shift - 1) * line))


def _sgm_uniform(steps: int, shift: float) -> tuple[float, ...]:
    lowest, highest = _range(shift)
    line = torch.linspace(highest, lowest, steps + 1)[:-1]
    return _falling(shift * line / (1 + (shift - 1) * line))


def _karras(steps: int, shift: float, rho: float = 7.0) -> tuple[float, ...]:
    """Karras et al. 2022 (arXiv:2206.00364), equation 5."""
    lowest, highest = (sigma ** (1 / rho) for sigma in _range(shift))
    return _falling((highest + torch.linspace(0, 1, steps) * (lowest - highest)) ** rho)


def _exponential(steps: int, shift: float) -> tuple[float, ...]:
    lowest, highest = _range(shift)
    return _falling(torch.linspace(math.log(highest), math.log(lowest), steps).exp())


def _beta(steps: int, shift: float, alpha: float = 0.6, beta: float = 0.6) -> tuple[float, ...]:
    """Quantiles of a beta distribution: more steps at both ends (arXiv:2407.12173)."""
    from scipy.special import betaincinv

    quantiles = (float(betaincinv(alpha, beta, 1 - k / steps)) for k in range(steps))
    indices = [round(quantile * (TIMESTEPS - 1)) for quantile in quantiles]
    kept = [index for k, index in enumerate(indices) if k == 0 or index != indices[k - 1]]
    return _falling(sigma_table(shift)[kept])


def _linear_quadratic(steps: int, shift: float, threshold: float = 0.025) -> tuple[float, ...]:
    """Small equal steps first, then growing ones (Movie Gen, arXiv:2410.13720)."""
    _, highest = _range(shift)
    if steps == 1:
        return (highest, 0.0)
    linear = steps // 2
    slope = threshold / linear
    excess = linear - threshold * steps
    square = excess / (linear * (steps - linear) ** 2)
    line = slope - 2 * excess / (steps - linear) ** 2
    offset = square * linear**2
    done = [k * slope for k in range(linear)]
    done += [square * k**2 + line * k + offset for k in range(linear, steps)]
    return _falling(torch.tensor([1 - share for share in done]) * highest)


def _kl_optimal(steps: int, shift: float) -> tuple[float, ...]:
    """Align Your Steps, closed form (arXiv:2404.14507): straight in the arc tangent of sigma."""
    lowest, highest = (math.atan(sigma) for sigma in _range(shift))
    if steps == 1:
        return (math.nan, 0.0)  # the reference divides 0 by 0
    share = torch.arange(steps) / (steps - 1)
    return _falling((share * lowest + (1 - share) * highest).tan())


def _flowmatch_scheduler(steps: int, shift: float) -> tuple[float, ...]:
    """The scheduler name of that node pack in a KSampler: a straight line, whatever the shift."""
    return _falling(torch.linspace(1, 1 / TIMESTEPS, steps))


SCHEDULES: dict[str, Callable[[int, float], tuple[float, ...]]] = {
    "simple": _simple,
    "normal": _normal,
    "beta": _beta,
    "sgm_uniform": _sgm_uniform,
    "ddim_uniform": _ddim_uniform,
    "karras": _karras,
    "exponential": _exponential,
    "linear_quadratic": _linear_quadratic,
    "kl_optimal": _kl_optimal,
    "FlowMatchEulerDiscreteScheduler": _flowmatch_scheduler,
}
"""Full schedules by ComfyUI's scheduler names, (steps, shift) -> falling sigmas ending in 0."""
