"""A whole picture with the workflow's own plan."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.conftest import Timed
from turbo.engine import Engine, Result
from turbo.pipeline import prepare_stage
from turbo.plan import DEFAULT_PLAN

ROUNDS = 2


@pytest.mark.benchmark(group="picture")
def test_a_whole_picture(timed: Timed, engine: Engine, benchmark: Any):
    results: list[Result] = []

    def paint() -> Result:
        results.append(engine.generate("a lighthouse on a cliff at dawn", seed=7))
        return results[-1]

    first = paint()  # the warm-up
    last = DEFAULT_PLAN.stages[-1]
    wanted = {
        stage.name: len(prepare_stage(engine.models.transformer, stage).trace.evaluations)
        for stage in DEFAULT_PLAN.stages
    }
    guided = {stage.name: 1 if stage.cfg == 1 else 2 for stage in DEFAULT_PLAN.stages}
    assert first.image.size == (last.width, last.height)
    assert len(first.image.getcolors(maxcolors=2**20) or []) > 1000  # of a noisy model: not flat
    assert {name: calls for name, (_, calls) in first.skips.items()} == {
        name: count * guided[name] for name, count in wanted.items()
    }
    timed(paint, ROUNDS, warm_up_rounds=0)
    if engine.models.device.type == "cpu":
        assert len({result.image.tobytes() for result in results}) == 1

    rounds = results[1:]
    benchmark.extra_info |= {
        "stages_ms": {
            part: [1000 * result.timings[part] for result in rounds] for part in first.timings
        },
        "skips": {name: list(pair) for name, pair in first.skips.items()},
        "network_calls": {name: calls - saved for name, (saved, calls) in first.skips.items()},
    }
