"""Text features of each distinct prompt: Qwen3's hidden_states[-2].

Axes: P distinct prompts, L caption tokens (a bucket), E feature width.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import jax
import numpy as np
from jaxtyping import Float

from ...model import emphasis, ops, prompt, text_encoder
from ...model.kv import Nfe
from ...planning import schedule
from ...planning.plan import Choice, Held, Memory, Option, Sizes
from ...planning.seconds import Timing
from ...planning.stored import Figures
from ...planning.streams import streams
from ...planning.work import Work
from ...runtime.placement import DEVICE, Placement
from ...runtime.programs import Programs
from ...runtime.reader import read_units
from ...runtime.stream import Call, Sweeps
from ..attempt import Attempt

COMPONENT = "text_encoder"


@dataclass(frozen=True)
class TextChoice(Choice):
    """`stream` is None if the text encoder runs on the host."""


class Text:
    name = "text"

    def options(self, sizes: Sizes, work: Work, memory: Memory) -> Iterator[Option]:
        if not work.phases or not work.prompts:
            return
        if memory.text_encoder == "host":
            yield Option(TextChoice(), {}, {}, frozenset())
            return
        blocks = sizes.units(COMPONENT, "layers")
        width = sizes.config.text_encoder.hidden_size
        activations = {"tokens": work.prompts * work.bucket * width * sizes.compute_bytes}
        for stream in streams(sizes, COMPONENT, (), blocks, _of_text(memory, len(blocks))):
            if stream.is_resident and memory.text_encoder == "staged":
                continue
            stays = stream.places if stream.is_resident else None
            always = memory.text_encoder == "device"
            first, *others = stream.lanes
            away = tuple(Held(of.device_arrays, activations if of.chunks else {}) for of in others)
            yield Option(TextChoice(stream), first.device_arrays, activations, stays, always, away)

    def compiled(self, programs: Programs, work: Work, choice: TextChoice, device: int = 0) -> int:
        if choice.stream is None:
            return 0
        stream = choice.stream.lanes[device]
        x = programs.like(work.prompts, work.bucket, programs.config.text_encoder.hidden_size)
        static = {"apply": text_encoder.apply_blocks, "attend": programs.attend(work)}
        return programs.most(stream, stream.visit_kinds, lambda *_: (x, (), static), device)

    def stored(self, figures: Figures, work: Work, choice: TextChoice, device: int = 0) -> int:
        if choice.stream is None:
            return 0
        kinds = choice.stream.lanes[device].visit_kinds
        return figures.blocks(self.name, kinds, work.prompts * work.bucket)

    def seconds(self, timing: Timing, choice: TextChoice) -> float | None:
        if choice.stream is None:  # the CPU's rates are unknown
            return None
        config, work = timing.sizes.config.text_encoder, timing.work
        width = config.num_attention_heads * config.head_dim

        def run(device: int, unit: str, nfe: Nfe | None) -> float:
            block = timing.on(device).block
            return block(COMPONENT, unit, work.prompts, work.bucket, width=width)

        tokens = timing.sizes.tokens(work.prompts, work.bucket, config.hidden_size)
        return timing.stream(choice.stream, run, tokens=tokens)

    def run(
        self, attempt: Attempt
    ) -> Generator[Sweeps | Call, list, dict[str, Float[np.ndarray, "T E"]]]:
        """Features by text, without padding. The embedding table stays on the host."""
        texts = emphasis.to_run(attempt.encoded.values())
        ids, lengths = prompt.batch_ids(texts, attempt.work.bucket)
        (table,) = attempt.loan.on_host(COMPONENT, "embed_tokens")
        x = ops.to_tokens(np.asarray(text_encoder.embed(table, ids)), attempt.programs.dtype)
        choice: TextChoice = attempt.plan.choices[self.name]
        if choice.stream is None:
            attempt.recorder.mark()
            features = _on_host(attempt, x)
        else:
            static = {
                "apply": text_encoder.apply_blocks,
                "attend": attempt.programs.attend(attempt.work),
            }
            yield Sweeps()
            attempt.hold(x)
            xs, inputs = [attempt.placement.put(x)], [()]
            for _ in choice.stream.chunks:
                xs = yield Call(xs, inputs, static, away=x)
            features = np.asarray(xs[0])
        features = ops.from_tokens(features)
        found = [f[:n] for f, n in zip(features, lengths, strict=True)]
        weighted = emphasis.of_texts(attempt.encoded.values(), found)
        return dict(zip(attempt.encoded, weighted, strict=True))


def _of_text(memory: Memory, blocks: int) -> Memory:
    """`memory` for the text encoder, which has `blocks` blocks.

    --resident-chunks, --chunk and chunks_on_device are about the transformer only; --chunks counts
    up to `blocks`.
    """
    name = memory.schedule
    if memory.text_encoder == "device":  # overrides --schedule
        name = "resident"
    elif name != "auto" and schedule.row(name).keeps_all:
        name = "ring" if memory.text_encoder == "staged" else "resident"
    keeps_all = name != "auto" and schedule.row(name).keeps_all
    return replace(
        memory,
        schedule=name,
        chunks=min(memory.chunks, blocks) if memory.chunks else None,
        resident_chunks=None,
        chunks_on_device=None,
        prefetch=None if keeps_all else memory.prefetch,
        pins=(),
    )


def _on_host(attempt: Attempt, x: Float[np.ndarray, "P L E"]) -> Float[np.ndarray, "P L E"]:
    """Run the text encoder on the CPU, block by block from the checkpoint, without the device."""
    cpu, store = Placement.on_host(), attempt.loan.store
    with jax.default_device(cpu.device):
        apply = jax.jit(
            lambda tree, leaves, x: jax.tree.unflatten(tree, leaves)(x), static_argnums=0
        )
        for unit in store.checkpoint.units(COMPONENT):
            if unit.startswith("layers."):
                own = read_units(store.checkpoint, COMPONENT, [unit], cpu, DEVICE)[unit]
                leaves = attempt.loan.leaves_of(COMPONENT, unit, own, cpu)
                (tree,) = attempt.loan.storage.trees(COMPONENT, [unit])
                x = apply(tree, leaves, x)
    return np.asarray(x)
