"""What our programs take of a card beside their arguments, by its compiler:
zimage_jax/assets/temporaries.json.

    pip install jax-cuda12-plugin==VERSION_OF_JAX jax-cuda12-pjrt==VERSION_OF_JAX      # no driver, no CUDA library
    python -m scripts.measure.temporaries [CARD ...] [--stage STAGE ...]

Compiles the published widths for one card of each capability, in the dtype and with the attention
that the card computes with (a quarter of an hour a card on two cores), and replaces the figures of
those, or of these stages of theirs. Captions are in a bucket of 64 tokens; points are tokens of all
contexts, or pixels."""

import json
import re
import time
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from typing import Any

import click
import jax

from zimage_jax.model import dit
from zimage_jax.model.attention import Target
from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVPolicy
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline.stages import STAGES
from zimage_jax.pipeline.stages.denoise import DenoiseChoice
from zimage_jax.pipeline.stages.text import TextChoice
from zimage_jax.pipeline.stages.vae_stage import VAEChoice
from zimage_jax.planning import cards, schedule
from zimage_jax.planning.plan import Choice, Sizes
from zimage_jax.planning.stored import TEMPORARIES
from zimage_jax.planning.stream_plan import StreamPlan, chunked, cut, stream_plan
from zimage_jax.planning.work import Work
from zimage_jax.runtime.deviceless import CardPrograms, order
from zimage_jax.runtime.placement import default_dtype
from zimage_jax.runtime.stream import ring_step
from zimage_jax.weights.formats import uniform

CARDS = "rtx-4090", "rtx-3060", "h100", "rtx-5090", "t4", "a100-40gb"
VAE = "decode", "encode"
SIDES, BUCKETS = (512, 1024, 2048), (64, 512)
# Blocks of a chunk, and of what is copied meanwhile. One is enough: chunks of 4 and 8 blocks take 0.1
# and 0.2 MiB more, with the flash kernel (sm_89) and with scores in chunks (sm_75)
KINDS = {"1,1": (1, 1), "1,0": (1, 0)}
NOTE = "beside their arguments, bytes; published widths, stored in bfloat16; attention as the card computes it"
STORAGE = uniform(TURBO, "bfloat16")


class Measure:
    """The figures of one card."""

    def __init__(self, card: cards.Card):
        self.dtype = default_dtype(Target("gpu", card.capability))
        self.card, self.programs = card, CardPrograms(STORAGE, self.dtype, card)
        self._stages: dict[str, Any] = {stage.name: stage for stage in STAGES}
        self._sizes = Sizes(STORAGE, 2)

    def work(self, side: int, bucket: int = 64) -> Work:
        path = Trajectory.of(8, TURBO.scheduler.shift)
        return Work.of(TURBO, side, side, path, KVPolicy(), self.dtype, bucket=bucket, encodes=True)

    def stream(
        self, component: str, group: str, blocks: int, copied: int, half: str = ""
    ) -> StreamPlan:
        """A single chunk that stays, or a ring of three: two slots would hold two for good.

        `half`: of blocks; a half takes the same whichever half is copied meanwhile.
        """
        chunks = 3 if copied else 1
        units = self._sizes.units(component, group)[: chunks * blocks]
        units = tuple(f"{unit}.{half}" for unit in units) if half else units
        made = schedule.make("ring" if copied else "resident", chunks)
        return stream_plan(STORAGE, component, cut(units, (blocks,) * chunks), made)

    def figures(self, stages: Iterable[str]) -> dict[str, Any]:
        """Stage -> kind of program -> points."""
        ways: dict[str, Callable[[], Any]] = {
            "text": self._text,
            **{name: partial(self._context, half) for name, half in _named("context")},
            **{name: partial(self._denoise, half) for name, half in _named("denoise")},
            **{name: partial(self._vae, name) for name in VAE},
            **{f"{name} strips": partial(self._strips, name) for name in VAE},
            "scan": self._scan,
            "ring_order": self._ring_order,
            "half_orders": self._half_orders,
        }
        return {stage: ways[stage]() for stage in stages}

    def _points(
        self, stage: str, works: list[tuple[int, Work]], choice: Callable[[int], Choice]
    ) -> list[list[int]]:
        return [[x, self._scratch(stage, work, choice(x))] for x, work in works]

    def _scratch(self, stage: str, work: Work, choice: Choice) -> int:
        value = self._stages[stage].compiled(self.programs, work, choice)
        click.echo(f"  {time.strftime('%X')} {stage} {value / 2**20:8.1f} MiB", err=True)
        return value

    def _pixels(self) -> list[tuple[int, Work]]:
        return [(side * side, self.work(side)) for side in SIDES]

    def _captions(self) -> list[tuple[int, Work]]:
        return [(bucket, self.work(512, bucket)) for bucket in BUCKETS]

    def _tokens(self) -> list[tuple[int, Work]]:
        return [(self.work(side).tokens, self.work(side)) for side in SIDES]

    def _text(self) -> dict:
        return {
            key: self._points("text", self._captions(), self._choice(TextChoice, *kind))
            for key, kind in KINDS.items()
        }

    def _context(self, half: str) -> dict:
        stream = self.stream("transformer", "context_refiner", 1, 0, half)
        return {"1,0": self._points("context", self._captions(), lambda _: Choice(stream))}

    def _denoise(self, half: str) -> dict:
        return {
            key: self._points("denoise", self._tokens(), self._choice(DenoiseChoice, *kind, half))
            for key, kind in KINDS.items()
        }

    def _choice(
        self, of: type[Choice], blocks: int, copied: int, half: str = ""
    ) -> Callable[[int], Choice]:
        component = "text_encoder" if of is TextChoice else "transformer"
        choice = of(self.stream(component, "layers", blocks, copied, half))
        return lambda _: choice

    def _vae(self, stage: str) -> list[list[int]]:
        return self._points(stage, self._pixels(), lambda _: VAEChoice())

    def _strips(self, stage: str) -> list:
        return [
            [
                side * side,
                self._points(
                    stage,
                    [(rows * side, self.work(side)) for rows in rows_of(side)],
                    lambda pixels, side=side: VAEChoice(rows=pixels // side),
                ),
            ]
            for side in SIDES
        ]

    def _scan(self) -> list[list[int]]:
        blocks = self._sizes.units("transformer", "layers")
        whole = stream_plan(STORAGE, "transformer", (blocks,), schedule.make("scan", 1))
        return self._points("denoise", self._tokens(), lambda _: DenoiseChoice(whole))

    def _ring_order(self) -> list[tuple[str, int]]:
        """Copies and kernels of a ring step over one block of the transformer, in the order they run."""
        return self._orders(DenoiseChoice(self.stream("transformer", "layers", 1, 1)))[0]

    def _half_orders(self) -> list[list[tuple[str, int]]]:
        """The same of the ring steps over halves: each runs while the other is copied."""
        chunks = chunked("transformer", self._sizes.units("transformer", "layers")[:2], 4)
        ring = stream_plan(STORAGE, "transformer", chunks, schedule.make("ring", len(chunks)))
        return self._orders(DenoiseChoice(ring))

    def _orders(self, choice: DenoiseChoice) -> list[list[tuple[str, int]]]:
        alone = CardPrograms(STORAGE, self.dtype, self.card)
        self._stages["denoise"].compiled(alone, self.work(512), choice)
        return [order(step) for step in alone.executables(ring_step)]


def rows_of(side: int) -> tuple[int, ...]:
    """Of strips: the fewest that the planner takes, the most, and one between."""
    return TURBO.vae.scale, side // 16, side // 2


def text_of(table: dict) -> str:
    """JSON with a point on a line."""
    return (
        re.sub(r"\[\s+([^][]*?),\s+([^][]*?)\s+\]", r"[\1, \2]", json.dumps(table, indent=1)) + "\n"
    )


def _named(stage: str) -> list[tuple[str, str]]:
    """Names of a stage's figures, and the half that they are of; "" for whole blocks."""
    return [(stage, ""), *((f"{stage} {half}", half) for half in dit.HALVES)]


PARTS = (
    "text",
    *(name for stage in ("context", "denoise") for name, _ in _named(stage)),
    *VAE,
    *(f"{name} strips" for name in VAE),
    *("scan", "ring_order", "half_orders"),
)


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--stage", "parts", multiple=True, type=click.Choice(PARTS), help="[default: all]")
def main(names: tuple[str, ...], parts: tuple[str, ...]) -> None:
    for name in names or CARDS:
        card = cards.sheet(name)
        click.echo(name, err=True)
        measure = Measure(card)
        made = {
            "card": name,
            "dtype": measure.dtype,
            "jax": jax.__version__,
            "date": f"{date.today()}",
            **measure.figures(parts or PARTS),
        }
        # read now: another process may have written another card meanwhile
        table = json.loads(TEMPORARIES.read_text()) if TEMPORARIES.exists() else {}
        of_all = table.get("capabilities", {})
        key = "{}.{}".format(*card.capability)
        of_all[key] = of_all.get(key, {}) | made
        TEMPORARIES.write_text(text_of({"note": NOTE, "capabilities": of_all}))


if __name__ == "__main__":
    main()
