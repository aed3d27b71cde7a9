"""Text features to refined contexts, once per job: they do not depend on time.

Axes: G contexts (one per picture or region, and with guidance one more each), L caption tokens (a
bucket), D width, E feature width.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from ...model import dit, ops
from ...model.kv import Nfe
from ...planning import schedule
from ...planning.plan import Choice, Memory, Option, Sizes
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.stream_plan import chunked, stream_plan
from ...planning.work import Work
from ...runtime.programs import Programs
from ...runtime.stream import Call, Sweeps
from ..attempt import Attempt

COMPONENT = "transformer"
STEM = COMPONENT, "stem", 0


class Context(NamedTuple):
    """Every NFE's inputs, on the host: contexts, rotations and masks, caption lengths.

    The regions of a picture have one caption, and each its context.
    """

    context: Float[np.ndarray, "G L D"]
    inputs: dit.Inputs
    lengths: Int[np.ndarray, "G"]


class ContextStage:
    name = "context"

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        if not work.phases:
            return
        blocks = sizes.units(COMPONENT, "context_refiner")
        config = sizes.config
        activations = {
            "rotations": sizes.inputs(work.captions, work.bucket, 1),
            "text features": sizes.tokens(
                work.captions, work.bucket, config.text_encoder.hidden_size
            ),
            "tokens": sizes.tokens(work.captions, work.bucket, config.transformer.dim),
        }
        stem = {"stem": sizes.storage.nbytes(COMPONENT, "stem")}
        ways = [("resident", 1), ("swap", len(blocks)), ("swap", 2 * len(blocks))]
        for name, count in ways:
            chunks = chunked(COMPONENT, blocks, count)
            stream = stream_plan(sizes.storage, COMPONENT, chunks, schedule.make(name, len(chunks)))
            stays = stream.places | {STEM} if stream.is_resident else None
            yield Option(Choice(stream), stem | stream.device_arrays, activations, stays)

    def compiled(self, programs: Programs, work: Work, choice: Choice, device: int = 0) -> int:
        assert choice.stream is not None
        features = programs.like(
            work.captions, work.bucket, programs.config.text_encoder.hidden_size
        )
        x = programs.tokens(work.captions, work.bucket, modulated=False)
        lengths = np.zeros(work.captions, np.int32)
        inputs = programs.inputs(work, work.captions).caption
        static = {"apply": dit.apply_blocks, "attend": programs.attend(work)}
        embed = programs(dit.embed_caption).compiled(
            programs.module("transformer", "stem"), features, lengths
        )[1]
        return max(
            embed,
            programs.most(
                choice.stream, choice.stream.visit_kinds, lambda *_: (x, (inputs,), static)
            ),
        )

    def stored(self, figures: Figures, work: Work, choice: Choice, device: int = 0) -> int:
        assert choice.stream is not None
        return figures.blocks(self.name, choice.stream.visit_kinds, work.captions * work.bucket)

    def seconds(self, timing: Timing, choice: Choice) -> float:
        work, width = timing.work, timing.sizes.config.transformer.dim
        assert choice.stream is not None

        def run(device: int, unit: str, nfe: Nfe | None) -> float:
            return timing.block(COMPONENT, unit, work.captions, work.bucket, width=width)

        return timing.unit(COMPONENT, "stem") + timing.stream(choice.stream, run)

    def run(self, attempt: Attempt) -> Generator[Sweeps | Call, list, Context]:
        work, config, programs = attempt.work, attempt.config, attempt.programs
        features = attempt.job.features_of_contexts(attempt.results.get("text", {}))
        lengths = np.array([len(f) for f in features], np.int32)
        padded = np.zeros(
            (len(features), work.bucket, config.text_encoder.hidden_size), programs.dtype
        )
        for row, f in zip(padded, features, strict=True):
            row[: len(f)] = ops.to_tokens(f, programs.dtype)
        inputs = dit.inputs(config.transformer, *work.view, lengths, work.bucket)
        static = {"apply": dit.apply_blocks, "attend": programs.attend(work)}
        yield Sweeps()
        stem = attempt.loan.module(COMPONENT, "stem")
        x = programs(dit.embed_caption)(attempt.recorder, stem, padded, lengths)
        attempt.hold(inputs.caption, padded, x)
        xs = [dit.Halfway(x, None, None)]
        for _ in attempt.plan.choices[self.name].stream.chunks:
            xs = yield Call(xs, [(inputs.caption,)], static)
        found = Context(np.asarray(xs[0].x), inputs, lengths)
        regions = work.views // work.batch
        return found if regions == 1 else jax.tree.map(lambda a: np.repeat(a, regions, 0), found)
