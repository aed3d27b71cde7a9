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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zimage_jax import __main__ as commands
from zimage_jax import cli, generate
from zimage_jax.errors import UsageError
from zimage_jax.pipeline.picture import read_metadata
from zimage_jax.planning import cards


@pytest.fixture
def run(native, tmp_path, monkeypatch, capsys):
    """Run generate in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "use_compile_cache", lambda: None)

    def call(*words, model="plain", command=generate.command):
        prefix = ["--model", str(native(model))] if command is generate.command and model else []
        with pytest.raises(SystemExit) as leaving:
            cli.run(command, [*prefix, *map(str, words)], "generate")
        out = capsys.readouterr()
        return leaving.value.code, out.out, out.err

    return call


SMALL = ("--size", "32x16", "--steps", "2")


def test_a_prompt_becomes_a_picture(run, tmp_path):
    code, out, err = run("a red circle", *SMALL, "-s", 7, "-o", "x.png", "--report", "r.json")
    assert code == 0
    assert out.startswith("x.png  seed 7, ")
    assert "GiB of device memory" in out
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
            "--size and --width/--height say the same thing",
        ),
        (("a", "--steps", 0), 2, "steps must be from 1 to 1000, got 0"),
        (("a", "--steps", "x"), 2, "Invalid value for '--steps'"),
        (("a", "--seed", -2), 2, "seed -2 is out of range"),
        (("a", "--guidance", 1, "--cfg-scale", 2), 2, "say the same thing"),
        (("a", "-s", 1, "-s", 2, "-n", 2), 2, "give several seeds or a --count, not both"),
        (("a", "-o", "x.jpg"), 2, "the name must end in .png"),
        (("a", "-o", "{prompt}.png"), 2, "only {date}, {seed}, {index} are filled in"),
        (("a", "-o", "{seed.__class__}.png"), 2, "only {date}, {seed}, {index} are filled in"),
        (("a", "--prompt-file", "none.txt"), 2, "--prompt-file none.txt: cannot be read"),
        (("a", "--from-image", "none.png"), 2, "none.png: cannot be read"),
        (("a", "--frobnicate"), 2, "No such option"),
        (("a", *SMALL, "-o", "file/x.png"), 1, "file/x.png: cannot be written"),
    ],
)
def test_bad_words_are_one_line(run, tmp_path, words, code, line):
    (tmp_path / "file").write_text("x")
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


@given(a=st.integers(1, 40), b=st.integers(1, 40), side=st.sampled_from([128, 512, 1024, 1280]))
def test_a_ratio_keeps_to_the_area(a, b, side):
    width, height = generate.parse_size(f"{a}:{b}", side, 16)
    assert width % 16 == height % 16 == 0
    assert min(width, height) >= 16
    assert width * height <= side * side * 1.3 or min(width, height) == 16
    if width * b == height * a:  # exact: and nothing larger of that ratio fits
        assert width * height <= side * side


def test_the_ratios_people_use():
    assert generate.parse_size("16:9", 1024, 16) == (1280, 720)
    assert generate.parse_size("9:16", 1024, 16) == (720, 1280)
    assert generate.parse_size("4:3", 1024, 16) == (1152, 864)
    assert generate.parse_size("3:2", 1024, 16) == (1248, 832)
    assert generate.parse_size("2:2", 1024, 16) == (1024, 1024)
    assert generate.parse_size("16:9", 128, 16) == (176, 96)
    assert generate.parse_size("1280x720", 64, 16) == (1280, 720)
    with pytest.raises(UsageError):
        generate.parse_size("16:9:4", 64, 16)


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


def test_a_prompt_from_standard_input(native, tmp_path):
    child = process(
        "zimage_jax.generate",
        "-",
        "--model",
        native("plain"),
        *SMALL,
        "-o",
        "x.png",
        "--json",
        cwd=tmp_path,
    )
    out, err = child.communicate("a blue star\n", timeout=300)
    assert child.returncode == 0, err
    assert json.loads(out)["prompt"] == "a blue star"
    assert (tmp_path / "zimage_jax" / "xla").is_dir(), (
        "compiled programs are kept in the user's cache folder"
    )


def test_an_interrupt_leaves_finished_pictures(native, tmp_path):
    words = ("--model", native("plain"), "--size", "64x64", "-n", 500, "-o", "{index}.png")
    # a shell that runs its jobs in the background has them ignore the signal, and children would
    # inherit that
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    child = process("zimage_jax.generate", "a", *words, cwd=tmp_path)
    signal.signal(signal.SIGINT, ours)
    deadline = time.monotonic() + 300
    while (
        not (tmp_path / "1.png").exists() and time.monotonic() < deadline and child.poll() is None
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err[-2000:]
    assert err.splitlines()[-1] == "interrupted"
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
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    code, _, err = run("a", *SMALL, "-n", 3, "-o", "x.png")
    assert (code, err.splitlines()[-1]) == (130, "interrupted")


def test_the_converter_as_a_process(tmp_path):
    child = process("checkpoints_convert", tmp_path / "nowhere", tmp_path / "out", cwd=tmp_path)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1


# -- words about memory ----------------------------------------------------------------------------


def drawn_by(run, tmp_path, *words) -> dict:
    code, _, err = run(
        "a", *SMALL, "-s", 1, "-o", "m.png", "--overwrite", "--report", "m.json", *words
    )
    assert code == 0, err
    return json.loads((tmp_path / "m.json").read_text())


def test_words_about_memory(run, tmp_path):
    report = drawn_by(run, tmp_path, "--schedule", "ring", "--chunks", 2, "--trace", "t.json")
    assert (report["schedule"], report["chunks"], report["resident_chunks"]) == ("ring", 2, 0)
    assert report["copied_bytes"] > 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (
        drawn_by(run, tmp_path, "--chunk", "1=streamed", "--schedule", "resident")[
            "resident_chunks"
        ]
        == 1
    )
    peak = drawn_by(run, tmp_path, "--low-vram")["predicted_peak_bytes"]
    assert (
        drawn_by(run, tmp_path, "--max-vram", 1.001 * peak / 2**30)["peak_device_bytes"]
        <= 1.001 * peak
    )


def test_what_is_planned_is_said_before(run):
    _, _, err = run("a", *SMALL, "--schedule", "ring", "--max-vram", 1)
    assert (
        "schedule ring: 2 NFEs over 2 chunks of 1 block, the next copied meanwhile; predicted peak 0.00 GiB of 1.00 GiB"
        in err
    )


def test_seconds_are_predicted_for_a_known_card_alone(run, tmp_path, monkeypatch):
    ring = (
        "a",
        *SMALL,
        "-s",
        1,
        "-o",
        "m.png",
        "--overwrite",
        "--report",
        "m.json",
        "--schedule",
        "ring",
    )

    def predicted(*words) -> tuple[float | None, bool]:
        _, _, err = run(*ring, *words)
        return json.loads((tmp_path / "m.json").read_text())[
            "predicted_seconds"
        ], "s once parameters are read" in err

    assert predicted() == (None, False)
    monkeypatch.setattr("zimage_jax.planning.cards.of_device", lambda kind: cards.find("rtx-4090"))
    seconds, is_said = predicted("--dtype", "bfloat16")
    assert is_said
    assert 0 <= seconds < 1
    assert predicted() == (None, False), "the rates are those of bfloat16"
    for words in (("--text-encoder", "host"), ("--host-memory", "1")):
        assert predicted("--dtype", "bfloat16", *words) == (None, False)


def test_words_about_k_and_v(run, tmp_path, monkeypatch):
    """Flag and variable count, the picture says what they were, and --from-image repeats it, or
    with a flag does not."""
    monkeypatch.setenv("ZIMAGE_KV_GROUP", "2:1")
    told = drawn_by(run, tmp_path, "--kv-dtype", "bf16:fp16", "--kv-switch-t", 800)
    (tmp_path / "m.png").rename(tmp_path / "x.png")
    assert told["kv"] == {"dtype": "bf16:fp16", "switch_t": 800.0, "group": "2:1", "reuse": 1}
    monkeypatch.delenv("ZIMAGE_KV_GROUP")
    picture = ("--from-image", "x.png")
    assert drawn_by(run, tmp_path, *picture)["latents_sha256"] == told["latents_sha256"]
    other = drawn_by(run, tmp_path, *picture, "--kv-reuse", 2)
    assert other["kv"] == told["kv"] | {"reuse": 2}
    assert drawn_by(run, tmp_path)["kv"]["dtype"] is None


def test_a_flag_wins_over_the_environment_and_that_over_the_file(run, tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text(
        'schedule = "swap"\nchunks = 1\nsteps = 1\nchunk = ["0=resident"]\n'
    )
    report = drawn_by(run, tmp_path, "--config", "c.toml")
    assert (report["chunks"], report["resident_chunks"], report["steps"]) == (1, 1, 2)
    monkeypatch.setenv("ZIMAGE_SCHEDULE", "ring")
    monkeypatch.setenv("ZIMAGE_CHUNKS", "2")
    (tmp_path / "c.toml").write_text('schedule = "swap"\nchunks = 1\n')
    report = drawn_by(run, tmp_path, "--config", "c.toml")
    assert (report["schedule"], report["chunks"]) == ("ring", 2)
    assert drawn_by(run, tmp_path, "--config", "c.toml", "--schedule", "swap")["schedule"] == "swap"


@pytest.mark.parametrize(
    ("variables", "schedule", "resident"),
    [
        ({"ZIMAGE_CHUNKED_LOADING": "0"}, "resident", 2),
        ({"ZIMAGE_CHUNK_COUNT": "1"}, "swap", 0),
        ({"ZIMAGE_CHUNK_COUNT": "2"}, "ring", 0),
        ({"ZIMAGE_CHUNK_COUNT": "3"}, "hybrid", 1),
        ({"ZIMAGE_CHUNK_COUNT": "4"}, "resident", 2),
    ],
)
def test_variables_that_count_chunks(run, tmp_path, monkeypatch, variables, schedule, resident):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    report = drawn_by(run, tmp_path)
    assert (report["schedule"], report["resident_chunks"]) == (schedule, resident)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--schedule", "magic"),
            "'magic' is not one of 'auto', 'resident', 'swap', 'ring', 'hybrid', 'scan'",
        ),
        (("--chunks", 0), "0 is not in the range"),
        (("--chunks", 2, "--max-chunk-memory", 1), "say the same thing: give one of them"),
        (("--chunk", "two=resident"), "--chunk two=resident: expected a chunk's number"),
        (("--chunk", "9=resident"), "chunk 9 is not there: expected 0 to 1"),
        (("--max-vram", 0), "0.0 is not in the range"),
        (
            ("--host-memory", 1e-6, "--schedule", "ring"),
            "the host window of 0.00 GiB is smaller than a chunk",
        ),
        (("--config", "none.toml"), "--config none.toml: cannot be read as TOML"),
        (("--config", "bad.toml"), "no such key: magic; keys are the flags' names"),
        (("--vae-tile", 70), "the side of a tile must be a multiple of"),
        (("--kv-dtype", "int8"), "K/V dtype 'int8': expected one of float32, bf16, fp16, fp8"),
        (("--kv-group", "3"), "K/V group 3: expected one of 1, 2, 4"),
        (("--kv-group", "2:x"), "expected 1, 2 or 4, or two of them as in 2:1"),
        (("--kv-reuse", 0), "0 is not in the range"),
    ],
)
def test_words_about_memory_that_are_wrong(run, tmp_path, words, message):
    (tmp_path / "bad.toml").write_text("magic = 1\n")
    code, _, err = run("a", *SMALL, *words)
    assert (code, err.count("error:")) == (2, 1)
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.glob("*.png"))


def test_a_budget_that_nothing_fits(run, tmp_path):
    code, _, err = run("a", *SMALL, "--max-vram", 1e-5)
    assert code == 1
    assert "the smallest plan needs" in err.splitlines()[-1]
