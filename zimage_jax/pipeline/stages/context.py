"""Text features to refined contexts, once per job: they do not depend on time.

Axes: G contexts (B, or 2 B with guidance), L caption tokens (a bucket), D width, E feature width.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ...model import dit, ops
from ...planning import schedule
from ...planning.plan import Choice, Memory, Option, Sizes, stream_plan
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.work import Work
from ...runtime.programs import Programs
from ..attempt import Attempt

COMPONENT = "transformer"


class Context(NamedTuple):
    """Every NFE's inputs, on the host: contexts, rotations and masks, caption lengths."""

    context: Float[np.ndarray, "G L D"]
    inputs: dit.Inputs
    lengths: Int[np.ndarray, "G"]


class ContextStage:
    name = "context"

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        blocks = sizes.units(COMPONENT, "context_refiner")
        width = sizes.config.transformer.dim + sizes.config.text_encoder.hidden_size
        activations = sizes.inputs(work, work.bucket, 1) + sizes.tokens(work, work.bucket, width)
        stem = sizes.storage.nbytes(COMPONENT, "stem")
        single = tuple((block,) for block in blocks)
        for chunks, name in (((blocks,), "resident"), (single, "swap")):
            stream = stream_plan(sizes.storage, COMPONENT, chunks, schedule.make(name, len(chunks)))
            stays = (
                frozenset((COMPONENT, u) for u in ("stem", *blocks)) if stream.is_resident else None
            )
            yield Option(
                Choice(stream), stem + stream.device_bytes(sizes.storage), activations, stays
            )

    def compiled(self, programs: Programs, work: Work, choice: Choice) -> int:
        assert choice.stream is not None
        features = programs.like(
            work.contexts, work.bucket, programs.config.text_encoder.hidden_size
        )
        x = programs.like(work.contexts, work.bucket, programs.config.transformer.dim)
        lengths = np.zeros(work.contexts, np.int32)
        inputs = programs.inputs(work, work.contexts).caption
        static = {"apply": dit.apply_blocks, "attend": programs.attend(work)}
        embed = programs(dit.embed_caption).compiled(
            programs.module("transformer", "stem"), features, lengths
        )[1]
        return max(
            embed,
            programs.most(
                choice.stream, choice.stream.visit_kinds, lambda _: (x, (inputs,), static)
            ),
        )

    def stored(self, figures: Figures, work: Work, choice: Choice) -> int:
        assert choice.stream is not None
        return figures.blocks(self.name, choice.stream.visit_kinds, work.contexts * work.bucket)

    def seconds(self, timing: Timing, choice: Choice) -> float:
        work, width = timing.work, timing.sizes.config.transformer.dim
        assert choice.stream is not None
        block = partial(timing.block, COMPONENT, work.contexts, work.bucket, width=width)
        return timing.unit(COMPONENT, "stem") + timing.stream(
            choice.stream, lambda unit, nfe: block(unit=unit)
        )

    def run(self, attempt: Attempt) -> Context:
        work, config, programs = attempt.work, attempt.config, attempt.programs
        features, texts = attempt.results["text"], attempt.job.texts
        lengths = np.array([len(features[t]) for t in texts], np.int32)
        padded = np.zeros(
            (len(texts), work.bucket, config.text_encoder.hidden_size), programs.dtype
        )
        for row, text in zip(padded, texts, strict=True):
            row[: len(features[text])] = ops.to_tokens(features[text], programs.dtype)
        inputs = dit.inputs(config.transformer, work.h, work.w, lengths, work.bucket)
        stem = attempt.loan.module(COMPONENT, "stem")
        x = programs(dit.embed_caption)(attempt.ledger, stem, padded, lengths)
        attempt.hold(inputs.caption, padded, x)
        stream_plan = attempt.plan.choices[self.name].stream
        static = {
            "apply": dit.apply_blocks,
            "attend": programs.attend(work),
        }
        with attempt.stream(stream_plan) as stream:
            for _ in stream_plan.chunks:
                (x,) = stream.visit([x], [(inputs.caption,)], **static)
        return Context(np.asarray(x), inputs, lengths)
