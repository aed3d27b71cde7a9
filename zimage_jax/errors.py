"""The exception tree. A message is one line: where, what was expected, what was found, what to do.

ZImageError              exit code 1: the job failed
├── UsageError           exit code 2: a bad argument or option
├── ConfigError          a config that is malformed or not supported
├── CheckpointError      a checkpoint that cannot be used
│   ├── DamagedError     a file whose bytes are not what was written
│   └── ForeignError     a file or folder that is not a checkpoint, or is another model's
├── ConversionError      a source that is damaged, or has not exactly the expected tensors
├── DownloadError        a hub that cannot be reached, or has not what it should have
├── OutputError          a file that cannot be written
├── EngineError          an engine's process that died or hung, and what it was drawing
├── NonFiniteError       latents that became NaN or infinite while sampling
└── OutOfMemoryError     no plan fits; names the smallest budget and the largest size that would fit
"""


class ZImageError(Exception):
    exit_code = 1


class UsageError(ZImageError):
    exit_code = 2


class ConfigError(ZImageError):
    pass


class CheckpointError(ZImageError):
    pass


class DamagedError(CheckpointError):
    pass


class ForeignError(CheckpointError):
    pass


class ConversionError(ZImageError):
    pass


class DownloadError(ZImageError):
    pass


class OutputError(ZImageError):
    pass


class EngineError(ZImageError):
    pass


class NonFiniteError(ZImageError):
    pass


class OutOfMemoryError(ZImageError):
    """`needed`: the smallest budget that would fit, in bytes. `side`: of the largest square that
    fits the budget, in pixels; 0 if none is known."""

    def __init__(self, message: str, needed: int, side: int = 0):
        super().__init__(message)
        self.needed, self.side = needed, side

    def __reduce__(self):  # errors cross from the engine's process to its owner's
        return type(self), (str(self), self.needed, self.side)
