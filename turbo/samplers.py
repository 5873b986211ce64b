"""Samplers for a flow-matching model, with ComfyUI's meaning: pure functions over a latent.

Each follows ``denoise`` (noisy latent, sigma -> denoised latent) down a tuple of sigmas. Randomness
comes in as ``noise`` (sigma, next sigma -> a tensor like the latent); which kind a sampler wants
stands in `SAMPLERS`. Coefficients are Python floats, so no step reads anything back from a device.

Notation: ``x`` latent, ``d`` its slope (x - denoised) / sigma, ``lam`` = ln((1 - sigma) / sigma),
half the log signal-to-noise ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from turbo.sigmas import as_float32, shift_sigma

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[float, float], Tensor]
SampleFunction = Callable[[Denoise, Tensor, Sequence[float], Noise], Tensor]

UNI_PC_LAST_SIGMA = 0.001
"""What uni_pc puts in place of a final sigma of 0."""


def sample_euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """First-order steps along the slope. Source: arXiv:2206.00364, algorithm 1 uncorrected."""
    for sigma, sigma_next in pairwise(sigmas):
        x = x + _slope(denoise(x, sigma), x, sigma) * (sigma_next - sigma)
    return x


def sample_euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise
) -> Tensor:
    """Euler to a lower sigma, then fresh noise back up to the next one (eta = 1, flow form)."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
            continue
        down, scale, renoise = _ancestral_flow(sigma, sigma_next)
        x = (down / sigma) * x + (1 - down / sigma) * denoised
        x = scale * x + renoise * noise(sigma, sigma_next)
    return x


def sample_heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Euler, corrected with the slope at its end. Source: arXiv:2206.00364, algorithm 1."""
    for sigma, sigma_next in pairwise(sigmas):
        d = _slope(denoise(x, sigma), x, sigma)
        step = sigma_next - sigma
        if sigma_next > 0:
            ahead = x + d * step
            d = (d + _slope(denoise(ahead, sigma_next), ahead, sigma_next)) / 2
        x = x + d * step
    return x


def sample_dpm_2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Midpoint steps in the logarithm of sigma. Source: arXiv:2206.00927, DPM-Solver-2."""
    for sigma, sigma_next in pairwise(sigmas):
        x = _midpoint_step(denoise, x, sigma, sigma_next)
    return x


def sample_dpm_2_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise
) -> Tensor:
    """Midpoint steps to a lower sigma, then fresh noise (eta = 1, flow form)."""
    for sigma, sigma_next in pairwise(sigmas):
        if sigma_next == 0:
            x = _midpoint_step(denoise, x, sigma, 0.0)
            continue
        down, scale, renoise = _ancestral_flow(sigma, sigma_next)
        x = _midpoint_step(denoise, x, sigma, down)
        x = scale * x + renoise * noise(sigma, sigma_next)
    return x


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Second order from the two last estimates, in ln(sigma). Source: arXiv:2211.01095, 2M."""
    previous: Tensor | None = None
    h_previous = 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        estimate = denoised
        if previous is not None:
            weight = h / (2 * h_previous)
            estimate = (1 + weight) * denoised - weight * previous
        x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
        previous, h_previous = denoised, h
    return x


def sample_dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Stochastic two-stage steps, two network calls each (r = 1/2). Source: arXiv:2211.01095.

    The first estimate only serves to reach the middle: with r = 1/2 it has no weight in the end.
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
            continue
        middle, to_middle, to_end = _sde_coefficients(sigma, sigma_next)
        half = _sde_move(x, denoised, to_middle, noise(sigma, middle))
        x = _sde_move(x, denoise(half, middle), to_end, noise(sigma, sigma_next))
    return x


def sample_dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise
) -> Tensor:
    """Stochastic second order from the two last estimates, midpoint form (eta = 1)."""
    previous: Tensor | None = None
    h_previous = 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        h = _lambda(sigma_next) - _lambda(sigma)
        moved = -(1 - sigma_next) * math.expm1(-2 * h)
        x = (sigma_next / sigma) * math.exp(-h) * x + moved * denoised
        if previous is not None:
            x = x + 0.5 * moved * (h / h_previous) * (denoised - previous)
        x = x + noise(sigma, sigma_next) * (sigma_next * math.sqrt(-math.expm1(-2 * h)))
        previous, h_previous = denoised, h
    return x


def sample_dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise
) -> Tensor:
    """Stochastic third order from the three last estimates (eta = 1)."""
    history: list[Tensor] = []
    steps: list[float] = []
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            return denoised
        h = _lambda(sigma_next) - _lambda(sigma)
        clean = 1 - sigma_next
        x = (sigma_next / sigma) * math.exp(-h) * x - clean * math.expm1(-2 * h) * denoised
        phi_2 = math.expm1(-2 * h) / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        if len(history) == 1:
            x = x + (clean * phi_2 * h / steps[0]) * (denoised - history[0])
        elif history:
            r0, r1 = steps[0] / h, steps[1] / h
            e0, e1 = (denoised - history[0]) / r0, (history[0] - history[1]) / r1
            slope = e0 + (e0 - e1) * (r0 / (r0 + r1))
            x = x + clean * phi_2 * slope - (clean * phi_3 / (r0 + r1)) * (e0 - e1)
        x = x + noise(sigma, sigma_next) * (sigma_next * math.sqrt(-math.expm1(-2 * h)))
        history, steps = [denoised, *history[:1]], [h, *steps[:1]]
    return x


def sample_lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Jump to the estimate, then renoise it to the next sigma. Source: arXiv:2310.04378."""
    for sigma, sigma_next in pairwise(sigmas):
        x = denoise(x, sigma)
        if sigma_next > 0:
            x = sigma_next * noise(sigma, sigma_next) + (1 - sigma_next) * x
    return x


def sample_res_multistep(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise
) -> Tensor:
    """Second-order exponential multistep in -ln(sigma). Source: arXiv:2308.02157."""
    previous: Tensor | None = None
    sigma_previous = 0.0
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        if sigma_next == 0 or previous is None:
            x = x + _slope(denoised, x, sigma) * (sigma_next - sigma)
        else:
            h = math.log(sigma / sigma_next)
            c2 = -math.log(sigma_previous / sigma) / h
            phi_1 = -math.expm1(-h) / h
            phi_2 = (1 - phi_1) / h
            b2 = phi_2 / c2
            x = math.exp(-h) * x + h * ((phi_1 - b2) * denoised + b2 * previous)
        previous, sigma_previous = denoised, sigma
    return x


def sample_deis(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """Exponential integrator with extrapolated slopes, order 3. Source: arXiv:2204.13902 (tAB)."""
    slopes: list[Tensor] = []
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slopes = [_slope(denoise(x, sigma), x, sigma), *slopes[:2]]
        if sigma_next == 0 or len(slopes) == 1:
            x = x + slopes[0] * (sigma_next - sigma)
            continue
        levels = tuple(reversed(sigmas[step - len(slopes) + 1 : step + 2]))
        for weight, slope in zip(_deis_weights(levels), slopes):
            x = x + weight * slope
    return x


def sample_uni_pc(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
    """UniPC, order 3, predicting the data, B(h) = bh1. Source: arXiv:2302.04867.

    It works on x / sqrt(1 + sigma^2), where alpha = 1 / sqrt(1 + sigma^2) is the signal's share.
    The last sigma becomes 0.001, and the reference's result is divided by 1 - 0.001 besides.
    """
    levels = [*sigmas[:-1], UNI_PC_LAST_SIGMA] if sigmas[-1] == 0 else list(sigmas)
    steps = len(levels) - 1
    order = min(3, steps - 1)

    def estimate(state: Tensor, sigma: float) -> Tensor:
        return denoise(state * math.sqrt(1 + sigma**2), sigma)

    state = x / math.sqrt(1 + levels[0] ** 2)
    estimates = [estimate(state, levels[0])]
    # Of a single step the reference makes the evaluation and nothing else.
    for step in range(1, steps + 1 if order else 1):
        used = min(step, order, steps + 1 - step)
        window = levels[step - used : step + 1]
        history = estimates[-used:]
        last = step == steps
        state, update = _uni_pc_step(state, window, history)
        if not last:
            found = estimate(state, levels[step])
            state = update(found)
            estimates.append(found)
    return state * math.sqrt(1 + levels[-1] ** 2) / (1 - levels[-1])


def _uni_pc_step(
    x: Tensor, window: Sequence[float], history: Sequence[Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Predict the state at the window's last sigma; also return its corrector.

    `window` holds the sigmas that belong to `history`, oldest first, then the next one.
    """
    *older_lams, lam, lam_next = (_vp_scales(sigma)[2] for sigma in window)
    _, spread, _ = _vp_scales(window[-2])
    alpha_next, spread_next, _ = _vp_scales(window[-1])
    newest = history[-1]
    h = lam_next - lam
    if h == 0:  # a schedule that already ends at 0.001: there is nowhere to go
        return x, lambda found: x
    ratios = [(older - lam) / h for older in reversed(older_lams)]
    slopes = [(older - newest) / r for older, r in zip(reversed(history[:-1]), ratios)]
    base = (spread_next / spread) * x - alpha_next * math.expm1(-h) * newest
    predictor, corrector = _uni_pc_weights(-h, ratios)

    def combine(weights: Sequence[float], extra: Sequence[Tensor]) -> Tensor:
        result = base
        for weight, slope in zip(weights, [*slopes, *extra]):
            result = result - alpha_next * (-h) * weight * slope
        return result

    return combine(predictor, ()), lambda found: combine(corrector, (found - newest,))


def _vp_scales(sigma: float) -> tuple[float, float, float]:
    """Signal share, noise share and ln(signal / noise) of the variance-preserving form.

    In float32 by way of the logarithms, as the reference: at sigma 0.001 the noise share has two
    digits left, and the last step of its pictures shows it.
    """
    log_signal = 0.5 * torch.log(1 / (torch.tensor(sigma) ** 2 + 1))
    noise_share = 1 - torch.exp(2 * log_signal)
    lam = log_signal - 0.5 * noise_share.log()
    return float(log_signal.exp()), float(noise_share.sqrt()), float(lam)


def _uni_pc_weights(hh: float, ratios: Sequence[float]) -> tuple[list[float], list[float]]:
    order = len(ratios) + 1
    nodes = torch.tensor([*ratios, 1.0], dtype=torch.float64)
    phi = math.expm1(hh) / hh - 1
    targets = []
    factorial = 1
    for k in range(1, order + 1):
        targets.append(phi * factorial / hh)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    matrix = torch.stack([nodes**k for k in range(order)])
    wanted = torch.tensor(targets, dtype=torch.float64)
    corrector = [0.5] if order == 1 else torch.linalg.solve(matrix, wanted).tolist()
    if order == 2:
        return [0.5], corrector
    predictor = torch.linalg.solve(matrix[:-1, :-1], wanted[:-1]).tolist() if order > 2 else []
    return predictor, corrector


@lru_cache(maxsize=512)
def _deis_weights(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Weights of the slopes at ``levels[1:]`` (newest first) for a step to ``levels[0]``.

    In float32, operation by operation as the reference does it: ``0.002**2 + 1`` and small sigmas
    lose most of their digits there, and the reference's pictures hold that loss.
    """
    lowest, highest = ((torch.tensor(sigma) ** 2 + 1).log() for sigma in (0.002, 80.0))
    rise = 2 * (lowest / 1e-3 - highest) / (1e-3 - 1)
    start = highest - 0.5 * rise
    sigmas = torch.tensor(levels)
    end, *nodes = (((start**2 + 2 * rise * (sigmas**2 + 1).log()).sqrt() - start) / rise).unbind()
    tau = torch.linspace(float(nodes[0]), float(end), 10000)
    rise = (rise + start) - start
    alpha = torch.exp(-0.5 * tau**2 * rise - tau * start)
    integrand = -0.5 * (-tau * rise - start) / torch.sqrt(alpha * (1 - alpha))
    weights = []
    for j, node in enumerate(nodes):
        polynomial = torch.ones(())
        for k, other in enumerate(nodes):
            if k != j:
                polynomial = polynomial * ((tau - other) / (node - other))
        weights.append(float((integrand * polynomial).sum() * ((end - nodes[0]) / len(tau))))
    return tuple(weights)


def _slope(denoised: Tensor, x: Tensor, sigma: float) -> Tensor:
    return (x - denoised) / sigma


def _lambda(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def _midpoint_step(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    d = _slope(denoise(x, sigma), x, sigma)
    if sigma_next == 0:
        return x + d * (sigma_next - sigma)
    middle = math.sqrt(sigma * sigma_next)
    half = x + d * (middle - sigma)
    return x + _slope(denoise(half, middle), half, middle) * (sigma_next - sigma)


def _ancestral_flow(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, ...]:
    """Lower sigma to step to, then scale of the latent and of the noise that lead back up."""
    down = sigma_next * (1 + (sigma_next / sigma - 1) * eta)
    scale = (1 - sigma_next) / (1 - down)
    return down, scale, math.sqrt(sigma_next**2 - down**2 * scale**2)


def _sde_move(
    x: Tensor, denoised: Tensor, coefficients: tuple[float, float, float], noise: Tensor
) -> Tensor:
    kept, moved, fresh = coefficients
    return kept * x - moved * denoised + fresh * noise


@lru_cache(maxsize=512)
def _sde_coefficients(
    sigma: float, sigma_next: float
) -> tuple[float, tuple[float, float, float], tuple[float, float, float]]:
    """Middle sigma, then (kept, moved, fresh) of the half and of the full step of dpmpp_sde.

    In float32, operation by operation as the reference does it: near pure noise the differences of
    nearly equal squares lose half of float32's digits, and the reference's pictures hold that loss.
    """
    start, end = torch.tensor(sigma), torch.tensor(sigma_next)
    lam, lam_end = start.logit().neg(), end.logit().neg()
    lam_middle = lam + 0.5 * (lam_end - lam)
    middle = lam_middle.neg().sigmoid()
    clean = start * lam.exp()

    def step(target: Tensor, lam_target: Tensor) -> tuple[float, float, float]:
        level, level_target = lam.neg().exp(), lam_target.neg().exp()
        up = (level_target**2 * (level**2 - level_target**2) / level**2) ** 0.5
        up = torch.minimum(level_target, up)
        h = -((level_target**2 - up**2) ** 0.5).log() - lam
        clean_target = target * lam_target.exp()
        kept = clean_target / clean * (-h).exp()
        return float(kept), float(clean_target * (-h).expm1()), float(clean_target * up)

    return float(middle), step(middle, lam_middle), step(end, lam_end)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling function and what it needs from outside."""

    sample: SampleFunction
    """The function itself."""
    noise: str | None = None
    """Kind of noise it asks for: "ancestral", "brownian" or None."""


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(sample_euler),
    "euler_ancestral": Sampler(sample_euler_ancestral, "ancestral"),
    "heun": Sampler(sample_heun),
    "dpm_2": Sampler(sample_dpm_2),
    "dpm_2_ancestral": Sampler(sample_dpm_2_ancestral, "ancestral"),
    "dpmpp_2m": Sampler(sample_dpmpp_2m),
    "dpmpp_sde": Sampler(sample_dpmpp_sde, "brownian"),
    "dpmpp_2m_sde": Sampler(sample_dpmpp_2m_sde, "brownian"),
    "dpmpp_3m_sde": Sampler(sample_dpmpp_3m_sde, "brownian"),
    "lcm": Sampler(sample_lcm, "ancestral"),
    "ddim": Sampler(sample_euler),
    "uni_pc": Sampler(sample_uni_pc),
    "res_multistep": Sampler(sample_res_multistep),
    "deis": Sampler(sample_deis),
}
"""Samplers by ComfyUI's names."""


def sampler_sigmas(name: str, sigmas: Sequence[float], shift: float) -> tuple[float, ...]:
    """The sigmas a sampler really follows: stochastic solvers cannot start at pure noise.

    Their lambda is infinite at sigma 1, so a first sigma of 1 or more becomes ``S(1 - 0.0001)``.
    """
    if SAMPLERS[name].noise == "brownian" and sigmas and sigmas[0] >= 1:
        return (as_float32(shift_sigma(1 - 1e-4, shift)), *sigmas[1:])
    return tuple(sigmas)


@dataclass(frozen=True, slots=True)
class SamplerTrace:
    """What a sampler will ask for, known before it runs."""

    evaluations: tuple[float, ...]
    """Sigma of each network evaluation, in order."""
    noises: tuple[tuple[float, float], ...]
    """(sigma, next sigma) of each noise asked for, in order."""


def trace_sampler(name: str, sigmas: Sequence[float]) -> SamplerTrace:
    """List a sampler's network evaluations and noise draws by running it on a single zero."""
    evaluations: list[float] = []
    noises: list[tuple[float, float]] = []
    zero = torch.zeros(1)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        evaluations.append(sigma)
        return zero

    def noise(sigma: float, sigma_next: float) -> Tensor:
        noises.append((sigma, sigma_next))
        return zero

    SAMPLERS[name].sample(denoise, zero, sigmas, noise)
    return SamplerTrace(tuple(evaluations), tuple(noises))
