"""One cell of whole programs: the full-size model from process start to PNG, as a user of each
would start it.

The model is a folder that scripts/bench/convert.py --keep left: the same random weights as
FOLDER/sources, which diffusers and stable-diffusion.cpp read, and as FOLDER/native, which is ours.
diffusers needs the reference extra, stable-diffusion.cpp its sd-cli on PATH."""

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scripts.bench.convert import peak_memory
from scripts.compare import sweep
from scripts.compare.jobs import PROMPT, SEED
from scripts.compare.rows import STAGES

# how each program is told to hold the parameters; a budget, where a cell has one, comes on top
OURS = {
    "auto": [],
    "resident": ["--schedule", "resident"],
    "ring": ["--schedule", "ring", "--chunks", "30"],
    "ring, disk": ["--schedule", "ring", "--chunks", "30", "--host-memory", "4"],
}
SD_CPP = {
    "resident": [],
    "disk": ["--params-backend", "disk"],
    "offload": ["--offload-to-cpu"],
    "offload, stream": ["--offload-to-cpu", "--stream-layers"],
}


def zimage_jax(cell: dict, job: dict, folder: Path) -> list:
    budget = ["--max-vram", cell["max_vram_mib"] / 1024] if "max_vram_mib" in cell else []
    return [
        sys.executable,
        "-m",
        "zimage_jax.generate",
        job["prompt"],
        "--model",
        Path(cell["model"]) / "native",
        "--size",
        cell["size"],
        "--steps",
        job["steps"],
        "--seed",
        job["seed"],
        "--dtype",
        "bfloat16",
        "-o",
        folder / "picture.png",
        "--report",
        folder / "report.json",
        *_mode(cell, OURS),
        *budget,
    ]


def stable_diffusion_cpp(cell: dict, job: dict, folder: Path) -> list:
    sources, (width, height) = Path(cell["model"]) / "sources", sweep.pixels(cell["size"])
    budget = ["--max-vram", cell["max_vram_mib"] / 1024] if "max_vram_mib" in cell else []
    return [
        "sd-cli",
        "--diffusion-model",
        sources / "transformer/diffusion_pytorch_model.safetensors",
        "--llm",
        sources / "text_encoder/model.safetensors",
        "--vae",
        sources / "vae/diffusion_pytorch_model.safetensors",
        "-p",
        job["prompt"],
        "-W",
        width,
        "-H",
        height,
        "--steps",
        job["steps"],
        "-s",
        job["seed"],
        "--rng",
        "cpu",
        "--cfg-scale",
        1,
        "-t",
        os.cpu_count(),
        "-v",
        "-o",
        folder / "picture.png",
        *_mode(cell, SD_CPP),
        *budget,
    ]


def diffusers(cell: dict, job: dict, folder: Path) -> list:
    return [
        sys.executable,
        "-m",
        "scripts.compare.draw_with_diffusers",
        json.dumps(cell | job),
        folder,
    ]


def _mode(cell: dict, modes: dict[str, list[str]]) -> list[str]:
    if cell["mode"] not in modes:
        raise sweep.UsageError(
            f"{cell['system']}, mode {cell['mode']!r}: expected {', '.join(modes)}"
        )
    return modes[cell["mode"]]


def said_by_report(told: str, folder: Path) -> dict:
    report = json.loads((folder / "report.json").read_text())
    seconds = {stage: report["seconds"][stage] for stage in STAGES if stage in report["seconds"]}
    return {"seconds_by_stage": seconds} | {
        k: report[k] for k in ("peak_device_bytes", "versions") if k in report
    }


def said_by_sd_cpp(told: str, folder: Path) -> dict:
    parts = {"text": "get_learned_condition", "denoise": "sampling", "decode": "decode_first_stage"}
    found = {
        stage: re.search(rf"{name} completed, taking ([\d.]+)s", told)
        for stage, name in parts.items()
    }
    version = subprocess.run(
        ["sd-cli", "--version"], capture_output=True, text=True, check=False
    ).stdout
    return {
        "seconds_by_stage": {stage: float(match[1]) for stage, match in found.items() if match},
        "versions": {
            "stable-diffusion.cpp": version.partition("\n")[0].removeprefix("stable-diffusion.cpp ")
        },
    }


# a program's command line, and what it tells of itself afterwards
PROGRAMS: dict[str, tuple[Callable, Callable]] = {
    "zimage_jax": (zimage_jax, said_by_report),
    "stable-diffusion.cpp": (stable_diffusion_cpp, said_by_sd_cpp),
    "diffusers": (diffusers, said_by_report),
}


def program(cell: dict) -> dict:
    """Medians of `repeats` processes; the page cache is as warm as the memory beside the program
    allows."""
    if cell["system"] not in PROGRAMS:
        return {"error": f"{cell['system']}: expected {', '.join(PROGRAMS)}"}
    command, said = PROGRAMS[cell["system"]]
    if command is stable_diffusion_cpp and shutil.which("sd-cli") is None:
        return {"not_measured": "sd-cli of stable-diffusion.cpp is not on PATH"}
    if command is diffusers and not all(map(importlib.util.find_spec, ("diffusers", "torch"))):
        return {"not_measured": "diffusers and torch are not installed"}
    job = {
        "prompt": cell.get("prompt", PROMPT),
        "seed": cell.get("seed", SEED),
        "steps": cell.get("steps", 8),
    }
    runs = []
    for _ in range(cell.get("repeats", 1)):
        with tempfile.TemporaryDirectory() as name:
            folder, began = Path(name), time.perf_counter()
            with (folder / "told.txt").open("w+") as told:
                words = [str(word) for word in command(cell, job, folder)]
                process = subprocess.Popen(words, stdout=told, stderr=subprocess.STDOUT)
                (peak,) = peak_memory(process)
                seconds = time.perf_counter() - began
                told.seek(0)
                text = told.read()
            if process.returncode or not (folder / "picture.png").exists():
                lines = text.strip().splitlines() or ["it said nothing"]
                return {"error": f"code {process.returncode}: {lines[-1][-300:]}"}
            runs.append(
                {"seconds": seconds, "process_peak_bytes": peak["resident"]} | said(text, folder)
            )
    stages = runs[0]["seconds_by_stage"]
    return runs[0] | {
        "seconds": round(statistics.median(run["seconds"] for run in runs), 2),
        "seconds_of_repeats": [round(run["seconds"], 2) for run in runs],
        "seconds_by_stage": {
            s: round(statistics.median(run["seconds_by_stage"][s] for run in runs), 2)
            for s in stages
        },
    }


def answer(cell: dict) -> dict:
    try:
        return program(cell)
    except sweep.UsageError as fault:
        return {"error": str(fault)}


if __name__ == "__main__":
    for cell in json.load(sys.stdin):
        print(json.dumps(answer(cell)), flush=True)
