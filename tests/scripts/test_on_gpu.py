"""The benchmark of a GPU: both its commands dry, on this CPU with the tiny model; processes that die."""

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts.bench.on_gpu import parts, rows, sweep
from scripts.bench.on_gpu.parts import DRY, Scale
from scripts.compare import schedules
from scripts.compare import sweep as sweeps
from scripts.compare.worker import answers
from zimage_jax import plan
from zimage_jax.errors import UsageError
from zimage_jax.planning.cards import load_card

ROOT = Path(__file__).parent.parent.parent
STAND_IN = """
import json, os, sys, time
for cell in json.load(sys.stdin):
    if cell.get("dies"):
        print("out of luck", file=sys.stderr)
        os._exit(3)
    time.sleep(cell.get("sleeps", 0))
    print(json.dumps({"pid": os.getpid(), "n": cell["n"]}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in"


def test_a_cell_that_kills_its_process_is_a_row_and_the_next_ones_go_on(stand_in):
    cells = [{"n": 0}, {"n": 1, "dies": True}, {"n": 2}, {"n": 3}]
    found = list(answers(stand_in, cells))
    assert [row.get("n") for row in found] == [0, None, 2, 3]
    assert found[1] == {"error": "out of luck"}
    assert found[0]["pid"] != found[2]["pid"] == found[3]["pid"]


def test_a_process_is_stopped_in_time_and_what_was_not_begun_has_no_row(stand_in):
    began = time.monotonic()
    found = list(answers(stand_in, [{"n": 0, "sleeps": 60}, {"n": 1}], seconds=1))
    assert found == [{"error": "not done within 1 s"}]
    assert time.monotonic() - began < 30


def test_a_process_that_is_no_longer_wanted_ends(stand_in):
    found = answers(stand_in, [{"n": 0}, {"n": 1, "sleeps": 60}])
    pid = next(found)["pid"]
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture(scope="module")
def dry(tmp_path_factory, cache_of_processes) -> Path:
    """The folder that a dry run filled."""
    folder = tmp_path_factory.mktemp("dry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", cache_of_processes)
        words = [str(folder), "--dry", "--card-out", str(folder / "mine.json")]
        rows.main.main(words, standalone_mode=False)
    return folder


@pytest.mark.long
def test_a_dry_run_answers_every_question(dry):
    found = {row["row"]: row for row in rows.read(dry / "ROWS.jsonl")}
    kinds = {name.partition("/")[0] for name in found}
    expected = {"race", "tiny", "full", "caps", "attention", "floor", "hidden", "rates", "reading"}
    assert kinds == expected | {"options", "allocator", "write", "formats", "pictures"}
    failed = {name: row["error"] for name, row in found.items() if "error" in row}
    assert failed.keys() == {"attention/flash 64 tokens"}
    assert "needs an NVIDIA GPU" in failed["attention/flash 64 tokens"]
    compared = {
        name: row["identical_latents"] for name, row in found.items() if "identical_latents" in row
    }
    assert {
        "tiny/ring",
        "tiny/swap",
        "tiny/hybrid",
        "tiny/scan",
        "full/ring 64x64",
    } <= compared.keys()
    assert all(compared.values())
    for name in ("race/chunks without the gate, 1", "race/chunks under the gate, 1"):
        race = found[name]
        assert (race["first_runs"], race["wrong_first_runs"], race["wrong_copies"]) == (2, 0, 0)
        assert race["copies"] >= 4
    floor = found["floor/ring 64x64"]
    least = max(floor["computing_seconds_per_nfe"], floor["link_seconds_per_nfe"])
    assert floor["over_floor"] == pytest.approx(floor["seconds_per_nfe"] / least, rel=0.01)
    assert found["hidden/ring 64x64"]["not_measured"]
    for row in found.values():
        assert {"machine", "versions", "commit", "command", "date"} <= row.keys()


@pytest.mark.long
def test_a_card_made_of_its_rows_is_read(dry):
    card, device = load_card(dry / "mine.json"), _row(dry, "rates/device")
    assert (card.flops, card.link) == (device["flops"], device["link"])
    assert card.host_read == _row(dry, "reading/as jobs do")["bytes_per_sec"]
    words = ["--model", "turbo", "--card", str(dry / "mine.json"), "--size", "512x512", "--json"]
    told = CliRunner().invoke(plan.command, words, catch_exceptions=False)
    assert json.loads(told.output)["card"] == card.name


def _row(folder: Path, name: str) -> dict:
    return next(row for row in rows.read(folder / "ROWS.jsonl") if row["row"] == name)


@pytest.mark.long
def test_a_later_run_goes_on_from_the_rows_of_an_earlier_one(dry, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(rows, "answers", lambda module, cells, **_: iter(asked.append(cells) or []))
    earlier = tmp_path / "earlier.jsonl"
    lines = (dry / "ROWS.jsonl").read_text("utf-8").splitlines(keepends=True)
    earlier.write_text(
        "".join(line for line in lines if '"caps/16 MiB 64x64"' not in line[:40]), "utf-8"
    )
    words = [str(tmp_path / "out"), "--dry", "--earlier", str(earlier)]
    rows.main.main(words, standalone_mode=False)
    assert {cell["row"] for cells in asked for cell in cells} == {"caps/16 MiB 64x64"}
    assert _row(tmp_path / "out", "caps/16 MiB 64x64")["skipped"]
    assert "1 had no time" in capsys.readouterr().out
    assert _row(tmp_path / "out", "tiny/ring") == _row(dry, "tiny/ring")


def test_without_time_everything_is_a_row_that_says_so(tmp_path):
    rows.main.main([str(tmp_path), "--dry", "--minutes", "0"], standalone_mode=False)
    found = rows.read(tmp_path / "ROWS.jsonl")
    assert found
    assert all("no time" in row["skipped"] for row in found)


def test_without_a_gpu_it_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for command in (rows.main, sweep.main):
        with pytest.raises(UsageError, match="no NVIDIA GPU"):
            command.main([str(tmp_path / "out")], standalone_mode=False)


def test_questions_have_names_of_their_own_and_an_order():
    known = {"full/ring 512x512": {"ledger_peak_bytes": 2**30}}
    groups = list(parts.groups(Scale(), known, 80 * 2**30))
    names = [cell["row"] for group in groups for cell in group.cells]
    assert len(set(names)) == len(names)
    order = list(dict.fromkeys(group.part for group in groups))
    assert order[:6] == ["race", "tiny", "full", "caps", "attention", "floor"]
    caps = {
        g.cells[0]["row"]: g.environment["XLA_CLIENT_MEM_FRACTION"]
        for g in groups
        if g.part == "caps"
    }
    assert float(caps["caps/8192 MiB 512x512"]) == pytest.approx(0.1, abs=1e-6)
    assert not any(g.environment for g in parts.groups(DRY, known, None) if g.part == "caps")


@pytest.mark.parametrize("rival", ["", pytest.param("diffusers", marks=pytest.mark.live)])
@pytest.mark.exhaustive
def test_the_second_command_dry(rival, tmp_path, monkeypatch, cache_of_processes):
    """The sweep, and whole programs: ours, and diffusers."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache_of_processes)
    own, cut, theirs = (schedules.SWEEPS / "gpu_dry.toml").read_text().rpartition("[[program]]")
    (tmp_path / "gpu_dry.toml").write_text(own + (cut + theirs if rival else ""))
    monkeypatch.setattr(schedules, "SWEEPS", tmp_path)
    words = [str(tmp_path / "out"), "--dry", "--folder", str(tmp_path / "models")]
    sweep.main.main(words, standalone_mode=False)
    found = sweeps.rows(tmp_path / "out" / "RESULTS.jsonl")
    assert [row["system"] for row in found[1:]] == ["zimage_jax", *([rival] if rival else [])]
    assert all(row["success"] for row in found), found
    assert all(row["seconds_by_stage"]["denoise"] > 0 for row in found[1:])
    assert (tmp_path / "out" / "report.html").exists()
