"""Results as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lines_of(results: Mapping[str, Any]) -> Iterator[str]:
    """The figures of `bench run` and `bench compare`."""
    for name, side in results["sides"].items():
        marks = [mark for mark in ("best", "approximate") if side.get(mark)]
        yield f"{name} ({', '.join(marks)})" if marks else name
        withheld = side.get("check", {}).get("withheld")
        if withheld:
            yield f"  no figures: {withheld}"
        yield from _time_lines(side)
        if included := side.get("settings", {}).get("total_includes"):
            yield f"  total includes {' and '.join(included)}; in ratios the other's PNG is added"
        yield from _memory_lines(side)
    if "withheld" in results.get("limit", {}):
        yield f"no shares of the limit: {results['limit']['withheld']}"
    for pair, parts in results.get("ratios", {}).items():
        shown = (
            f"{part} {one['median']:.3f} [{one['p20']:.3f} {one['p80']:.3f}]"
            for part, one in parts.items()
        )
        yield f"{pair}: {', '.join(shown)}"
    for pair, compared in results.get("pictures", {}).items():
        yield f"pictures, {pair}: {_picture_line(compared[-1])}"
    for program, steps in results.get("cold_start", {}).items():
        yield f"cold start, {program}: {', '.join(f'{k} {v:.1f} s' for k, v in steps.items())}"


def _time_lines(side: Mapping[str, Any]) -> Iterator[str]:
    for step, seconds in side.get("start", {}).items():
        yield f"  {step:24} {seconds:10.3f} s"
    for part, timed in side.get("times", {}).items():
        share = side.get("share_of_limit", {}).get(part)
        median, *spread = (_ms(timed[f"{key}_ms"]) for key in ("median", "p20", "p80", "p95"))
        limit = f"  {share:6.1%} of the limit" if share else ""
        shown = f"  {part:24} {median:>10} ms [{' '.join(spread)}]"
        yield f"{shown}{limit}{_calls(side, part)}"


def _ms(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def _calls(side: Mapping[str, Any], part: str) -> str:
    calls = side.get("network", {}).get(part)
    saved, wanted = side.get("skips", {}).get(part, (0, 0))
    shown = f"  {calls['calls_per_picture']} calls of {calls['median_ms']:.1f} ms" if calls else ""
    return f"{shown}  {saved} of {wanted} skipped" if saved else shown


def _memory_lines(side: Mapping[str, Any]) -> Iterator[str]:
    memory = side.get("memory", {})
    if memory.get("host_peak_gib"):
        shared = memory.get("shared_with")
        others = f", of one process with {' and '.join(shared)}" if shared else ""
        yield f"  {'peak host memory':24} {memory['host_peak_gib']:10.3f} GiB{others}"
    for part, peak in memory.get("device", {}).items():
        yield (
            f"  {f'peak memory, {part}':24} "
            + ", ".join(f"{gib:.3f} GiB {name.removesuffix('_gib')}" for name, gib in peak.items())
        )
    if side.get("overhead_share") is not None:
        yield f"  {'own overhead':24} {side['overhead_share']:10.4%}"


def _picture_line(found: Mapping[str, Any]) -> str:
    if found["identical"]:
        return "identical"
    latents = found.get("latent", {}).items()
    apart = (f", latent of {stage} {distance:.2g} apart" for stage, distance in latents)
    return (
        f"{found['psnr_db']:.1f} dB, SSIM {found['ssim']:.4f}, largest difference "
        f"{found['largest']} of 255{''.join(apart)}"
    )
