"""Programs compiled for cards that are not there, where the GPU compiler is installed; and what is stored of them."""

import json
from functools import partial

import jax
import pytest

from tests.planning.jobs import STORAGE, square
from zimage_jax.model.config import TURBO
from zimage_jax.model.kv import KVPolicy
from zimage_jax.model.samplers import Trajectory
from zimage_jax.pipeline.stages.denoise import Denoise, DenoiseChoice
from zimage_jax.planning import cards, schedule, stored
from zimage_jax.planning.plan import Sizes
from zimage_jax.planning.seconds import SPREAD
from zimage_jax.planning.stored import StoredCosts
from zimage_jax.planning.stream_plan import stream_plan
from zimage_jax.planning.work import Work
from zimage_jax.runtime.deviceless import CardPrograms, order
from zimage_jax.runtime.placement import HOST
from zimage_jax.runtime.programs import CompiledCosts
from zimage_jax.runtime.stream import fill, parts, replaced_by, ring_step, run_chunk
from zimage_jax.units import MIB, tree_bytes
from zimage_jax.weights import components
from zimage_jax.weights.formats import Storage, parse

# a Turing card, which has no bfloat16 and none of the flash attentions
T4 = cards.sheet("t4")


def ring_of_blocks(storage: Storage = STORAGE) -> DenoiseChoice:
    """Every main block a chunk. The refiners are left out: fewer programs."""
    blocks = tuple((unit,) for unit in Sizes(storage, 2).units("transformer", "layers"))
    made = schedule.make("ring", len(blocks))
    return DenoiseChoice(stream_plan(storage, "transformer", blocks, made))


def assert_overlaps(order) -> None:
    """All copies are awaited after the last kernel. At least half of the matrices are queued before
    the first kernel, and none starts in the last quarter: so the link is never idle.

    With cuBLASLt's products XLA starts the last two or three later than it could. On sm_89 at
    512x512 207 of a block's 362 MB are queued before the first product: 8 ms on PCIe 4 x16, while
    the products before the last copy starts take 4.
    """
    matrices = sum(
        leaf.ndim > 1 for leaf in components.units(TURBO, "transformer")["layers.0"].values()
    )
    (first, queued), (last, awaited) = order[0], order[-1]
    assert (first, last) == ("start", "done")
    assert awaited == sum(count for kind, count in order if kind == "start") == matrices
    assert [kind for kind, _ in order].count("done") == 1
    assert queued >= matrices / 2
    kernels = sum(count for kind, count in order if kind == "compute")
    after_last_start = next(count for kind, count in reversed(order) if kind == "compute")
    assert after_last_start > kernels / 4


def assert_halves_overlap(orders) -> None:
    """All copies of a half are awaited after the other's last kernel. Those of an attention are all
    queued before the first kernel of the feed-forward; of the feed-forward's three matrices one at
    least, and the others while q, k and v are computed."""
    copied = sorted(runs[-1][1] for runs in orders)
    assert copied in ([3, 3, 5], [3, 5]), "K and V in bfloat16, then float16; or in float16 alone"
    for runs in orders:
        (first, queued), (last, copied) = runs[0], runs[-1]
        assert (first, last) == ("start", "done")
        assert [kind for kind, _ in runs].count("done") == 1
        assert queued == copied or copied == 3
        kernels = sum(count for kind, count in runs if kind == "compute")
        assert next(count for kind, count in reversed(runs) if kind == "compute") > kernels / 2


def test_stored_ring_steps_copy_while_they_compute():
    for figures in json.loads(stored.TEMPORARIES.read_text())["capabilities"].values():
        assert_overlaps(figures["ring_order"])
        assert_halves_overlap(figures["half_orders"])


def test_a_ring_step_compiled_for_a_card_copies_while_it_computes(gpu_compiler):
    card, work, choice = cards.sheet("rtx-4090"), square(512), ring_of_blocks()
    programs = CardPrograms(STORAGE, "bfloat16", card)
    own = CompiledCosts(programs).scratch(Denoise(), work, choice)
    assert own == StoredCosts(STORAGE, card).scratch(Denoise(), work, choice)
    steps = programs.executables(ring_step)
    assert len(steps) == 2, "K and V in bfloat16, then in float16"
    for step in steps:
        assert_overlaps(order(step))


def test_a_part_of_a_chunk_is_copied_while_a_ring_step_computes(gpu_compiler):
    """With several in flight, each copies a part of the next chunk: in no more scratch, and awaited
    after the last kernel."""
    card, work, choice = cards.sheet("rtx-4090"), square(512), ring_of_blocks()
    programs = CardPrograms(STORAGE, "bfloat16", card)
    kind = next(kind for *_, kind in choice.blocks.visits(work.nfes) if kind.copied)
    units = choice.blocks.like(kind.kind, kind.units)
    x, inputs, static = Denoise()._visit(programs, work, 1, kind, units)
    chunk = tuple(STORAGE.specs("transformer", unit) for unit in units)
    on_host = partial(jax.ShapeDtypeStruct, sharding=programs.placement.sharding(HOST))
    following = tuple(tuple(on_host(leaf.shape, leaf.dtype) for leaf in block) for block in chunk)
    static |= {"trees": STORAGE.trees("transformer", units)}
    ring = programs(ring_step, donate=(1, 3), **static)

    def compiled(part):
        return ring.compiled(chunk, replaced_by(chunk, part), part, x, *inputs)

    _, whole = compiled(following)
    copied = 0
    for part in parts(following, SPREAD):
        executable, scratch = compiled(part)
        assert scratch <= whole
        runs = order(executable)
        last, awaited = runs[-1]
        assert last == "done"
        assert [kind for kind, _ in runs].count("done") == 1
        assert next(count for kind, count in reversed(runs) if kind == "compute") > 4
        copied += awaited
    assert copied == sum(leaf.ndim > 1 for leaf in following[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "count"), [("rtx-4090", 2), ("h100", 4)])
def test_devices_that_take_turns_copy_in_a_program_of_its_own(name, count, gpu_compiler):
    """Its result is the slot, in place; all matrices are queued at once. A visit's is the tokens, in
    place, and waits for no copy. Each device takes the scratch that is stored for its card."""
    work, listed = square(512), [cards.sheet(name)] * count
    blocks = tuple((unit,) for unit in Sizes(STORAGE, 2).units("transformer", "layers"))
    owners = schedule.share_out(len(blocks), (1.0,) * count)
    made = schedule.make("ring", len(blocks), owners=owners)
    stream = stream_plan(STORAGE, "transformer", blocks, made, owners, count)
    programs = CardPrograms(STORAGE, "bfloat16", *listed)
    compiled, known = CompiledCosts(programs), StoredCosts(STORAGE, *listed)
    for device in range(count):
        case = Denoise(), work, DenoiseChoice(stream), device
        assert compiled.scratch(*case) == known.scratch(*case)
    tokens = tree_bytes(programs.tokens(1, work.tokens))
    for visit in programs.executables(run_chunk):
        stats = visit.get_compiled_memory_stats()
        assert 0 <= stats.alias_size_in_bytes - tokens <= MIB
        assert {kind for kind, _ in order(visit)} == {"compute"}

    chunk = tuple(STORAGE.specs("transformer", unit) for unit in blocks[0])
    on_host = partial(jax.ShapeDtypeStruct, sharding=programs.placement.sharding(HOST))
    following = tuple(tuple(on_host(leaf.shape, leaf.dtype) for leaf in block) for block in chunk)
    copies, scratch = programs(fill, donate=(0,), device=1).compiled(chunk, following)
    matrices = sum(leaf.ndim > 1 for leaf in chunk[0])
    assert order(copies) == [("start", matrices), ("done", matrices)]
    assert copies.get_compiled_memory_stats().alias_size_in_bytes == tree_bytes(chunk)
    assert scratch < MIB


@pytest.mark.parametrize(("side", "most"), [(512, 212), (1024, 514)])
def test_a_ring_step_in_float16_takes_what_one_in_bfloat16_takes(side, most, gpu_compiler):
    """As much as bfloat16 on an RTX 4090 with the same attention (211.2 and 513.2 MiB), though it
    sums in float32 what a norm follows, and converts the stored bfloat16; and the matrices of
    the next block, but for the modulation's (2 %), are copied from before the first product on."""
    work = Work.of(TURBO, side, side, Trajectory.of(8, 3.0), KVPolicy(), "float16", bucket=64)
    programs = CardPrograms(STORAGE, "float16", T4)
    assert CompiledCosts(programs).scratch(Denoise(), work, ring_of_blocks()) <= most * MIB
    (step,) = programs.executables(ring_step)
    runs = order(step)
    assert (runs[0][0], runs[-1]) == ("start", ("done", 8))
    assert runs[0][1] >= 7
    (module,) = step.hlo_modules()
    text = module.to_string()
    assert "__cublas" in text
    assert "triton" not in text
    assert "cudnn" not in text


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["lossless", "int8"])
@pytest.mark.parametrize("name", ["rtx-3060", "rtx-4090", "h100", "rtx-5090"])
def test_a_ring_step_of_encoded_blocks_copies_while_it_computes(name, form, gpu_compiler):
    """And no matrix is decoded ahead of its turn: the scratch is at most what is predicted, which
    is at most 16 MiB too much. (int8-hadamard's copies start later on sm_120.)"""
    card, work, storage = cards.sheet(name), square(512), parse(TURBO, form)
    programs, choice = CardPrograms(storage, "bfloat16", card), ring_of_blocks(storage)
    own = CompiledCosts(programs).scratch(Denoise(), work, choice)
    predicted = StoredCosts(storage, card).scratch(Denoise(), work, choice)
    assert predicted - 16 * MIB <= own <= predicted
    for step in programs.executables(ring_step):
        assert_overlaps(order(step))
