"""Which files pictures go to, found out before the work and kept to after it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbo.errors import BadInputError, SaveError
from turbo.messages import reason
from turbo.whole_file import require_writable_folder

if TYPE_CHECKING:
    from PIL.Image import Image

    from turbo.engine import Result

SUFFIX = ".png"
NAMES_LIMIT = 100_000


@dataclass(frozen=True)
class Outputs:
    """Which files the pictures go to."""

    given: Path | None
    """The name asked for; None makes one from the seed, never one that is taken."""
    count: int
    """Pictures in all; with several, the name asked for gets a number."""
    has_metadata: bool
    """Whether the files say what made them."""

    @classmethod
    def of(cls, args: Namespace) -> Outputs:
        """The outputs that the flags ask for.

        Raises:
            BadInputError: The name does not end in .png.
        """
        given = None
        if args.output is not None:
            if os.path.splitext(os.path.basename(args.output))[1].lower() != SUFFIX:
                raise BadInputError(f"-o must be a name that ends in {SUFFIX}, got {args.output!r}")
            given = Path(os.path.expanduser(args.output))
        return cls(given, args.n, not args.no_metadata)

    def check(self, stages: Sequence[str] = ()) -> None:
        """Find out before the work whether the pictures can be saved.

        Args:
            stages: Names of the stages that are saved as well.

        Raises:
            BadInputError: A name is a folder's, lies in none, or cannot be a file's.
            SaveError: The folder cannot be written.
        """
        require_writable_folder(Path() if self.given is None else self.given.parent)
        if self.given is not None:
            for path in (self.path(0, number) for number in range(1, self.count + 1)):
                _require_file_name(path)
                for stage in stages:
                    _require_file_name(_stage_path(path, stage))

    def path(self, seed: int, number: int) -> Path:
        """Where picture `number` (from 1) of `seed` goes if no file is in the way."""
        if self.given is None:
            return Path(f"turbo-{seed}{SUFFIX}")
        if self.count == 1:
            return self.given
        return self.given.with_name(f"{self.given.stem}-{number}{SUFFIX}")

    def save(self, result: Result, number: int, last_stage: str) -> Saved:
        """Save picture `number` and, if they were kept, the stages before the last.

        Raises:
            SaveError: It cannot be written; nothing is left under the name that failed.
        """
        path = self._save_picture(result, number)
        kept = result.stage_images[0] if result.stage_images else {}
        stages = {}
        for name, image in kept.items():
            if name != last_stage:
                stages[name] = _stage_path(path, name)
                self._write(image, stages[name], {**result.metadata[0], "stage": name})
        return Saved(path, stages)

    def _save_picture(self, result: Result, number: int) -> Path:
        wanted = self.path(result.seed, number)
        if self.given is not None:
            self._write(result.image, wanted, result.metadata[0])
            return wanted
        for path in _free_names(wanted):
            try:
                self._write(result.image, path, result.metadata[0], overwrite=False)
            except FileExistsError:
                continue
            return path
        raise SaveError(f"every name from {str(wanted)!r} on is taken; give one with -o")

    def _write(
        self, image: Image, path: Path, metadata: dict[str, Any], *, overwrite: bool = True
    ) -> None:
        from turbo.image_file import save_png

        save_png(image, path, metadata=metadata if self.has_metadata else None, overwrite=overwrite)


@dataclass(frozen=True)
class Saved:
    """The files of one picture."""

    path: Path
    stages: dict[str, Path]


def _stage_path(path: Path, stage: str) -> Path:
    return path.with_name(f"{path.stem}-{stage}{SUFFIX}")


def _require_file_name(path: Path) -> None:
    if os.path.isdir(path):
        raise BadInputError(f"-o must be a file, but {str(path)!r} is a folder")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, say
        raise BadInputError(
            f"{str(path)!r} cannot be a file: {reason(error)}; give another -o"
        ) from None


def _free_names(path: Path) -> Iterator[Path]:
    """`path`, then with -2, -3, ... before the suffix; those for which any file exists left out."""
    for number in range(1, NAMES_LIMIT):
        name = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not name.exists():
            yield name
