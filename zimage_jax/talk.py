"""What a command shows a person: warnings, the plan, progress, and the pictures' paths."""

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from tqdm import tqdm

from . import interrupts, units
from .files import printable, write_whole


class Progress:
    """The `on_step` of a batch: moves the bar, and writes the small pictures of --preview."""

    def __init__(self, folder: Path | None, first: int, bar):
        self._folder, self._first, self._bar = folder, first, bar

    def __call__(self, step) -> None:
        interrupts.check()
        if self._bar.total != step.steps:
            self._bar.reset(step.steps)
        self._bar.update()
        if self._folder is None:
            return
        from .pipeline.picture import encode_png

        for index, small in enumerate(step.previews(), self._first):
            write_whole(
                self._folder / f"{index}-step{step.index + 1:02d}.png",
                encode_png(small),
                overwrite=True,
            )


class Talk:
    """Prints progress to standard error, and the paths of pictures to standard output."""

    def __init__(self, silent: bool, is_tiny: bool):
        self._silent, self._is_tiny, self._began = silent, is_tiny, time.perf_counter()
        self._shows_plan = not is_tiny

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Print each warning on one line."""

        def show(message, *_) -> None:
            if not self._silent:
                tqdm.write(f"warning: {printable(message, 300)}", file=sys.stderr)

        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            warnings.simplefilter("always", UserWarning)
            yield

    def _say(self, line: str) -> None:
        if not self._silent:
            click.echo(line, err=True)

    def start(self, pipe, memory) -> None:
        if self._is_tiny:
            self._say("tiny model (shapes, colours, short texts); the full model: see README")
        else:
            seconds = time.perf_counter() - self._began
            self._say(f"{pipe.name}: {pipe.describe()}; ready in {seconds:.1f} s")
        # the tiny model's plan is of no interest, unless memory options were given
        self._shows_plan = not self._is_tiny or memory != type(memory)()

    def canvas(self, canvas, job: dict, pipe) -> None:
        """Say what the strength means, before the job starts."""
        from .pipeline.job import Job

        names = ("steps", "sampler", "sigmas", "shift", "strength", "strength_rule", "region")
        given = {name: job[name] for name in names if job[name] is not None}
        made = Job.of(pipe.config, "-", canvas=canvas, **given)
        path, (height, width) = made.trajectory, canvas.pixels.shape[:2]
        self._say(
            f"from a picture, {width}x{height}: strength {made.strength:g} is noise level "
            f"{path.start:.3f}, {path.nfes} NFEs"
        )

    def sheet(self, path: Path) -> None:
        if not self._silent:
            click.echo(f"{path}  contact sheet")

    def plan(self, plan, budget) -> None:
        """Print the plan before the job starts."""
        from .planning.plan import each

        if not self._shows_plan:
            return
        of = ", ".join(
            f"{units.size(peak)} of {units.size(most)}"
            for peak, most in zip(plan.peaks_by_device, each(budget), strict=True)
        )
        seconds = "" if plan.seconds is None else f", about {plan.seconds:.1f} s once compiled"
        self._say(f"schedule {plan.denoise or 'none'}; predicted peak {of}{seconds}")

    def bar(self):
        return tqdm(
            total=0,
            unit="NFE",
            desc="draw",
            leave=False,
            disable=self._silent or not sys.stderr.isatty(),
        )

    def picture(self, path: Path, picture, report: dict) -> None:
        if not self._silent:
            peak = units.size(report["peak_device_bytes"])
            seed, seconds = picture.metadata["seed"], report["seconds"]["total"]
            click.echo(f"{path}  seed {seed}, {seconds:.1f} s, peak {peak}")
