"""python -m zimage_jax.plan as a user runs it."""

import json
from dataclasses import replace

import pytest

from tests.planning.test_cards import MINE
from tests.schedules import every
from zimage_jax import __main__ as commands
from zimage_jax import cli, devices, plan
from zimage_jax.model.config import TURBO
from zimage_jax.planning.cards import CARDS, find
from zimage_jax.units import GIB, MIB
from zimage_jax.weights.formats import uniform

KEYS = {
    "size",
    "schedule",
    "chunks",
    "resident_chunks",
    "predicted_peak_bytes",
    "predicted_seconds",
    "bound_by",
    "host_bytes",
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; gives exit code, standard output and standard error."""
    monkeypatch.setattr(cli, "use_compile_cache", lambda: None)

    def call(*words, command=plan.command):
        with pytest.raises(SystemExit) as leaving:
            cli.run(command, [*map(str, words)], "plan")
        out = capsys.readouterr()
        return leaving.value.code, out.out, out.err

    return call


def told(run, *words) -> dict:
    code, out, err = run(*words, "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


# one of each compute capability; the least memory first
SOME_CARDS = "t4", "rtx-3050-ti-laptop", "a100-40gb", "rtx-4050-laptop", "h100", "rtx-5090"


@pytest.mark.parametrize("card", every(CARDS, ["rtx-4090"], SOME_CARDS))
def test_every_card_has_a_row_per_size(run, card):
    result = told(run, "--card", card)
    assert result["card"] == card
    assert result["model"] == "turbo"
    assert [row["size"] for row in result["sizes"]] == list(devices.SIZES)
    for row in result["sizes"]:
        assert row.keys() >= KEYS
        if row["schedule"] is not None:
            assert row["predicted_peak_bytes"] <= result["budget_bytes"]
            assert row["predicted_seconds"] > 0
            assert row["bound_by"] in ("compute", "link")
    assert result["sizes"][0]["schedule"] is not None
    assert result["recommended_size"] == "1024x1024"


@pytest.mark.exhaustive
def test_the_table_says_the_same(run):
    result = told(run, "--card", "rtx-4090", "--max-vram", 4)
    assert result["budget_bytes"] == 4 * GIB
    code, out, err = run("--card", "rtx-4090", "--max-vram", 4, command=plan.command)
    assert (code, err) == (0, "")
    head, columns, *lines = out.splitlines()
    assert head == "turbo on rtx-4090: 4.00 GiB may be used, 8 NFEs"
    assert columns.split()[:2] == ["size", "schedule"]
    for row, line in zip(result["sizes"], lines, strict=False):
        assert line.split()[:2] == [row["size"], row["schedule"]]
    assert "recommended: 1024x1024" in out
    assert "temporaries: stored, compiled for sm_89" in out
    assert "assumed, not measured" in out


def test_sizes_by_name_ratio_and_in_a_row(run):
    sizes = [
        row["size"]
        for row in told(run, "--card", "h100", "--size", "16:9", "64x64", "--size", "64x64")[
            "sizes"
        ]
    ]
    assert sizes == ["1280x720", "64x64"]


def test_less_memory_holds_less_and_is_no_faster(run):
    rows = [
        told(run, "--card", "rtx-4090", "--max-vram", gib, "--size", "512x512")["sizes"][0]
        for gib in (1.5, 4, 8, 17)
    ]
    peaks, seconds = (
        [row[key] for row in rows] for key in ("predicted_peak_bytes", "predicted_seconds")
    )
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)


def test_words_about_memory_count(run):
    rows = told(
        run, "--card", "rtx-4090", "--schedule", "ring", "--chunks", 6, "--size", "512x512"
    )["sizes"]
    assert (rows[0]["schedule"], rows[0]["chunks"], rows[0]["resident_chunks"]) == ("ring", 6, 0)


def test_words_about_k_and_v_count(run):
    words = ("--card", "rtx-4090", "--size", "1024x1024", "--schedule", "ring")
    (plain,), (grouped,), (reused,) = (
        told(run, *words, *more)["sizes"] for more in ((), ("--kv-group", 2), ("--kv-reuse", 2))
    )
    assert plain["kv_bytes"] == 2 * 4160 * 3840 * 2
    assert grouped["kv_bytes"] == 2 * 1088 * 3840 * 2
    assert grouped["predicted_seconds"] < plain["predicted_seconds"]
    assert reused["kv_bytes"] == 30 * plain["kv_bytes"]
    # every other NFE does without two matrices of 3840 x 3840 and a norm in 30 blocks
    assert plain["link_bytes"] - reused["link_bytes"] == 4 * 30 * 2 * (2 * 3840**2 + 128)
    assert reused["predicted_peak_bytes"] - plain["predicted_peak_bytes"] >= reused["kv_bytes"]


def test_what_does_not_fit_is_a_row_too(run):
    result = told(run, "--card", "rtx-4060", "--max-vram", 0.1, "--size", "512x512")
    (row,) = result["sizes"]
    assert row["schedule"] is row["predicted_seconds"] is result["recommended_size"] is None
    assert row["predicted_peak_bytes"] > result["budget_bytes"]
    assert "none fits" in run("--card", "rtx-4060", "--max-vram", 0.1, "--size", "512x512")[1]


def test_a_peak_is_explained_array_by_array(run):
    words = ("--card", "rtx-4090", "--max-vram", 0.72, "--size", "1024x1024")
    (row,) = told(run, *words)["sizes"]
    assert (row["schedule"], row["chunks"]) == ("ring", 60), "halves, where blocks do not fit"
    arrays = row["predicted_arrays_by_stage"]
    peaks = {stage: sum(of.values()) for stage, of in arrays.items()}
    assert peaks == row["predicted_peak_bytes_by_stage"]
    assert max(peaks.values()) == row["predicted_peak_bytes"] <= 0.72 * GIB
    said = run(*words, "--explain")[1]
    for stage, of in arrays.items():
        assert f"1024x1024 {stage}: {peaks[stage] / MIB:,.1f} MiB" in said
        assert all(name in said for name in of)
    assert said.count("(the peak)") == 1
    assert "slot 1 (as large as noise_refiner.0.feed_forward)" in said
    assert "(the peak)" not in run(*words)[1]


def test_steps_and_guidance_are_the_models_own(run):
    turbo, base = (
        told(run, "--model", m, "--card", "rtx-3060", "1024x1024") for m in ("turbo", "base")
    )
    assert (turbo["steps"], turbo["guidance"]) == (8, 0)
    assert base["steps"] > 8
    assert base["guidance"] > 0
    seconds = [result["sizes"][0]["predicted_seconds_by_stage"] for result in (turbo, base)]
    per_nfe = [of["denoise"] / n for of, n in zip(seconds, (8, base["steps"]), strict=True)]
    assert per_nfe[1] == pytest.approx(2 * per_nfe[0], rel=0.15), "two contexts"
    assert "NFEs, with guidance" in run("--model", "base", "--card", "rtx-3060", "1024x1024")[1]


def test_this_machines_own_device(run, native):
    result = told(run, "--model", native("plain"), "--size", "64x48", "--steps", 2)
    (row,) = result["sizes"]
    assert result["card"] == "cpu"
    assert row["schedule"] == "resident"
    assert result["rates"].startswith("measured: ")
    assert row["predicted_peak_bytes_by_stage"].keys() == row["predicted_seconds_by_stage"].keys()


@pytest.mark.exhaustive
def test_the_prediction_is_that_of_the_run(run, native):
    from zimage_jax import Memory, ZImage

    (row,) = told(run, "--model", native("plain"), "--size", "64x48", "--schedule", "ring")["sizes"]
    pipe = ZImage.load(native("plain"), memory=Memory(schedule="ring"))
    # a caption of 33 to 64 tokens, as the plan supposes
    report = pipe.generate("red circle " * 10, seed=1, width=64, height=48).report
    assert row["predicted_peak_bytes"] == report["predicted_peak_bytes"]
    assert row["host_bytes"] == report["host_bytes"]


def test_a_host_window_reads_from_disk(run):
    words = ("--card", "rtx-4060", "--size", "512x512", "--schedule", "ring", "--chunks", 30)
    (plain,) = told(run, *words)["sizes"]
    result = told(run, *words, "--host-memory", 2)
    (read,) = result["sizes"]
    assert read["predicted_seconds"] > 1.5 * plain["predicted_seconds"]
    assert (plain["bound_by"], read["bound_by"]) == ("link", "disk")
    assert read["predicted_peak_bytes"] == plain["predicted_peak_bytes"]
    assert read["host_bytes"] < 3 * GIB < 18 * GIB < plain["host_bytes"]
    assert result["disk"].startswith("3 GB/s, assumed: an NVMe drive; nothing of the checkpoint")
    faster = told(run, *words, "--host-memory", 2, "--disk-gbps", 100)
    assert faster["disk"].startswith("100 GB/s, as given with --disk-gbps; ")
    assert faster["sizes"][0]["bound_by"] == "link"
    out = run(*words, "--host-memory", 2)[1]
    assert "\ndisk: 3 GB/s" in out
    assert "parameters read from disk at every visit" in out
    assert "disk" not in told(run, *words)


def test_the_context_is_named_beside_the_peak(run):
    words = ("--card", "rtx-3050-ti-laptop", "--size", "512x512")
    result = told(run, *words)
    assert (result["context_bytes"], result["context"]) == (350 * 2**20, "assumed")
    assert (
        "\nbeside the peak: 0.35 GiB of the card for CUDA's own context, assumed\n"
        in run(*words)[1]
    )


def test_a_measured_card_by_its_file(run, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(MINE.as_json()))
    words = ("--card", path, "--size", "512x512", "--schedule", "ring", "--chunks", 30)
    result = told(run, *words)
    assert (result["card"], result["context_bytes"]) == ("mine", MINE.context_bytes)
    assert result["budget_bytes"] == 6 * GIB
    assert result["rates"].startswith("measured on NVIDIA GeForce RTX 4060 Laptop GPU, 2026-11-25")
    (row,) = result["sizes"]
    path.write_text(json.dumps(replace(MINE, link=MINE.link / 2).as_json()))
    (slower,) = told(run, *words)["sizes"]
    assert slower["predicted_seconds"] > 1.5 * row["predicted_seconds"]
    assert told(run, *words, "--host-memory", 2)["disk"].startswith("2.5 GB/s, measured; ")
    path.write_text("{}")
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "mine.json: expected the keys format, name" in err


def test_a_measured_card_that_is_in_no_table_is_not_compiled_for(run, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(replace(MINE, device="NVIDIA GeForce RTX 9090").as_json()))
    code, _, err = run("--card", path, "--compile")
    assert code == 2
    assert "--compile: expected a card of the table, got mine" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--card", "voodoo-2"), "card 'voodoo-2': expected one of rtx-2060, "),
        (
            ("--model", "turbo-9000", "--card", "h100"),
            "--model turbo-9000: neither a folder nor one of turbo, base, turbo-24",
        ),
        (("--card", "h100", "--size", "huge"), "--size huge: expected WIDTHxHEIGHT"),
        (
            ("--card", "h100", "--size", "100x64"),
            "width must be a multiple of 16, got 100 (the nearest is 96)",
        ),
        (("--card", "h100", "--size", "16384x64"), "this model draws at most 8192 x 8192 pixels"),
        (("--model", "turbo", "--compile"), "--compile needs --card"),
        (("--card", "h100", "--disk-gbps", "3"), "--disk-gbps needs --host-memory"),
        (
            ("--card", "rtx-4060", "--chunks", "4", "--schedule", "ring", "--host-memory", "1"),
            "--host-memory 1.00 GiB is smaller than a chunk of 1.69 GiB",
        ),
        (("--card", "h100", "--steps", "0"), "Invalid value for '--steps'"),
    ],
)
def test_wrong_words_are_one_line(run, words, said):
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_model_of_other_widths_has_no_stored_figures(run, native):
    code, _, err = run("--model", native("plain"), "--card", "rtx-4090")
    assert code == 2
    assert "figures are stored for Z-Image's published widths only" in err


def test_the_compiler_for_a_card_is_asked_about_any_widths(run, native, gpu_compiler):
    words = (
        "--model",
        native("plain"),
        "--card",
        "rtx-4090",
        "--compile",
        "--size",
        "64x48",
        "--steps",
        2,
    )
    result = told(run, *words)
    assert result["temporaries"].startswith("compiled for this card without one")
    (row,) = result["sizes"]
    assert row["schedule"] == "resident"
    assert all(0 < bytes_ < GIB for bytes_ in row["predicted_peak_bytes_by_stage"].values())


def test_it_is_among_the_commands(run):
    code, out, _ = run(
        "plan", "--card", "h200", "--size", "512x512", "--json", command=commands.command
    )
    assert code == 0
    assert json.loads(out)["card"] == "h200"


def test_a_card_without_bfloat16_computes_in_float16():
    card = find("rtx-3060")
    turing = replace(card, name="rtx-2060", capability=(7, 5))
    assert devices.of_cards([card], uniform(TURBO, "bfloat16"), False).compute == "bfloat16"
    assert devices.of_cards([turing], uniform(TURBO, "bfloat16"), False).compute == "float16"


@pytest.mark.exhaustive
def test_another_format_is_planned_beside_bfloat16(run):
    words = ("--card", "rtx-4090", "--max-vram", 2, "512x512", "1024x1024")
    code, out, _ = run("--format", "lossless", *words)
    assert code == 0
    assert "stored as lossless; in bfloat16: 512x512 3." in out
    code, out, _ = run("--format", "layers.*=int8", *words, "--json")
    found = json.loads(out)
    assert found["format"] == "bfloat16,layers.*=int8"
    link_bound, compute_bound = found["sizes"]
    assert link_bound["predicted_seconds"] < 0.7 * link_bound["predicted_seconds_in_bfloat16"]
    assert compute_bound["predicted_seconds"] > compute_bound["predicted_seconds_in_bfloat16"]


def test_a_format_is_for_a_model_without_files(run, native):
    code, _, err = run("--model", native("plain"), "--format", "int8")
    assert code == 2
    assert (
        "--format is for turbo, base, turbo-24; a checkpoint is stored as it was converted" in err
    )


def test_a_picture_from_a_picture_is_planned(run):
    words = ("--card", "rtx-4090", "1024x1024", "--json")
    whole, part = (
        json.loads(run(*words, *more, command=plan.command)[1])
        for more in ((), ("--strength", 0.6))
    )
    assert (whole["nfes"], part["nfes"], part["steps"]) == (8, 3, 8)
    (before,), (after,) = whole["sizes"], part["sizes"]
    assert after["predicted_seconds"] < before["predicted_seconds"]
    assert "encode" in after["predicted_peak_bytes_by_stage"]
    assert "encode" not in before["predicted_peak_bytes_by_stage"]


def test_unequal_cards_have_unequal_shares(run):
    """By predicted seconds, each within its budget; the larger share is the faster card's."""
    words = ["--cards", "rtx-3060,rtx-4070@x8", "--split", "chunks", "--max-vram", "4,5"]
    code, out, err = run(*words, "512x512", "--json", command=plan.command)
    assert code == 0, err
    result = json.loads(out)
    assert result["cards"] == ["rtx-3060", "rtx-4070@x8"]
    assert result["host"].startswith("60 GB/s for all links together, assumed")
    (row,) = result["sizes"]
    first, second = row["devices"]
    assert first["chunks"] + second["chunks"] == row["chunks"]
    assert first["chunks"] < second["chunks"]
    for device, budget in zip(row["devices"], result["budget_bytes"], strict=True):
        assert device["predicted_peak_bytes"] <= budget
        stages = device["predicted_arrays_by_stage"].values()
        assert max(sum(of.values()) for of in stages) == device["predicted_peak_bytes"]


@pytest.mark.exhaustive
def test_two_small_cards_hold_the_model_and_two_links_halve_what_the_link_bounds(run):
    def seconds(*words: str) -> tuple[float, dict]:
        code, out, err = run(*words, "512x512", "--json", command=plan.command)
        assert code == 0, err
        (row,) = json.loads(out)["sizes"]
        return row["predicted_seconds"], row

    both = "--cards", "rtx-4090@x8,rtx-4090@x8", "--split", "chunks"
    alone, _ = seconds("--card", "rtx-4090@x8", "--max-vram", "2")
    together, row = seconds(*both, "--max-vram", "2")
    assert together < 0.6 * alone
    assert all(device["copied_bytes_per_nfe"] > 0 for device in row["devices"])
    _, row = seconds("--cards", "rtx-3060,rtx-3060", "--split", "chunks")
    assert [device["copied_bytes_per_nfe"] for device in row["devices"]] == [0, 0]
    slow, row = seconds(*both, "--max-vram", "2", "--host-gbps", "10")
    assert slow > together
    assert row["bound_by"] == "host memory"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cards", "rtx-3060,rtx-4070"], "--cards needs --split chunks"),
        (["--split", "chunks", "--card", "l4"], "--split chunks needs --cards"),
        (["--cards", "l4,l4", "--card", "l4", "--split", "chunks"], "give one of them"),
        (["--card", "l4", "--host-gbps", "9"], "--host-gbps needs --cards"),
        (["--card", "rtx-4060@x16"], "expected rtx-4060@x and one of 1, 2, 4, 8 lanes"),
        (
            ["--cards", "l4,l4", "--split", "chunks", "--max-vram", "1,2,3"],
            "3 sizes need --devices with as many",
        ),
        (
            ["--cards", "l4,l4", "--split", "chunks", "--schedule", "scan"],
            "scan is one program, of one device",
        ),
    ],
)
def test_cards_that_cannot_be_planned_together(words, message, run):
    code, _, err = run(*words, "512x512", command=plan.command)
    assert code == 2
    assert message in err
