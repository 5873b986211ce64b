"""What the measuring commands are told: model, plan, requests; and what the results say of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.arguments import whole, without_folders
from bench.described import describe_model
from bench.endings import FAILED, OK, exit_code, require_packages, require_writable
from bench.machine import describe_machine
from bench.results import FORMAT, Results
from bench.side import Request
from bench.turbo_side import LoadedModel
from turbo.engine import pick_device, pick_dtype
from turbo.errors import BadInputError
from turbo.model_files import ModelFiles
from turbo.noise import check_seed
from turbo.pipeline import Models
from turbo.plan import DEFAULT_PLAN, QUANTIZE, ModelSettings, Plan, load_plan, plan_to_dict
from turbo.precision import arithmetic_dtype
from turbo.transformer import padded_length

PROMPT = "a lighthouse on a cliff at dawn, waves below"
NEGATIVE_PROMPT = "blurry, low quality"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    group = parser.add_argument_group("what is measured")
    group.add_argument("--model", metavar="PATH", help="as turbo generate; default: built-in model")
    group.add_argument("--tokenizer", metavar="FOLDER", help="if not found through the model")
    group.add_argument("--plan", metavar="FILE.yaml", help="default: the three-stage workflow")
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument("--dtype", default="auto", help="default: bfloat16 on CUDA, else float32")
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        default="auto",
        help="the network in 8 bits; auto (default): as its file has it",
    )
    group.add_argument(
        "--threads", type=whole(1, 4096), help="CPU threads (default: PyTorch's choice)"
    )
    group.add_argument("--prompt", default=PROMPT, help="each round's adds its number")
    group.add_argument("--negative", default=NEGATIVE_PROMPT)
    group.add_argument("--seed", type=int, default=42, help="of every picture (default: 42)")


def add_round_options(parser: argparse.ArgumentParser) -> None:
    """How often, and where to."""
    parser.add_argument(
        "--rounds", type=whole(1, 10_000), default=3, help="pictures a side (default: 3)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.json", help="results file; pictures beside it"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A loaded model with the plan and the requests to measure it with."""

    options: argparse.Namespace
    loaded: LoadedModel
    plan: Plan

    @property
    def models(self) -> Models:
        return self.loaded.engine.models

    @property
    def files(self) -> ModelFiles:
        return self.loaded.engine.files

    @classmethod
    def load(cls, options: argparse.Namespace) -> Subject:
        """Load what the options name.

        Raises:
            TurboError: It cannot be used, or does not stay in memory.
        """
        check_seed(options.seed)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        plan = load_plan(options.plan) if options.plan else DEFAULT_PLAN
        given = plan.model.device if options.device == "auto" else options.device
        device = pick_device(given)
        loaded = LoadedModel.load(
            options.model,
            tokenizer=options.tokenizer,
            device=device,
            dtype=pick_dtype(options.dtype, device),
            quantize=None if options.quantize == "auto" else options.quantize,
            plan=plan,
        )
        if loaded.engine.memory.moves:
            raise BadInputError(
                f"what is measured must stay in memory, and memory {loaded.engine.memory.name!r} "
                "moves it; give a plan with performance: {memory: fast}, a device with more memory "
                "or --quantize"
            )
        return cls(options=options, loaded=loaded, plan=plan)

    def request(self, number: int) -> Request:
        """A round's request: with new prompts, so that no side has their features already."""
        options = self.options
        return Request(
            prompt=f"{options.prompt}, take {number}",
            negative_prompt=f"{options.negative}, take {number}",
            seed=options.seed,
        )

    def requests(self) -> list[Request]:
        """All of them, that of the picture which is not timed in front."""
        return [self.request(number) for number in range(self.options.rounds + 1)]

    def buckets(self) -> tuple[int, ...]:
        """Padded lengths of all prompts that the rounds will ask for."""
        return tuple(sorted({length for one in self.requests() for length in self._lengths(one)}))

    def warm_up_requests(self) -> list[Request]:
        """One for every pair of padded prompt lengths that only later pictures than the first have.

        A program that compiles for each pair needs them before anything is timed.
        """
        by_lengths = {self._lengths(one): one for one in reversed(self.requests())}
        del by_lengths[self._lengths(self.request(0))]
        return [*by_lengths.values()]

    def _lengths(self, request: Request) -> tuple[int, int]:
        encode = self.models.tokenizer.encode_prompt
        return (
            padded_length(len(encode(request.prompt))),
            padded_length(len(encode(request.negative_prompt))),
        )

    def without_easycache(self) -> Plan:
        """The plan with every network call made."""
        stages = tuple(replace(stage, easycache=None) for stage in self.plan.stages)
        return replace(self.plan, stages=stages)

    @property
    def has_easycache(self) -> bool:
        return any(stage.easycache for stage in self.plan.resolved().stages)

    @property
    def strict(self) -> bool:
        """Whether two exact sides must agree to rounding: they must where all is float32.

        Not where a value near the middle of two 8-bit ones may become either.
        """
        return self.models.dtype == torch.float32 and self.models.transformer.quantize is None

    @property
    def product_dtype(self) -> torch.dtype:
        """What the network's matrix products are calculated in here."""
        return arithmetic_dtype(self.models.dtype, self.models.device) or self.models.dtype

    def header(self, kind: str, arguments: Sequence[str]) -> dict[str, Any]:
        """How a results file begins."""
        return {
            "format": FORMAT,
            "kind": kind,
            "command": [kind, *without_folders(arguments)],
            "machine": describe_machine(str(self.models.device)),
            "configuration": self.configuration(),
        }

    def configuration(self) -> dict[str, Any]:
        """Everything that the pictures depend on."""
        options, models = self.options, self.models
        return {
            "model": describe_model(models, _model_name(options.model, self.files)),
            "plan": plan_to_dict(replace(self.plan, model=ModelSettings())),
            "prompt": options.prompt,
            "negative_prompt": options.negative,
            "seed": options.seed,
            "dtype": str(models.dtype).removeprefix("torch."),
            "quantize": models.transformer.quantize,
            "device": models.device.type,
            "warm_up_rounds": 1,
        }


def run_command(
    options: argparse.Namespace,
    work: Callable[[], Results],
    report: Callable[[Results], None],
) -> int:
    """Run a command's work, whose errors are one line each, and report it.

    Returns:
        As `exit_code`; 1 also if one side of several failed.
    """

    def work_and_report() -> int:
        require_packages("diffusers", "psutil")
        require_writable(options.output)
        results = work()
        report(results)
        return FAILED if results.data["partial"] else OK

    return exit_code(work_and_report)


def _model_name(given: str | None, files: ModelFiles) -> str:
    return "built-in" if given is None else f"{Path(given).name}/{files.network.name}"
