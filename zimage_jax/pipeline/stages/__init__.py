"""The stages of a job, in the order they run; the last one gives the pictures.

To add one, write its file and add it to STAGES.
"""

from ...planning.plan import Stage
from .context import ContextStage
from .control import Control
from .decode import Decode
from .denoise import Denoise
from .encode import Encode
from .text import Text

STAGES: list[Stage] = [Text(), ContextStage(), Encode(), Control(), Denoise(), Decode()]
WITHOUT_DECODE = STAGES[:-1]  # of a job that gives latents
TEXT = STAGES[:1]  # of a job that gives features
