"""python -m zimage_jax.generate "PROMPT": write a picture."""

import json
import string
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import click
from tqdm import tqdm

from . import cli
from .errors import UsageError
from .files import write_whole
from .pipeline.size import parse_size
from .units import size

FILE = click.Path(path_type=Path, dir_okay=False)
_FIELDS = ("date", "seed", "index")
_REPEATED = (
    "prompt",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "steps",
    "guidance",
    "noise",
)


def _texts(prompts: tuple[str, ...], files: tuple[Path, ...]) -> list[str]:
    texts = [sys.stdin.read() if p == "-" else p for p in prompts]
    for file in files:
        try:
            texts.append(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as fault:
            raise UsageError(
                f"--prompt-file {file}: cannot be read as UTF-8 text ({fault})"
            ) from None
    return [text.rstrip("\r\n") for text in texts]


def _check_template(template: str) -> None:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError:
        fields = {""}
    if not fields <= set(_FIELDS):
        raise UsageError(
            f"-o {template}: only {', '.join(f'{{{f}}}' for f in _FIELDS)} are filled in"
        )
    if not template.lower().endswith(".png"):
        raise UsageError(f"-o {template}: pictures are PNG files, so the name must end in .png")


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=FILE,
    help="A prompt from a UTF-8 file; may be repeated.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Folder written by checkpoints_convert.  [default: the tiny model in the package]",
)
@click.option("--size", help="WIDTHxHEIGHT, or a ratio such as 16:9.")
@click.option("--width", "-W", type=int, help="Pixels, a multiple of 16.")
@click.option("--height", "-H", type=int, help="Pixels, a multiple of 16.")
@click.option("--steps", type=int, help="Evaluations of the DiT (NFEs).  [default: 8]")
@click.option(
    "--seed",
    "-s",
    "seeds",
    type=int,
    multiple=True,
    help="0 to 2^64-1, -1 for a random one; may be repeated.",
)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1),
    default=1,
    help="Pictures per prompt, with seeds that count up.",
)
@click.option("--guidance", type=float, help="Guidance scale, 0 is off.  [default: 0]")
@click.option("--cfg-scale", type=float, help="The same as other programs count it: guidance + 1.")
@click.option("--negative-prompt", help="What guidance leads away from.")
@click.option(
    "--noise",
    type=click.Choice(["torch", "jax"]),
    help="Whose noise a seed stands for.  [default: torch]",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="What to compute in; float16 is for GPUs before the RTX 30 series.  "
    "[default: by the device: bfloat16, float16 or on a CPU float32]",
)
@cli.kv_options
@cli.ATTENTION
@cli.memory_options
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Pictures drawn at once.",
)
@click.option(
    "-o",
    "--output",
    default="{date}-{seed}-{index}.png",
    show_default=True,
    help="Name of a picture's file.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace files that exist; else a free name is taken."
)
@click.option("--no-metadata", is_flag=True, help="Write pixels alone.")
@click.option(
    "--preview",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for a small picture per step.",
)
@click.option(
    "--from-image", type=FILE, help="Repeat a picture of ours; flags given beside it win."
)
@click.option("--report", type=FILE, help="Write what was done and what it cost, as JSON.")
@click.option(
    "--trace",
    type=FILE,
    help="Write when each program ran and each chunk was copied, for Perfetto.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the report, one line of JSON per batch, and nothing else.",
)
def command(
    prompts,
    files,
    model,
    size,
    width,
    height,
    steps,
    seeds,
    count,
    guidance,
    cfg_scale,
    negative_prompt,
    noise,
    dtype,
    batch_size,
    output,
    overwrite,
    no_metadata,
    preview,
    from_image,
    report,
    trace,
    quiet,
    as_json,
    kv_dtype,
    kv_switch_t,
    kv_group,
    kv_reuse,
    attention,
    **memory_words,
) -> None:
    """Draw PROMPT with Z-Image-Turbo and write it as a PNG.

    Several prompts give several pictures; "-" reads one from standard input.
    """
    if size and (width or height):
        raise click.UsageError("--size and --width/--height say the same thing: give one of them")
    if cfg_scale is not None:
        if guidance is not None:
            raise click.UsageError(
                "--guidance and --cfg-scale say the same thing: give one of them"
            )
        guidance = cfg_scale - 1
    if count > 1 and len(seeds) > 1:
        raise click.UsageError("give several seeds or a --count, not both")
    _check_template(output)
    memory = cli.memory_of(**memory_words)
    job = _settings(
        from_image,
        prompts,
        files,
        seeds,
        negative_prompt,
        width,
        height,
        steps,
        guidance,
        noise,
        attention,
    )
    kv = cli.kv_of(
        kv_dtype=kv_dtype,
        kv_switch_t=kv_switch_t,
        kv_group=kv_group,
        kv_reuse=kv_reuse,
        repeated=job.pop("kv"),
    )
    if not job["prompt"]:
        raise click.UsageError("no prompt: give one, or --prompt-file, or - for standard input")

    talk = _Talk(quiet or as_json)
    with talk.warnings():
        cli.use_compile_cache()
        from .pipeline.pipeline import (
            ZImage,  # after the words were checked: importing JAX takes a second
        )

        if model is None:
            talk.say(
                "drawing with the tiny model inside the package: shapes, colours, up to three glyphs. For the full one: "
                "python -m checkpoints_convert Z-IMAGE-TURBO-FOLDER MODEL, then --model MODEL"
            )
        pipe = ZImage.load(model, dtype=dtype)
        if size:
            job["width"], job["height"] = parse_size(
                size, pipe.config.vae.sample_size, pipe.config.pixel_multiple
            )
        todo = _expand(job.pop("prompt"), job.pop("seed"), count)
        talk.start(pipe)
        reports = []
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            texts, numbers = (list(column) for column in zip(*batch, strict=True))
            settings = {k: v for k, v in job.items() if v is not None}
            with talk.bar() as bar:
                previews = _Previews(preview, first, bar)
                result = pipe.generate(
                    texts,
                    seed=numbers,
                    kv=kv,
                    memory=memory,
                    on_plan=talk.plan,
                    on_step=previews,
                    **settings,
                )
            now = datetime.now().strftime("%Y%m%d-%H%M%S")
            paths = []
            for index, picture in enumerate(result.pictures, first):
                name = output.format(date=now, seed=picture.metadata["seed"], index=index)
                paths.append(picture.save(name, metadata=not no_metadata, overwrite=overwrite))
                talk.picture(paths[-1], picture, result.report)
            files_made = str(paths[0]) if len(paths) == 1 else [str(p) for p in paths]
            reports.append({**result.report, "file": files_made})
            if as_json:
                click.echo(json.dumps(reports[-1], ensure_ascii=False))
            if trace:
                write_whole(trace, result.ledger.trace().encode(), overwrite=True)
    if report:
        content = reports[0] if len(reports) == 1 else reports
        write_whole(
            report,
            (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode(),
            overwrite=True,
        )


def _settings(
    from_image,
    prompts,
    files,
    seeds,
    negative_prompt,
    width,
    height,
    steps,
    guidance,
    noise,
    attention,
) -> dict:
    """The job's words: what a picture says of itself under --from-image, and over it the flags that
    were given."""
    given = {
        "prompt": _texts(prompts, files) or None,
        "seed": list(seeds) or None,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "noise": noise,
        "attention": attention,
    }
    job: dict = dict.fromkeys((*_REPEATED, "attention", "kv"))
    if from_image:
        from .pipeline.picture import read_metadata

        found = read_metadata(from_image)
        kinds = {"prompt": str, "negative_prompt": str, "guidance": float | int, "noise": str}
        for key in _REPEATED:
            if not isinstance(found.get(key), kinds.get(key, int)):
                raise UsageError(
                    f"{from_image}: its metadata has no usable {key!r}; give it as a flag"
                )
            job[key] = found[key]
        job["prompt"], job["seed"] = [job["prompt"]], [job["seed"]]
        job["kv"] = _kv_words(from_image, found)
        job["attention"] = found.get("attention")  # auto is not written down
    job |= {key: value for key, value in given.items() if value is not None}
    job["seed"] = job["seed"] or [-1]
    return job


def _kv_words(from_image: Path, found: dict) -> dict:
    """What a picture says of K and V; older ones say nothing."""
    words = found.get("kv", {})
    kinds = {"dtype": str | None, "switch_t": float | int, "group": str, "reuse": int}
    if not isinstance(words, dict) or any(
        not isinstance(v, kinds.get(k, ())) for k, v in words.items()
    ):
        raise UsageError(
            f"{from_image}: its metadata has no usable 'kv'; make the picture anew with flags"
        )
    return words


def _expand(prompts: list[str], seeds: list[int], count: int) -> list[tuple[str, int]]:
    """Every prompt with every seed; a count makes one seed count up, or draws anew for -1."""
    if count > 1:
        seeds = [seeds[0] if seeds[0] == -1 else seeds[0] + i for i in range(count)]
    return [(prompt, seed) for prompt in prompts for seed in seeds]


class _Previews:
    """Moves the bar and writes a small picture per step when asked to."""

    def __init__(self, folder: Path | None, first: int, bar):
        self._folder, self._first, self._bar = folder, first, bar

    def __call__(self, step) -> None:
        cli.check_interrupt()
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


class _Talk:
    """What a person sees: on standard error, but for the line that says where a picture lies."""

    def __init__(self, silent: bool):
        self._silent, self._began = silent, time.perf_counter()

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Our warnings as one line each."""

        def show(message, *_) -> None:
            if not self._silent:
                tqdm.write(f"warning: {message}", file=sys.stderr)

        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            warnings.simplefilter("always", UserWarning)
            yield

    def say(self, line: str) -> None:
        if not self._silent:
            click.echo(line, err=True)

    def start(self, pipe) -> None:
        self.say(
            f"{pipe.name}: {pipe.describe()}; ready in {time.perf_counter() - self._began:.1f} s"
        )

    def plan(self, plan, budget: int) -> None:
        """What will be done, before it is."""
        warm = (
            ""
            if plan.seconds is None
            else f", {plan.seconds:.1f} s once parameters are read and programs compiled"
        )
        self.say(
            f"schedule {plan.denoise}: {plan.nfes} NFEs, predicted peak {size(plan.peak_bytes)} of {size(budget)}{warm}"
        )

    def bar(self):
        return tqdm(
            total=0,
            unit="NFE",
            desc="draw",
            leave=False,
            disable=self._silent or not sys.stderr.isatty(),
        )

    def picture(self, path: Path, picture, report) -> None:
        if not self._silent:
            stage = report["seconds"]
            click.echo(
                f"{path}  seed {picture.metadata['seed']}, {stage['total']:.1f} s (text {stage['text']:.1f}, "
                f"denoise {stage['denoise']:.1f}, decode {stage['decode']:.1f}), "
                f"peak {size(report['peak_device_bytes'])} of device memory, "
                f"{size(report['copied_bytes'])} copied to it"
            )


def main() -> None:
    cli.run(command, prog="python -m zimage_jax.generate")


if __name__ == "__main__":
    main()
