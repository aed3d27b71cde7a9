"""The account of a job."""

import json

import numpy as np

from tests.schedules import JOB, STORAGE
from zimage_jax.runtime.ledger import Ledger
from zimage_jax.runtime.placement import Placement
from zimage_jax.runtime.program import Program
from zimage_jax.runtime.recorder import Recorder


def test_a_program_is_not_waited_for_while_it_runs_ahead():
    program = Program(Placement.on(), lambda x: x + np.float32(1), donate=(0,))
    ledger = Ledger()
    recorder = Recorder(ledger, ahead=1)
    x = np.zeros(4, np.float32)
    for count in range(4):
        x = program(recorder, x)
        # the first run is waited for, and every other when the one after it is given
        assert len(ledger.events) == max(1, count)
    recorder.settle()
    assert len(ledger.events) == 4
    np.testing.assert_array_equal(x, np.full(4, 4, np.float32))


def test_the_trace_has_its_lanes(under):
    trace = json.loads(under("disk").generate("a", **JOB).ledger.trace())
    rows = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {row["tid"] for row in rows} == {1, 2, 3}
    assert all(row["dur"] >= 0 and row["ts"] >= 0 for row in rows)
    assert sum(row["args"]["bytes"] for row in rows if row["tid"] == 2) > len(
        STORAGE.units("transformer")
    )
