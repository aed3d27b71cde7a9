"""Programs that are first run while threads place arrays: what failed on an H100 under cuDNN's attention."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zimage_jax.model import attention
from zimage_jax.model.attention import Attend
from zimage_jax.runtime.placement import Placement, require_cudnn
from zimage_jax.runtime.program import Program
from zimage_jax.runtime.recorder import Recorder

THREADS, RUNS = 4, 12


@pytest.mark.parametrize("wanted", ["auto", "cudnn"])
def test_first_runs_beside_threads_that_place_arrays(wanted):
    """On a CPU there is no race to lose, and "auto" alone runs: it shows that nobody waits for ever."""
    placement = Placement.on()
    if wanted == "cudnn":
        if placement.shares_memory:
            pytest.skip("needs an NVIDIA GPU")
        require_cudnn()
    attend, stop, placed = Attend(wanted, placement.target), threading.Event(), []

    def place() -> None:
        block = np.ones(2**20 if placement.shares_memory else 2**26, np.uint8)
        while not stop.is_set():
            placed.append(placement.put(block).nbytes)

    def attend_to(q, k, v):
        return attention.attention(q, k, v, attend=attend)

    threads = [threading.Thread(target=place) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        program = Program(placement, attend_to)
        for run in range(RUNS):  # of other lengths: each is compiled, and first run, anew
            dtype = np.float32 if placement.shares_memory else jnp.bfloat16
            q = np.ones((1, 32 * (run + 1), 2, 64), dtype)
            out = program(Recorder(), q, q, q)
            np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=1e-2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert program.compilations == RUNS
    assert placed


def test_arguments_of_a_first_run_are_there_before_it():
    placement = Placement.on()
    sent = placement.send(np.ones(2**20, np.float32))
    args = placement.settled(({"a": np.ones(3, np.float32)}, jnp.zeros(2), sent))
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves(args))
    assert not placement.gate.in_flight
