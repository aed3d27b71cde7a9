"""A process from its start to a picture on disk, by part. Nothing heavy is imported before its part
begins."""

import os
import tempfile
import time
from pathlib import Path

from scripts.compare.jobs import PROMPT, SEED, path_of


def cold(cell: dict) -> dict:
    """This very process, from its start to a picture on disk, by part."""
    parts, cpu = {}, {}

    def part(name: str) -> None:
        parts[name] = (
            time.clock_gettime(time.CLOCK_BOOTTIME) - _process_began() - sum(parts.values())
        )
        cpu[name] = time.process_time() - sum(cpu.values())

    part("python")
    import jax  # noqa: F401

    part("import jax")
    from zimage_jax import ZImage, cli

    cli.use_compile_cache()
    ZImage.load  # noqa: B018  the name alone imports the package's modules and flax
    part("import zimage_jax and flax")
    pipe = ZImage.load(path_of(cell))
    part("load")
    result = pipe.generate(cell.get("prompt", PROMPT), seed=SEED)
    part("compile and run")
    with tempfile.TemporaryDirectory() as folder:
        result.pictures[0].save(Path(folder) / "picture.png")
    part("write")
    total = sum(parts.values())
    parts["compile"] = result.report["seconds"]["compile"]
    parts["run"] = parts.pop("compile and run") - parts["compile"]
    return {
        "seconds": round(total, 3),
        "seconds_by_part": {name: round(value, 3) for name, value in parts.items()},
        "cpu_seconds_by_part": {name: round(value, 3) for name, value in cpu.items()},
        "compilations": result.report["compilations"],
        "versions": result.report["versions"],
    }


def _process_began() -> float:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")
