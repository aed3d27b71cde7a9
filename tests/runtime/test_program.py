"""A function compiled once per set of shapes."""

import jax
import numpy as np
import pytest

from zimage_jax.runtime.placement import Placement, is_exhausted
from zimage_jax.runtime.program import BEYOND, Program, Recent
from zimage_jax.runtime.recorder import Recorder

HERE = Placement.on()


@pytest.mark.parametrize(("precision", "is_exact"), [("float32", True), (None, False)])
def test_products_of_float32_are_asked_for_in_full(precision, is_exact, monkeypatch):
    """A CPU's are so in any case; what a GPU is told is read from the program."""
    compiled, texts = jax.stages.Lowered.compile, []
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: texts.append(self.as_text()) or compiled(self)
    )
    a = np.ones((4, 4), np.float32)
    Program(HERE, lambda x: x @ x, precision=precision)(Recorder(), a)
    assert ("HIGHEST" in texts[0]) == is_exact


def test_a_program_that_could_not_be_compiled_is_out_of_memory(monkeypatch):
    def refuse(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    program, a = Program(HERE, lambda x: x), np.ones(4, np.float32)
    assert program.compiled(a) == (None, BEYOND)
    with pytest.raises(jax.errors.JaxRuntimeError) as fault:
        program(Recorder(), a)
    assert is_exhausted(fault.value)


def test_a_program_is_compiled_once_per_shape():
    program, recorder = Program(HERE, lambda x: x + np.float32(1)), Recorder()
    for size in (3, 3, 4):
        np.testing.assert_array_equal(
            program(recorder, np.zeros(size, np.float32)), np.ones(size, np.float32)
        )
    assert program.compilations == 2


def test_executables_that_were_not_used_lately_are_let_go():
    recent = Recent(2)
    program = Program(HERE, lambda x: x + np.float32(1), recent=recent)
    recorder = Recorder()

    def run(size: int) -> int:
        np.testing.assert_array_equal(
            program(recorder, np.zeros(size, np.float32)), np.ones(size, np.float32)
        )
        return program.compilations

    assert [run(1), run(2), run(1), run(3)] == [1, 2, 2, 3]
    assert len(recent) == 2
    assert run(1) == 3, "used lately"
    assert run(2) == 4, "let go, and compiled again"
