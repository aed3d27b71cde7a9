"""What `import zimage_jax` gives, and what it takes."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import zimage_jax
from zimage_jax import checks, cli, errors
from zimage_jax.errors import UsageError
from zimage_jax.model.config import TURBO
from zimage_jax.pipeline.job import Job, Picture, Step

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_there():
    for name in zimage_jax.__all__:
        assert name in dir(zimage_jax)
        assert getattr(zimage_jax, name) is not None
    faults = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert faults <= set(zimage_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Magic'"):
        zimage_jax.Magic  # noqa: B018


def test_the_version_is_that_of_the_package(monkeypatch):
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert zimage_jax.__version__ == declared
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 9")
    assert zimage_jax.__version__ == "zimage_jax 9"


def in_python(code: str) -> str:
    """Standard output of a fresh interpreter, in which no annotation is checked."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_command_checks_its_options_before_jax_is_imported():
    imports = "import sys, zimage_jax.__main__; print('jax' in sys.modules, 'PIL' in sys.modules)"
    assert in_python(imports) == "False False\n"


# -- a job -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": b"a"}, "prompt must be text, or a list of texts, got bytes"),
        ({"prompt": 5}, "prompt must be text, or a list of texts, got 5"),
        ({"prompt": ["a", 5]}, "prompt must be text, got 5"),
        ({"prompt": [None]}, "prompt must be text, got NoneType"),
        ({"prompt": "a\ud800"}, "prompt is not Unicode text: half a surrogate pair at character 1"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": []}, "0 prompts and 1 seeds"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "2 prompts and 3 seeds"),
        ({"negative_prompt": None}, "negative_prompt must be text, got NoneType"),
        ({"negative_prompt": "\udc80"}, "negative_prompt is not Unicode text"),
        ({"seed": "7"}, "seed must be a whole number, or a list of them, got '7'"),
        ({"seed": 1.5}, "seed must be a whole number, or a list of them, got 1.5"),
        ({"seed": [1.5]}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": -2}, "seed -2 is out of range"),
        ({"seed": 2**64}, "seed 18446744073709551616 is out of range"),
        ({"seed": 10**9999}, "seed a number of 33216 bits is out of range"),
        ({"width": 0}, "width must be a multiple of 16, got 0 (the nearest is 16)"),
        ({"height": 16.0}, "height must be a whole number, got 16.0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": 0}, "steps must be from 1 to 1000, got 0"),
        ({"guidance": "2"}, "guidance must be a number, got '2'"),
        ({"guidance": 10**400}, "guidance must be from 0 to 100, got a number of 1329 bits"),
        ({"guidance": float("nan")}, "guidance must be from 0 to 100, got nan"),
        ({"noise": 5}, "noise 5: expected one of torch, jax"),
        ({"noise": "x\x1b[2J"}, r"noise 'x\\x1b[2J': expected one of torch, jax"),
        ({"kv": "fp8"}, "kv must be a KVPolicy, got 'fp8'"),
        ({"attention": "fast"}, "attention 'fast': expected one of auto, "),
    ],
)
def test_a_value_of_another_type_or_out_of_bounds_is_named(given, message):
    with pytest.raises(UsageError) as fault:
        Job.of(TURBO, **{"prompt": "a"} | given)
    assert message in str(fault.value)


def test_numbers_of_numpy_are_numbers():
    job = Job.of(
        TURBO,
        "a",
        seed=np.int64(7),
        width=np.uint16(64),
        steps=np.int8(2),
        guidance=np.float32(1.5),
    )
    assert (job.seeds, job.width, job.steps, job.guidance) == ((7,), 64, 2, 1.5)
    assert {type(job.seeds[0]), type(job.width), type(job.steps)} == {int}
    assert Job.of(TURBO, "a", seed=np.arange(3)).seeds == (0, 1, 2)
    assert Job.of(TURBO, ("a", "b"), seed=iter([1, 2])).prompts == ("a", "b")


def test_a_job_has_the_models_own_defaults_and_draws_a_seed():
    job = Job.of(TURBO, "a")
    assert (job.width, job.height, job.steps, job.guidance) == (1024, 1024, 8, 0.0)
    assert 0 <= job.seeds[0] < 2**32
    assert len(set(Job.of(TURBO, ["a", "b", "c"]).seeds)) == 3
    assert job.remarks == []
    assert len(Job.of(TURBO, "a", seed=2**32, negative_prompt="b").remarks) == 2


def test_the_api_refuses_what_it_cannot_take():
    """In a process of its own: here, annotations are checked before the body runs."""
    code = """
import numpy as np
from zimage_jax import UsageError, ZImage
job = {"width": 16, "height": 16, "steps": 1}
def said(call):
    try:
        call()
    except UsageError as fault:
        print(fault)
said(lambda: ZImage.load(dtype="float64"))
said(lambda: ZImage.load(memory={}))
pipe = ZImage.load()
said(lambda: pipe.generate("a", **job, memory="ring"))
said(lambda: pipe.generate("a", **job, kv="fp8"))
said(lambda: pipe.generate(b"", **job))
said(lambda: pipe.encode([5]))
said(lambda: pipe.generate("a", width=0))
result = pipe.generate("a", seed=np.int64(7), **job)
said(lambda: result.pictures[0].save(".."))
said(lambda: result.pictures[0].save(""))
said(lambda: result.pictures[0].save(5))
print(result)
"""
    *said, result = in_python(code).splitlines()
    assert re.fullmatch(
        r"<Result 1 of 16x16, 1 NFEs, schedule resident, [\d.]+ s, peak [\d.]+ MiB>", result
    )
    assert said == [
        "dtype 'float64': expected one of bfloat16, float16, float32",
        "memory must be a Memory, got dict",
        "memory must be a Memory, got 'ring'",
        "kv must be a KVPolicy, got 'fp8'",
        "prompt must be text, or a list of texts, got bytes",
        "prompt must be text, got 5",
        "width must be a multiple of 16, got 0 (the nearest is 16)",
        "path '..' names a folder: expected a file",
        "path '' names a folder: expected a file",
        "path must be a path, got 5",
    ]


def test_what_a_shell_prints_is_short():
    pixels, latents = np.zeros((16, 32, 3), np.uint8), np.zeros((1, 4, 8, 16), np.float32)
    picture = Picture(pixels, {"prompt": "a\n" * 999, "seed": 7})
    assert repr(picture).startswith("<Picture 32x16, seed 7, 'a")
    step = Step(2, 8, 812.34, latents, lambda array: array)
    assert repr(step) == "<Step 3 of 8, t 812.3>"
    assert max(len(repr(value)) for value in (picture, step)) < 120


# -- what the commands share -----------------------------------------------------------------------


def leave(fault: BaseException, capsys) -> tuple[int, str]:
    import click

    @click.command()
    def command():
        raise fault

    with pytest.raises(SystemExit) as leaving:
        cli.run(command, [])
    out = capsys.readouterr()
    assert out.out == ""
    return leaving.value.code, out.err


def test_faults_of_the_system_are_one_line(capsys):
    long = OSError(36, "File name too long", "x" * 300)
    assert leave(long, capsys) == (1, f"error: {'x' * 300}: File name too long\n")
    assert leave(MemoryError(), capsys) == (1, "error: not enough host memory\n")
    assert leave(KeyboardInterrupt(), capsys) == (130, "\ninterrupted\n")


def test_a_message_is_short_and_has_no_control_characters(capsys):
    code, err = leave(UsageError("a\x1b[2J\x9b\ud800" + "b" * 10**6), capsys)
    assert code == 2
    assert err.startswith("error: a\\u001b[2J\\u009b\\ud800bbb")
    assert len(err) <= 1001


def test_json_is_fit_for_a_terminal():
    value = {"prompt": "山\x1b[2J\x7f\x9b\ud800"}
    text = cli.to_json(value)
    assert "山" in text
    assert not any(c in text for c in "\x1b\x7f\x9b\ud800")
    assert json.loads(text) == value


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert cli.cache_folder() is None
    cli.use_compile_cache()


def test_a_device_that_is_not_there_is_named(monkeypatch):
    import jax

    def missing():
        raise RuntimeError("Unable to initialize backend 'junk': not known\nmore")

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(UsageError, match=r"^JAX_PLATFORMS=cpu: not on this machine .*not known"):
        cli.start_jax()


def test_a_small_address_space_is_refused_before_xla_aborts(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 30, 1 << 30))
    with pytest.raises(UsageError, match=r"^ulimit -v 1048576: JAX needs"):
        cli.start_jax()


def test_bounds_are_exact():
    assert checks.whole("n", 2**64 - 1, 0, 2**64 - 1) == 2**64 - 1
    with pytest.raises(UsageError, match="must be from 0 to 18446744073709551615"):
        checks.whole("n", 2**64, 0, 2**64 - 1)
    with pytest.raises(UsageError, match="must be above 0, at most 1"):
        checks.real("n", 0.0, 0, 1, above=True)
