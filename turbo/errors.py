"""Every error that `turbo` raises on purpose.

Two families, which the command line turns into exit codes: `BadInputError` (2: what was given
cannot work, nothing was started) and `FailureError` (1: the input was fine, the work failed). A
message is one line: what was given, what is allowed, how to fix it.
"""

from __future__ import annotations


class TurboError(Exception):
    """Base of every error raised on purpose."""


class BadInputError(TurboError, ValueError):
    """The request, a setting or a file cannot be used as given."""


class PlanError(BadInputError):
    """A plan holds an unknown key or an impossible value."""


class CheckpointError(BadInputError):
    """A model file or folder is missing, damaged, of a refused format or of another model."""


class TokenizerNotFoundError(CheckpointError):
    """No tokenizer data was found in any of the places searched."""


class LoraError(BadInputError):
    """A LoRA file is damaged or does not fit the model."""


class WorkflowError(BadInputError):
    """A ComfyUI workflow cannot be read as a plan."""


class FailureError(TurboError, RuntimeError):
    """The input was usable but the work failed."""


class NonFiniteLatentError(FailureError):
    """A stage ended in NaN or infinity; no picture was made."""


class AccelerationError(FailureError):
    """Something could not be compiled or captured, and stepping down was not allowed."""


class OutOfMemoryError(FailureError):
    """Memory ran out; what was loaded before stays usable.

    Attributes:
        phase: What was being done: "loading", "encoding", "capture", "sampling" or "decoding".
    """

    def __init__(self, message: str, phase: str) -> None:
        super().__init__(message)
        self.phase = phase


class SaveError(FailureError):
    """A picture could not be written; nothing was left under its name."""


class BackendError(FailureError):
    """A remote backend is away or answered with an error."""
