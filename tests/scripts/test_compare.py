"""The comparison of schedules: what a sweep declares, that it resumes, one cell from declaration to
report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from scripts.bench import convert as bench_convert
from scripts.compare import gpu_times, measured, sweep
from scripts.compare import program as compare_program
from scripts.compare import rows as report_data
from scripts.compare import schedules as compare_schedules
from scripts.report import report
from zimage_jax.errors import UsageError
from zimage_jax.weights.checkpoint import Checkpoint
from zimage_jax.weights.search import TINY

ROOT = Path(__file__).parent.parent.parent
SMALL = """
[defaults]
size = "96x96"
[[measure]]
schedule = "ring"
steps = 2
repeats = 1
[[measure]]
max_vram_mib = 1
[[simulate]]
card = "rtx-4090"
schedule = ["ring", "resident"]
chunks = 30
size = ["256x256", "1024x1024"]
[[simulate]]
card = "rtx-3060"
max_vram_gib = 3
"""


def sweep_of(folder: Path, text: str) -> Path:
    file = folder / "sweep.toml"
    file.write_text(text)
    return file


def test_lists_multiply_and_a_cell_counts_once(tmp_path):
    file = sweep_of(
        tmp_path,
        'defaults = {size = "96x96", blocks = 2}\n[[measure]]\nschedule = ["ring", "swap"]\nchunks = [2, 4]\n'
        '[[measure]]\nchunks = 4\nschedule = "ring"\n[[loading]]\n',
    )
    cells = sweep.cells(file, model="elsewhere")
    assert [(c["kind"], c.get("schedule"), c.get("chunks")) for c in cells] == [
        ("measure", "ring", 2),
        ("measure", "ring", 4),
        ("measure", "swap", 2),
        ("measure", "swap", 4),
        ("loading", None, None),
    ]
    assert cells[0]["size"] == "96x96"
    assert cells[0]["model"] == "elsewhere"
    assert cells[-1] == {"kind": "loading", "blocks": 2}
    assert sweep.identity(cells[0]) == sweep.identity(dict(reversed(cells[0].items())))
    assert len({sweep.identity(cell) for cell in cells}) == 5


@pytest.mark.parametrize(
    "file", sorted(compare_schedules.SWEEPS.glob("*.toml")), ids=lambda file: file.stem
)
def test_the_sweeps_that_come_along_are_sound(file):
    for cell in sweep.cells(file):
        assert compare_schedules.declared(cell)["kind"] in sweep.KINDS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = ", "cannot be read as TOML"),
        ("[[draw]]\n", "unknown: draw"),
        ("[[measure]]\ncolour = 1\n", r"\[\[measure\]\] has no colour"),
        ("[measure]\nsteps = 1\n", "expected a list"),
        ("[defaults]\ncolour = 1\n", "unknown: colour"),
    ],
)
def test_what_a_sweep_cannot_say(tmp_path, text, expected):
    with pytest.raises(UsageError, match=expected):
        sweep.cells(sweep_of(tmp_path, text))


def test_rows_survive_an_interruption_but_not_damage(tmp_path):
    file, whole = tmp_path / "r.jsonl", json.dumps({"cell": "a", "kind": "measure"})
    file.write_text(f"{whole}\n{whole[:9]}")
    assert [row["cell"] for row in sweep.rows(file)] == ["a"]
    file.write_text(f"{whole[:9]}\n{whole}\n")
    with pytest.raises(UsageError, match="line 1"):
        sweep.rows(file)


@pytest.fixture(scope="module")
def results(tmp_path_factory, cache_of_processes) -> Path:
    """The rows of SMALL, by processes as a user starts them."""
    folder = tmp_path_factory.mktemp("compare")
    changed = {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": cache_of_processes,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setitem(os.environ, name, value)
        compare_schedules.main.main(
            [str(sweep_of(folder, SMALL)), "-o", str(folder / "r.jsonl")], standalone_mode=False
        )
    return folder / "r.jsonl"


@pytest.mark.exhaustive
def test_a_cell_end_to_end(results):
    rows = sweep.rows(results)
    ring, too_small, *simulated = rows
    assert ring["success"], ring
    assert (ring["schedule"], ring["chunks"], ring["psnr_db"], ring["identical_latents"]) == (
        "ring",
        4,
        "inf",
        True,
    )
    assert ring["predicted_peak_bytes"] == ring["peak_device_bytes"]
    assert all(
        ring[key] > 0
        for key in (
            "seconds",
            "predicted_seconds",
            "cpu_seconds",
            "copied_bytes",
            "resident_seconds",
        )
    )
    assert {lane for lane, *_ in ring["events"]} >= {"compute", "copy"}
    assert max(nbytes for _, _, nbytes in ring["levels"]) == ring["peak_device_bytes"]
    assert {"machine", "versions", "commit", "date"} <= ring.keys()
    assert not too_small["success"]
    assert "the smallest plan needs" in too_small["error"]
    assert [row["success"] for row in simulated] == [True] * 5
    assert not any("seconds" in row or "peak_device_bytes" in row for row in simulated)


@pytest.mark.exhaustive
def test_a_second_run_adds_what_is_missing(results, monkeypatch, capsys):
    monkeypatch.setattr(
        compare_schedules, "answers", lambda *_, **__: pytest.fail("a cell was run again")
    )
    words = [str(results.parent / "sweep.toml"), "-o", str(results)]
    before = results.read_text()
    compare_schedules.main.main(words, standalone_mode=False)
    assert results.read_text() == before
    assert "0 cells done" in capsys.readouterr().out
    lines = before.splitlines(keepends=True)
    results.with_name("short.jsonl").write_text("".join(lines[1:]))
    ran = []
    monkeypatch.setattr(
        compare_schedules,
        "answers",
        lambda script, cells, **_: ran.append(cells) or [{"error": "none"}],
    )
    compare_schedules.main.main(
        [words[0], "-o", str(results.with_name("short.jsonl"))], standalone_mode=False
    )
    assert [cells[0]["schedule"] for cells in ran] == ["ring"]


@pytest.mark.exhaustive
def test_the_report_is_one_page_that_asks_for_nothing(results, tmp_path):
    text = report.write(sweep.rows(results), tmp_path / "report").read_text("utf-8")
    assert not re.search(r"<script|<link|(src|href)=\"(?!data:)", text)
    for word in (
        "Every schedule",
        "Predicted against measured",
        "predicted, nothing measured",
        "infinite",
        "@media print",
    ):
        assert word in text
    assert "the smallest plan needs" in text
    for name in (
        "pareto",
        "predicted_against_measured",
        "timeline",
        "memory",
        "costs",
        "pareto_predicted",
        "crossover",
    ):
        assert (tmp_path / "report" / f"{name}.png").exists()
        assert (tmp_path / "report" / f"{name}.svg").exists()


@pytest.mark.exhaustive
def test_programs_of_others_are_started_and_heard(monkeypatch, tmp_path):
    """A stand-in for sd-cli: what it is asked, what it says, how it fails; ours draws."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "native").symlink_to(TINY)
    cells = sweep.cells(
        sweep_of(
            tmp_path,
            '[defaults]\nsize = "64x64"\nsteps = 1\n[[program]]\nsystem = "stable-diffusion.cpp"\n'
            'mode = ["disk", "resident"]\nmax_vram_mib = 512\n[[program]]\nsystem = "zimage_jax"\nmode = "auto"\n'
            '[[program]]\nsystem = "paint"\nmode = "auto"\n',
        ),
        model=str(tmp_path / "model"),
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not on PATH" in compare_program.answer(cells[0])["not_measured"]
    script = tmp_path / "sd-cli"
    script.write_text(
        f"""#!{sys.executable}
import sys
words = sys.argv
if "--version" in words:
    sys.exit(print("stable-diffusion.cpp version 7"))
if "--params-backend" not in words:
    sys.exit("[ERROR] out of memory")
open(words[words.index("-o") + 1], "w").close()
assert words[words.index("--max-vram") + 1] == "0.5"
assert words[words.index("-W") + 1] == "64"
print("[INFO ] x.cpp:1 - get_learned_condition completed, taking 1.50s")
print("[INFO ] x.cpp:2 - sampling completed, taking 20.25s")
"""
    )
    script.chmod(0o755)
    row = compare_program.answer(cells[0])
    assert row["seconds_by_stage"] == {"text": 1.5, "denoise": 20.25}
    assert row["versions"] == {"stable-diffusion.cpp": "version 7"}
    assert row["seconds"] > 0
    assert row["process_peak_bytes"] > 2**20
    assert compare_program.answer(cells[1]) == {"error": "code 1: [ERROR] out of memory"}
    ours = compare_program.answer(cells[2])
    assert ours["seconds_by_stage"].keys() == set(report_data.STAGES)
    assert ours["peak_device_bytes"] > 2**20
    assert "expected zimage_jax" in compare_program.answer(cells[3])["error"]
    shared = {"success": True, "cell": "x"}
    rows = [
        shared | compare_schedules.declared(c) | r
        for c, r in zip(cells[::2], (row, ours), strict=True)
    ]
    rows.append(compare_schedules.declared(cells[1]) | {"success": False, "error": "code 1"})
    page = report.programs(rows)
    for word in (
        "cpp, disk, 64x64, budget 0.50 GiB",
        "20.25",
        "zimage_jax, auto",
        "code 1",
        "cpp version 7, zimage_jax",
    ):
        assert word in page


@pytest.mark.live
def test_whole_programs_draw_from_the_same_sources(tmp_path):
    """What full_size.toml does, with a small model: sources of random weights, converted for ours
    and read by diffusers."""
    bench_convert.write_sources(
        tmp_path / "sources", Checkpoint(TINY).config, bench_convert.SINGLE_FILES
    )
    convert = [
        sys.executable,
        "-m",
        "checkpoints_convert",
        tmp_path / "sources",
        tmp_path / "native",
        "--quiet",
    ]
    subprocess.run(convert, check=True)
    shared = {"kind": "program", "model": str(tmp_path), "size": "64x64", "steps": 2}
    for system, mode in (
        ("zimage_jax", "resident"),
        ("diffusers", "resident"),
        ("diffusers", "group block, disk"),
    ):
        row = compare_program.answer(shared | {"system": system, "mode": mode})
        assert row.get("seconds_by_stage", {}).get("denoise", 0) > 0, row
        assert system in row["versions"]


def test_an_empty_file_is_a_line(tmp_path):
    (tmp_path / "r.jsonl").touch()
    with pytest.raises(click.ClickException, match="no rows"):
        report.main.main(
            [str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "x")], standalone_mode=False
        )


def test_the_front():
    rows = [
        {"kind": "simulate", "predicted_peak_bytes": peak, "predicted_seconds": seconds}
        for peak, seconds in [(3, 1.0), (1, 5.0), (2, 5.0), (2, 3.0), (4, 1.0)]
    ]
    assert [report_data.peak(row) for row in report_data.front(rows)] == [1, 2, 3]


@pytest.mark.exhaustive
def test_where_the_ring_is_free(results):
    found = report_data.crossovers(report_data.of_kind(sweep.rows(results), "simulate"))
    side, slower = found["rtx-4090"]
    assert side == 1024
    assert slower > 5


@pytest.mark.exhaustive
def test_a_gpu_cell_has_its_floor_and_the_resident_picture(monkeypatch):
    """On a CPU, with a profile of two copies and two kernels in two NFEs in place of a GPU's."""
    events = [
        ("MemcpyH2D", (0.0, 2.0)),
        ("gemm", (1.0, 4.0)),
        ("MemcpyD2D", (4.0, 9.0)),
        ("MemcpyH2D", (9.0, 10.0)),
    ]
    monkeypatch.setattr(gpu_times, "_events", lambda profile: iter(events))
    shared = {"kind": "measure", "size": "96x96", "steps": 5, "repeats": 1}
    resident, ring = (
        measured.measure_on_gpu(shared | words)
        for words in ({"schedule": "resident"}, {"schedule": "ring", "chunks": 4})
    )
    assert ring["identical_latents"]
    assert ring["psnr_db"] == "inf"
    # per NFE; the copy from device to device is neither
    assert (ring["kernel_seconds_per_nfe"], ring["copy_seconds_per_nfe"]) == (1.5, 1.5)
    assert ring["bare_copy_seconds_per_nfe"] == 1.0
    assert resident["copied_bytes_per_nfe"] == 0
    assert resident["floor_seconds_per_nfe"] == ring["floor_seconds_per_nfe"] == 1.5
    storage = Checkpoint(TINY).storage
    whole = storage.nbytes("transformer", *(f"layers.{i}" for i in range(8)))
    assert ring["copied_bytes_per_nfe"] > whole, "the noise refiner's blocks are copied too"


@pytest.mark.exhaustive
def test_an_allocators_peak_is_of_the_cell_that_raised_it(monkeypatch):
    monkeypatch.setattr(gpu_times, "_events", lambda profile: iter([("gemm", (0.0, 1.0))]))
    peaks = iter([0, 2**30, 2**30, 2**30])  # before and after each cell
    monkeypatch.setattr(measured, "_allocator_peak", lambda: next(peaks))
    cell = {"kind": "measure", "size": "96x96", "steps": 5, "repeats": 1, "schedule": "ring"}
    monkeypatch.setattr(measured, "peaks", lambda result: {"peak_device_bytes": 2**30})
    first, second = measured.measure_on_gpu(cell), measured.measure_on_gpu(cell)
    assert first["peak_device_bytes"] == 2**30
    assert second["peak_device_bytes"] < 2**25
    assert second["peak_device_bytes_from"] == "ledger"


def test_a_picture_of_another_process_is_compared_by_its_bits():
    cells = [
        {"kind": "measure", "size": "96x96", "schedule": s, "max_vram_mib": m}
        for s, m in (("resident", 9), ("auto", 4))
    ]
    rows = [
        {
            "job": sweep.job(cell),
            "schedule": cell["schedule"],
            "latents_sha256": "a",
            "psnr_db": None,
        }
        for cell in cells
    ]
    compare_schedules._compare_with_resident(rows[1], rows[:1])
    assert (rows[1]["identical_latents"], rows[1]["psnr_db"]) == (True, "inf")
    other = {"job": sweep.job(cells[0] | {"seed": 8}), "latents_sha256": "b", "psnr_db": None}
    compare_schedules._compare_with_resident(other, rows)
    assert "identical_latents" not in other
