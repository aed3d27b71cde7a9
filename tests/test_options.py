"""Options about memory, K and V, their variables and the TOML file, through generate."""

import json
import re

import click
import pytest

from tests.test_generate import SMALL
from zimage_jax import Memory
from zimage_jax.errors import UsageError
from zimage_jax.memory_options import memory_of, memory_options
from zimage_jax.planning import cards


def drawn_by(run, tmp_path, *words) -> dict:
    code, _, err = run(
        "a", *SMALL, "-s", 1, "-o", "m.png", "--overwrite", "--report", "m.json", *words
    )
    assert code == 0, err
    return json.loads((tmp_path / "m.json").read_text())


@pytest.mark.exhaustive
def test_float16_is_asked_for_and_told_of(run, tmp_path):
    report = drawn_by(run, tmp_path, "--dtype", "float16")
    assert report["dtype"] == "float16"
    assert report["kv_bytes"] == report["kv_bytes_without_policy"]
    assert 2 * report["kv_bytes"] == drawn_by(run, tmp_path)["kv_bytes"]


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
    assert re.search(r"^schedule ring, .*; predicted peak [\d.]+ MiB of 1.00 GiB$", err, re.M)


@pytest.mark.exhaustive
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
        ], "s once compiled" in err

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
            "schedule 'magic': expected one of auto, resident, ring, hybrid, swap, scan",
        ),
        (("--chunks", 0), "--chunks must be from 1 to 10000, got 0"),
        (("--chunks", 2, "--max-chunk-memory", 1), "both set the size of a chunk"),
        (("--chunk", "two=resident"), "--chunk two=resident: expected a chunk's number"),
        (("--chunk", "9=resident"), "chunk 9 does not exist: expected 0 to 1"),
        (("--max-vram", 0), "--max-vram must be above 0 GiB, at most 1048576 GiB, got 0.0"),
        (("--max-vram", "nan"), "--max-vram must be above 0 GiB, at most 1048576 GiB, got nan"),
        (("--host-memory", "inf"), "--host-memory must be above 0 GiB"),
        (("--max-chunk-memory", "1e308"), "--max-chunk-memory must be above 0 GiB"),
        (("--prefetch", -1), "--prefetch must be from 0 to 10000, got -1"),
        (("--chunk", "²=resident"), "--chunk ²=resident: expected a chunk's number"),
        (("--kv-group", "²"), "expected 1, 2 or 4"),
        (("--kv-switch-t", "inf"), "--kv-switch-t must be from 0 to 1000, got inf"),
        (("--offload-layers", "vae"), "--offload-layers vae: expected layers.N, transformer or"),
        (
            ("--offload-layers", "layers.99"),
            "layers.99: no such block; expected layers.0 to layers.1",
        ),
        (
            ("--host-memory", 1e-6, "--schedule", "ring"),
            "--host-memory 0.0 MiB is smaller than a chunk",
        ),
        (("--config", "none.toml"), "--config none.toml: cannot be read (No such file"),
        (("--config", "/dev/zero"), "expected a file, found a device"),
        (("--config", "deep.toml"), "nested too deeply"),
        (("--config", "bad.toml"), "no such key: magic; keys are the flags' names"),
        (("--vae-tile", 70), "the side of a tile must be a multiple of"),
        (("--kv-dtype", "int4"), "K/V dtype 'int4': expected one of float32, bf16, fp16, fp8"),
        (("--kv-group", "3"), "K/V group '3': expected 1, 2 or 4"),
        (("--kv-group", "2:x"), "expected 1, 2 or 4, or EARLY:LATE as in 2:1"),
        (("--kv-reuse", 0), "--kv-reuse must be from 1 to 1000, got 0"),
    ],
)
def test_words_about_memory_that_are_wrong(run, tmp_path, words, message):
    (tmp_path / "bad.toml").write_text("magic = 1\n")
    (tmp_path / "deep.toml").write_text("chunk = " + "[" * 3000)
    code, _, err = run("a", *SMALL, *words)
    assert (code, err.count("error:")) == (2, 1)
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.glob("*.png"))


def test_a_budget_that_nothing_fits(run, tmp_path):
    code, _, err = run("a", *SMALL, "--max-vram", 1e-5)
    assert code == 1
    assert "the smallest plan needs" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps = 1.5", "steps must be a whole number, got 1.5"),
        ("steps = true", "steps must be a whole number, got True"),
        ("seed = [true]", "seed must be a whole number, got True"),
        ("seed = [[1]]", "seed must be a whole number, got list"),
        ("max-vram = nan", "max-vram in --config must be above 0 GiB"),
        ("max-vram = [1]", "max-vram must be a number, got list"),
        ("n = {a = 1}", "n must be a whole number, got dict"),
        ("vae-tile = '64'", "vae-tile must be a whole number, got '64'"),
        ("overwrite = 5", "overwrite must be true or false, got 5"),
        ("overwrite = {}", "overwrite must be true or false, got dict"),
        ("report = 1", "report must be text in quotes, got 1"),
        ("model = 2026-01-01", "model must be text in quotes, got date"),
        ("preview = nan", "preview must be text in quotes, got nan"),
        ("from-image = ['x.png']", "from-image must be text in quotes, got list"),
        ('report = "a\\u0000b"', "report: text must not have a NUL character"),
        ("chunks = 1\n'chunks ' = 1", "no such key: chunks"),
        ("max-vram = 1\nmax_vram = 2", "max_vram is given twice"),
        ("config = 'c.toml'", "no such key: config"),
        ("enable_cpu_offload = 'yes'", "enable_cpu_offload must be true or false, got 'yes'"),
    ],
)
def test_a_value_of_the_file_has_the_type_of_its_option(run, tmp_path, line, message):
    (tmp_path / "c.toml").write_text(line)
    code, out, err = run("a", "--config", "c.toml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_several_values_are_a_list_or_one(run, tmp_path):
    (tmp_path / "c.toml").write_text("seed = [3, 4]\n")
    report = drawn_by(run, tmp_path, "--config", "c.toml", "-o", "{seed}.png")
    assert report["seed"] == 1, "a flag wins"
    (tmp_path / "c.toml").write_text("chunk = '0=resident'\nschedule = 'ring'\n")
    assert drawn_by(run, tmp_path, "--config", "c.toml")["resident_chunks"] == 1


def test_offloading_in_the_words_of_other_programs(run, tmp_path):
    (tmp_path / "c.toml").write_text("enable_cpu_offload = true\n")
    report = drawn_by(run, tmp_path, "--config", "c.toml")
    assert report["schedule"] == "ring"
    assert report["copied_bytes_by_stage"]["text"] > 0
    assert drawn_by(run, tmp_path, "--config", "c.toml", "--schedule", "swap")["schedule"] == "swap"
    (tmp_path / "c.toml").write_text('offload_layers = ["layers.1", "text_encoder"]\n')
    report = drawn_by(run, tmp_path, "--config", "c.toml")
    assert (report["chunks"], report["resident_chunks"]) == (2, 1), "the other block stays"
    (tmp_path / "c.toml").write_text('offload_layers = ["transformer"]\n')
    assert drawn_by(run, tmp_path, "--config", "c.toml")["resident_chunks"] == 0


def memory(*words) -> Memory:
    """What a command makes of options about memory."""
    found = []

    @click.command()
    @memory_options
    def command(**given):
        found.append(memory_of(**given))

    command.main([*map(str, words)], standalone_mode=False)
    return found[0]


def test_offloading_is_staging_and_streaming():
    assert memory("--enable-cpu-offload") == Memory(schedule="ring", text_encoder="staged")
    assert memory("--enable-cpu-offload", "--low-vram").schedule == "auto"
    assert memory("--enable-cpu-offload", "--text-encoder", "host").text_encoder == "host"
    assert memory("--offload-layers", "text_encoder") == Memory(text_encoder="staged")
    assert memory("--offload-layers", "transformer.layers.3").pins == (("layers.3", "streamed"),)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZIMAGE_MAX_VRAM", "nan", "ZIMAGE_MAX_VRAM must be above 0 GiB"),
        ("ZIMAGE_CHUNKS", "x", "ZIMAGE_CHUNKS must be a whole number, got 'x'"),
        ("ZIMAGE_CHUNK_COUNT", "²", "ZIMAGE_CHUNK_COUNT must be a whole number, got '²'"),
        ("ZIMAGE_CHUNK_COUNT", "9" * 5000, "ZIMAGE_CHUNK_COUNT must be a whole number"),
        ("ZIMAGE_CHUNK_COUNT", "0", "ZIMAGE_CHUNK_COUNT must be from 1 to 10000, got 0"),
        ("ZIMAGE_CHUNKED_LOADING", "junk", "ZIMAGE_CHUNKED_LOADING=junk: expected 0 or 1"),
    ],
)
def test_variables_that_are_wrong(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as fault:
        memory()
    assert message in str(fault.value)
