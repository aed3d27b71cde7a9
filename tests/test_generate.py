"""The commands as a user runs them. Most in this process; a few as processes, for exit codes and
signals."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from zimage_jax import __main__ as commands
from zimage_jax.pipeline.picture import read_metadata

SMALL = ("--size", "32x16", "--steps", "2")


def test_a_prompt_becomes_a_picture(run, tmp_path):
    code, out, err = run("a red circle", *SMALL, "-s", 7, "-o", "x.png", "--report", "r.json")
    assert code == 0
    assert out.startswith("x.png  seed 7, ")
    assert " MiB" in out
    assert out.count("\n") == 1
    assert "computing in float32 on cpu" in err
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (32, 16)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["prompt"] == "a red circle"
    assert (report["seed"], report["steps"], report["file"]) == (7, 2, "x.png")


def test_info_reads_it_back_and_from_image_repeats_it(run, tmp_path):
    run(
        "红色",
        *SMALL,
        "-s",
        2**64 - 1,
        "--noise",
        "jax",
        "--guidance",
        1.5,
        "--negative-prompt",
        "b",
        "-o",
        "x.png",
    )
    code, out, _ = run("x.png", "--json", command=commands.info)
    assert code == 0
    told = json.loads(out)
    assert told == read_metadata(tmp_path / "x.png")
    assert (told["seed"], told["prompt"], told["noise"]) == (2**64 - 1, "红色", "jax")
    code, out, _ = run("x.png", command=commands.info)
    assert out.startswith("红色\nNegative prompt: b\nSteps: 2")
    assert run("--from-image", "x.png", "-o", "y.png")[0] == 0
    assert read_metadata(tmp_path / "y.png") == told
    assert run("--from-image", "x.png", "-s", 3, "--steps", 1, "-o", "z.png")[0] == 0
    changed = read_metadata(tmp_path / "z.png")
    assert (changed["seed"], changed["steps"], changed["prompt"]) == (3, 1, "红色")


def test_prompts_from_files_and_several_of_them(run, tmp_path):
    (tmp_path / "p.txt").write_text("line one\nline two\n", "utf-8")
    code, out, _ = run(
        "a",
        "b",
        "--prompt-file",
        "p.txt",
        *SMALL,
        "-s",
        1,
        "-s",
        2,
        "-o",
        "{index}-{seed}.png",
        "--json",
    )
    reports = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(r["prompt"], r["seed"]) for r in reports] == [
        (p, s) for p in ("a", "b", "line one\nline two") for s in (1, 2)
    ]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == sorted(
        f"{i}-{1 + i % 2}.png" for i in range(6)
    )


def test_a_batch_is_one_report(run):
    code, out, _ = run("a", "b", *SMALL, "-s", 1, "--batch-size", 2, "-o", "{index}.png", "--json")
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == [["a", "b"]]


def test_a_count_makes_the_seed_count_up(run):
    _, out, _ = run("a", *SMALL, "-s", 5, "-n", 3, "-o", "{seed}.png", "--json")
    assert [json.loads(line)["seed"] for line in out.splitlines()] == [5, 6, 7]


def test_nothing_is_overwritten_unless_told(run, tmp_path):
    for _ in range(2):
        run("a", *SMALL, "-s", 1, "-o", "x.png")
    assert (tmp_path / "x-2.png").exists()
    run("a", *SMALL, "-s", 2, "-o", "x.png", "--overwrite")
    assert read_metadata(tmp_path / "x.png")["seed"] == 2
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_report_and_a_trace_go_through_what_is_no_file(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    words = ("-s", 7, "-o", "x.png", "--report", "pipe", "--trace", "/dev/null")
    assert run("a", *SMALL, *words)[0] == 0
    assert json.loads(os.read(reader, 1 << 16))["seed"] == 7
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


def test_quiet_prints_nothing_and_previews_are_written(run, tmp_path):
    code, out, err = run("a", *SMALL, "--quiet", "--preview", "steps", "-o", "x.png")
    assert (code, out, err) == (0, "", "")
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == [
        "0-step01.png",
        "0-step02.png",
    ]


def test_no_metadata(run, tmp_path):
    run("a", *SMALL, "--no-metadata", "-o", "x.png")
    assert run("x.png", command=commands.info)[0] == 2


def test_warnings_are_lines(run):
    _, _, err = run("a", *SMALL, "--negative-prompt", "b", "-o", "x.png")
    assert "warning: the negative prompt has no effect while guidance is 0\n" in err


def test_cfg_scale_is_guidance_plus_one(run):
    _, out, _ = run("a", *SMALL, "--cfg-scale", 3, "-o", "x.png", "--json")
    assert json.loads(out)["guidance"] == 2


def without_space(path: Path) -> Path:
    (path / "full").write_text("")
    return path / "full" / "x.png"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ((), 2, "no prompt: give one, or --prompt-file, or - for standard input"),
        (("",), 2, "the prompt is empty: say what to draw"),
        (("a", "--size", "33x16"), 2, "width must be a multiple of 16, got 33 (the nearest is 32)"),
        (
            ("a", "--size", "big"),
            2,
            "--size big: expected WIDTHxHEIGHT in pixels or a ratio such as 16:9",
        ),
        (("a", "--size", "1:0"), 2, "--size 1:0: expected"),
        (
            ("a", "--size", "1:1", "--width", 16),
            2,
            "--size and --width/--height both set the size",
        ),
        (("a", "--steps", 0), 2, "--steps must be from 1 to 1000, got 0"),
        (("a", "--steps", "x"), 2, "--steps must be a whole number, got 'x'"),
        (("a", "--seed", -2), 2, "--seed must be from -1 to 18446744073709551615, got -2"),
        (("a", "-W", 0), 2, "--width must be from 1 to 65536, got 0"),
        (("a", "-H", "9" * 400), 2, "--height must be from 1 to 65536, got a number of 1329 bits"),
        (("a", "-H", "9" * 5000), 2, "--height must be a whole number, got '9999"),
        (("a", "--size", "0x0"), 2, "width must be a multiple of 16, got 0"),
        (("a", "--guidance", "nan"), 2, "--guidance must be from 0 to 100, got nan"),
        (("a", "-n", 10**9), 2, "--count must be from 1 to 1000000, got 1000000000"),
        (("a", "-s", 2**64 - 1, "-n", 2), 2, "--seed 18446744073709551615 with -n 2 counts past"),
        (("a\udc80b",), 2, "the prompt is not UTF-8 text: a\\udc80b"),
        (("a", "--negative-prompt", "\udc80"), 2, "--negative-prompt is not UTF-8 text"),
        (("a", "--prompt-file", "/dev/zero"), 2, "expected a file, found a device"),
        (("a", "--prompt-file", "large"), 2, "larger than the 65536 bytes"),
        (("a", "--from-image", "/dev/zero"), 2, "expected a file, found a device"),
        (("a", "-o", "x.png", "--report", "x.png"), 2, "-o and --report name the same file"),
        (("a", "b", "-o", "x.png", "--overwrite"), 2, "put {index} into the name"),
        (("a", "--guidance", 1, "--cfg-scale", 2), 2, "both set the guidance"),
        (("a", "-s", 1, "-s", 2, "-n", 2), 2, "give several seeds or a --count, not both"),
        (("a", "-o", "x.jpg"), 2, "the name must end in .png"),
        (("a", "-o", "{prompt}.png"), 2, "only {date}, {seed}, {index} are filled in"),
        (("a", "-o", "{seed.__class__}.png"), 2, "only {date}, {seed}, {index} are filled in"),
        (("a", "--prompt-file", "none.txt"), 2, "--prompt-file none.txt: cannot be read"),
        (("a", "--from-image", "none.png"), 2, "none.png: cannot be read"),
        (("a", "--attention", "cudnn"), 2, "needs cuDNN 9.10.2 or newer, found none"),
        (("a", "--frobnicate"), 2, "No such option"),
        (("a", *SMALL, "-o", "file/x.png"), 1, "file/x.png: cannot be written"),
    ],
)
def test_bad_words_are_one_line(run, tmp_path, words, code, line):
    (tmp_path / "file").write_text("x")
    (tmp_path / "large").write_text("x" * 70_000)
    got, out, err = run(*words)
    assert got == code
    assert out == ""
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert not list(tmp_path.glob("*.png"))


def test_a_model_that_is_none(run, tmp_path):
    code, _, err = run("a", "--model", tmp_path / "nowhere", model=None)
    assert code == 1
    assert (
        err
        == f"error: {tmp_path / 'nowhere'}: no such folder; give --model the folder that checkpoints_convert wrote\n"
    )


# -- as processes ----------------------------------------------------------------------------------


def process(*words, **options):
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "XDG_CACHE_HOME": str(options["cwd"]),
    }
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_a_prompt_from_standard_input_and_an_interrupt_that_leaves_finished_pictures(
    native, tmp_path
):
    words = ("--model", native("plain"), *SMALL, "-n", 5000, "-o", "{index}.png", "--json")
    # a shell that runs its jobs in the background has them ignore the signal, and children would
    # inherit that
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    child = process("zimage_jax.generate", "-", *words, cwd=tmp_path)
    signal.signal(signal.SIGINT, ours)
    child.stdin.write("a blue star\n")
    child.stdin.close()
    child.stdin = None
    deadline = time.monotonic() + 300
    while (
        not (tmp_path / "1.png").exists() and time.monotonic() < deadline and child.poll() is None
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, err[-2000:]
    assert err.splitlines()[-1] == "interrupted"
    assert json.loads(out.splitlines()[0])["prompt"] == "a blue star"
    assert (tmp_path / "zimage_jax" / "xla").is_dir(), (
        "compiled programs are kept in the user's cache folder"
    )
    names = {p.name for p in tmp_path.iterdir()} - {"zimage_jax"}
    assert "1.png" in names
    assert all(name.endswith(".png") and not name.startswith(".") for name in names), (
        "nothing half-written"
    )
    for name in names:
        with Image.open(tmp_path / name) as picture:
            picture.load()


def test_an_interrupt_that_was_dropped_is_heeded_at_the_next_step(run, tmp_path, monkeypatch):
    """As in a destructor, where Python prints what is raised and goes on."""
    from zimage_jax import Picture

    def save(self, *words, **options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return tmp_path / "x.png"

    monkeypatch.setattr(Picture, "save", save)
    # a shell's background job has the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = run("a", *SMALL, "-n", 3, "-o", "x.png")
        assert (code, err.splitlines()[-1]) == (130, "interrupted")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_during_imports_is_one_line(tmp_path):
    """Raised at the first import of numpy, which would turn an exception into an ImportError."""
    code = """
import runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["generate", "a"]
runpy.run_module("zimage_jax.generate", run_name="__main__", alter_sys=True)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


def test_a_full_disk_under_standard_output_is_one_line(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, "-m", "zimage_jax.generate", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr) == (1, b"error: output: No space left on device\n")


def test_the_converter_as_a_process(tmp_path):
    child = process("checkpoints_convert", tmp_path / "nowhere", tmp_path / "out", cwd=tmp_path)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
