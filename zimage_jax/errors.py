"""The exception tree. A message says what was expected, what came, where, and what to do.

ZImageError              exit code 1: the job failed
├── UsageError           exit code 2: the words were wrong
├── ConfigError          a config that is malformed, unknown, or asks for arithmetic this code lacks
├── CheckpointError      a checkpoint that cannot be used
│   ├── DamagedError     bytes that are not what they were when written
│   └── ForeignError     another model's, or no checkpoint at all
├── ConversionError      a source whose tensors are not exactly the expected ones
├── OutputError          a picture or report that could not be written
├── NonFiniteError       latents that became NaN or infinite while sampling
└── OutOfMemoryError     no plan fits; names the smallest budget and the largest size that would
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


class OutputError(ZImageError):
    pass


class NonFiniteError(ZImageError):
    pass


class OutOfMemoryError(ZImageError):
    """`needed`: bytes of the smallest budget that would do."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed
