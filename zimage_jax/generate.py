"""python -m zimage_jax.generate "PROMPT": write a picture."""

from . import interrupts

if __name__ == "__main__":
    interrupts.install()  # before the imports below, which take a third of a second

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

import click

from . import checks, cli, naming, options
from .errors import UsageError
from .files import printable, read_text, write_whole
from .memory_options import DEVICES, memory_of, memory_options, split_option, start_on
from .options import FILE, Number
from .origin import Origin
from .picture_options import OF_CANVAS, OF_JOB, picture_options
from .pipeline.size import parse_size
from .talk import Progress, Talk

MOST_PICTURES = 1_000_000  # per prompt
LARGEST_PROMPT = 64 << 10  # bytes: 512 tokens of 128 characters, Qwen's longest


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=FILE,
    help="Read a prompt from a UTF-8 file of at most 64 KiB. May be repeated.",
)
@options.MODEL
@options.CONTROL
@click.option(
    "--size",
    help="Size in pixels, as in 1280x720, or a ratio such as 16:9.  [default: the model's own]",
)
@click.option(
    "--width", "-W", type=Number(int, 1, 65536), help="Width in pixels, a multiple of 16."
)
@click.option(
    "--height", "-H", type=Number(int, 1, 65536), help="Height in pixels, a multiple of 16."
)
@click.option(
    "--steps",
    type=Number(int, 1, 1000),
    help="Number of steps: evaluations of the DiT (NFEs), but with heun, or from a picture.  "
    "[default: the model's own, 8 for Turbo]",
)
@click.option(
    "--seed",
    "-s",
    "seeds",
    type=Number(int, -1, checks.LARGEST_SEED),
    multiple=True,
    help="Seed of the noise, 0 to 2^64-1; -1 draws one. May be repeated.  [default: -1]",
)
@click.option(
    "-n",
    "--count",
    type=Number(int, 1, MOST_PICTURES),
    default=1,
    show_default=True,
    help="Number of pictures per prompt. The seed goes up by one for each.",
)
@click.option(
    "--guidance",
    type=Number(float, 0, 100),
    help="Guidance scale as in diffusers, 0 to 100; 0 is off.  "
    "[default: the model's own, 0 for Turbo]",
)
@click.option(
    "--cfg-scale",
    type=Number(float, 1, 101),
    help="Guidance scale as in other programs: --guidance plus 1; 1 is off.",
)
@click.option("--negative-prompt", help="What to avoid, where guidance is on.")
@click.option(
    "--noise",
    type=click.Choice(["torch", "jax"]),
    help="Noise generator: torch gives PyTorch's noise for the seed.  [default: torch]",
)
@options.DTYPE
@picture_options
@options.lora_options
@options.kv_options
@options.ATTENTION
@memory_options
@DEVICES
@split_option("chunks")
@click.option(
    "--batch-size",
    type=Number(int, 1, 1024),
    default=1,
    show_default=True,
    help="Number of pictures drawn at once.",
)
@click.option(
    "-o",
    "--output",
    default="{date}-{seed}-{index}.png",
    show_default=True,
    help="File to write. {date}, {seed} and {index} (from 0) are filled in; {index:04} has four "
    "digits. A name in use gets -2, -3 and so on.",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@click.option("--no-metadata", is_flag=True, help="Do not write prompt and settings into the PNG.")
@click.option(
    "--preview",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for a small picture after each step.",
)
@click.option(
    "--from-image",
    type=FILE,
    help="Draw a picture of zimage_jax again, with its metadata's settings; flags override them. "
    "--enlarge and --pick begin from it.",
)
@click.option("--report", type=FILE, help="File for settings, seconds, bytes and peaks, as JSON.")
@click.option(
    "--trace",
    type=FILE,
    help="File for a timeline of programs and copies; Perfetto shows it.",
)
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print only the report, a line per batch.")
def command(
    *,
    prompts,
    files,
    model,
    control,
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
    kv_dtype,
    kv_switch_t,
    kv_group,
    kv_reuse,
    attention,
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
    enlarge,
    explore,
    pick,
    devices,
    split,
    lora,
    lora_merge,
    **flags,
) -> None:
    """Draw PROMPT with Z-Image-Turbo and write it as a PNG.

    Several prompts give several pictures; "-" reads one from standard input.
    """
    if size and (width or height):
        raise UsageError("--size and --width/--height both set the size: give one of them")
    job = {
        "prompts": _texts(prompts, files),
        "seeds": list(seeds),
        "negative_prompt": negative_prompt and _unicode("--negative-prompt", negative_prompt),
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": _guidance(guidance, cfg_scale),
        "noise": noise,
        "attention": attention,
        "lora": list(lora),
        "lora_merge": lora_merge,
        **{name: flags.pop(name) for name in OF_JOB},
    }
    origin = Origin.of({name: flags.pop(name) for name in OF_CANVAS}, from_image, enlarge, pick)
    if origin.factor and (size or width or height):
        raise UsageError("--enlarge sets the size: --size, --width and --height cannot be given")
    if explore:
        count = _explored(explore, count, origin, job)
    kv = {"dtype": kv_dtype, "switch_t": kv_switch_t, "group": kv_group, "reuse": kv_reuse}
    picture_kv = _complete(job, origin.settings, count)
    _check_weights(job)
    files_out = _Output(output, overwrite, not no_metadata, preview, report, trace, bool(explore))
    job["lora"] = origin.loras(job["lora"])
    inputs = [*files, *origin.files, job["control_image"], *(file for file, _ in job["lora"])]
    files_out.check(len(job["prompts"]), job["seeds"], inputs)
    origin.check_control(control, job)

    talk = Talk(quiet or as_json, is_tiny=model is None)
    with talk.warnings():
        if devices and split == "pictures":
            raise UsageError("--split pictures: generate draws in one process; batch has more")
        memory = memory_of(devices=devices or (), **flags)
        device = start_on(devices)  # starting JAX takes a second, so only after the checks
        from .pipeline.pipeline import ZImage

        job["kv"] = options.kv_of(kv, picture_kv)
        pipe = ZImage.load(model, control=control, dtype=dtype, device=device)
        side, multiple = pipe.config.vae.sample_size, pipe.config.pixel_multiple
        if size:
            job["width"], job["height"] = parse_size(size, side, multiple)
        elif explore and not (width or height):
            job["width"] = job["height"] = max(multiple, side // 2 // multiple * multiple)
        talk.start(pipe, memory)
        if canvas := origin.canvas(pipe, job):
            job["image"] = canvas
            talk.canvas(canvas, job, pipe)
        if job["control_image"] is not None:
            job["control_image"] = origin.control_canvas(pipe, job)
        _draw(pipe, job, batch_size, files_out, talk, as_json=as_json, memory=memory)


def _explored(explore: int, count: int, origin: Origin, job: dict) -> int:
    """The number of seeds to explore. Raises UsageError for flags that contradict it."""
    if count != 1:
        raise UsageError("--explore and --count both set the number of pictures: give one of them")
    if origin.begins_from_a_picture:
        raise UsageError("--explore draws from noise alone: it cannot begin from a picture")
    if len(job["prompts"]) > 1:
        raise UsageError("--explore takes one prompt: a contact sheet is of one")
    return explore


def _draw(pipe, job: dict, batch_size: int, output: "_Output", talk: Talk, *, as_json, memory):
    """Draw every prompt with every seed, in batches, and write each batch when it is done."""
    seeds, reports = job.pop("seeds"), []
    pictures: list[tuple] = []  # of the contact sheet, with their paths
    todo = ((prompt, seed) for prompt in job.pop("prompts") for seed in seeds)
    settings, first = {k: v for k, v in job.items() if v not in (None, [])}, 0
    while batch := list(islice(todo, batch_size)):
        prompts, numbers = (list(column) for column in zip(*batch, strict=True))
        with talk.bar() as bar:
            result = pipe.generate(
                prompts,
                seed=numbers,
                memory=memory,
                on_plan=talk.plan,
                on_step=Progress(output.preview, first, bar),
                **settings,
            )
        paths = output.save(result.pictures, first)
        for path, picture in zip(paths, result.pictures, strict=True):
            talk.picture(path, picture, result.report)
        names = [str(path) for path in paths]
        report = {**result.report, "file": names[0] if len(names) == 1 else names}
        if as_json:
            click.echo(cli.to_json(report))
        if output.trace:
            write_whole(output.trace, result.ledger.trace().encode(), overwrite=True)
        if output.report:
            reports.append(report)
        if output.has_sheet:
            pictures += zip(paths, result.pictures, strict=True)
        first += len(batch)
    if output.has_sheet:
        talk.sheet(output.save_sheet([of for _, of in pictures], pictures[0][0]))
    if output.report:
        content = reports[0] if len(reports) == 1 else reports
        write_whole(output.report, (cli.to_json(content, indent=2) + "\n").encode(), overwrite=True)


# -- the job ---------------------------------------------------------------------------------------


def _texts(prompts: Iterable[str], files: Iterable[Path]) -> list[str]:
    """The prompts from arguments, standard input and files, without trailing newlines."""
    texts = []
    for prompt in prompts:
        texts.append(_standard_input() if prompt == "-" else _unicode("the prompt", prompt))
    for file in files:
        try:
            texts.append(read_text(file, LARGEST_PROMPT))
        except UsageError as fault:
            raise UsageError(f"--prompt-file {fault}") from None
    texts = [text.rstrip("\r\n") for text in texts]
    if any(not text.strip() for text in texts):
        raise UsageError("the prompt is empty: say what to draw")
    return texts


def _standard_input() -> str:
    if sys.stdin is None:
        raise UsageError("-: standard input is closed")
    data = sys.stdin.buffer.read(LARGEST_PROMPT + 1)
    if len(data) > LARGEST_PROMPT:
        raise UsageError(f"-: a prompt has at most {LARGEST_PROMPT} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise UsageError(f"-: standard input is not UTF-8 text (byte {fault.start})") from None


def _unicode(name: str, text: str) -> str:
    """A flag's text. In a locale without UTF-8, Python decodes its bytes to surrogates."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UsageError(f"{name} is not UTF-8 text: {printable(text, 60)}") from None


def _guidance(guidance: float | None, cfg_scale: float | None) -> float | None:
    if cfg_scale is None:
        return guidance
    if guidance is not None:
        raise UsageError("--guidance and --cfg-scale both set the guidance: give one of them")
    return cfg_scale - 1


def _complete(job: dict, repeated: dict, count: int) -> dict:
    """Fill the job's missing settings from a repeated picture's, and count its seeds up.

    Returns the picture's K/V policy. Raises UsageError for a job without a prompt.
    """
    kv = repeated.pop("kv", {})
    job |= {key: value for key, value in repeated.items() if job.get(key) in (None, [])}
    if not job["prompts"]:
        raise UsageError("no prompt: give one, or --prompt-file, or - for standard input")
    job["seeds"] = _seeds(job["seeds"] or [-1], count)
    return kv


def _check_weights(job: dict) -> None:
    """Raises UsageError for brackets that do not weigh words, before anything is drawn."""
    if job["prompt_weights"]:
        from .model import emphasis

        for text in job["prompts"]:
            emphasis.check(text)
        emphasis.parse(job["negative_prompt"] or "")


def _seeds(seeds: list[int], count: int) -> Sequence[int]:
    """`count` seeds per prompt: a seed counts up; -1 is drawn anew for each picture."""
    if count == 1:
        return seeds
    if len(seeds) > 1:
        raise UsageError("give several seeds or a --count, not both")
    if seeds[0] == -1:
        return seeds * count
    if seeds[0] + count - 1 > checks.LARGEST_SEED:
        raise UsageError(f"--seed {seeds[0]} with -n {count} counts past 2^64-1, the largest seed")
    return range(seeds[0], seeds[0] + count)


@dataclass(frozen=True)
class _Output:
    """The files and folders that the command writes."""

    template: str
    overwrite: bool
    metadata: bool
    preview: Path | None
    report: Path | None
    trace: Path | None
    has_sheet: bool

    def check(self, prompts: int, seeds: Sequence[int], inputs: list[Path | None]) -> None:
        """Raises UsageError, before anything is drawn, for names that cannot be written."""
        naming.check_template(self.template, seeds, prompts * len(seeds))
        outputs = {"--report": self.report, "--trace": self.trace}
        naming.check_outputs(self.template, self.preview, outputs, inputs)
        if self.overwrite and not naming.are_distinct(self.template, prompts, seeds):
            raise UsageError(
                f"-o {printable(self.template)}: with --overwrite each picture would replace the "
                "one before; put {index} into the name"
            )

    def save(self, pictures, first: int) -> list[Path]:
        now = datetime.now().strftime("%Y%m%d-%H%M%S")
        return [
            picture.save(
                self.template.format(date=now, seed=picture.metadata["seed"], index=index),
                metadata=self.metadata,
                overwrite=self.overwrite,
            )
            for index, picture in enumerate(pictures, first)
        ]

    def save_sheet(self, pictures, first: Path) -> Path:
        """Write the contact sheet beside the `first` picture."""
        from .pipeline.sheet import contact_sheet

        path = first.with_name(f"{first.stem}-sheet.png")
        return write_whole(path, contact_sheet(pictures), overwrite=self.overwrite)


def main() -> None:
    interrupts.install()
    cli.run(command, prog="python -m zimage_jax.generate")


if __name__ == "__main__":
    main()
