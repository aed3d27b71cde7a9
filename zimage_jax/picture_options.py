"""The options about prompts, about samplers, and about pictures that a job begins from."""

from collections.abc import Callable

import click

from .model.choices import FITS, SAMPLERS, SCHEDULES, STRENGTH_RULES
from .options import FILE, Number, with_options

_PROMPT = [
    click.option(
        "--prompt-weights/--no-prompt-weights",
        default=None,
        help="Brackets in prompts weigh words: (word:1.3), (word) 1.1, [word] 1/1.1; a backslash makes "
        "a bracket or colon text.  [default: brackets are text]",
    ),
    click.option(
        "--text-weight",
        type=Number(float, 0, 4),
        metavar="W",
        help="Weight of text in quotes, 0 to 4.  [default: 1]",
    ),
    click.option(
        "--variance",
        type=Number(float, 0, 1),
        metavar="S",
        help="How much pictures of one prompt differ beyond their noise, 0 to 1.  [default: 0]",
    ),
]

_SAMPLER = [
    click.option(
        "--sampler",
        type=click.Choice(SAMPLERS),
        help="How the latents follow from the DiT's velocity; heun takes two NFEs for a step.  "
        "[default: euler]",
    ),
    click.option(
        "--sigmas",
        type=click.Choice(SCHEDULES),
        help="Schedule of noise levels, as ComfyUI names them.  [default: simple]",
    ),
    click.option(
        "--shift",
        type=Number(float, 0, 100),
        help="Shift of the noise levels; more spends more steps on noise.  "
        "[default: the model's own, 3 for Turbo]",
    ),
    click.option(
        "--cfg-normalization",
        type=Number(float, 0, 100),
        metavar="C",
        help="Limit the guided velocity's norm to C times the prompt's own; 0 is no limit.  "
        "[default: 0]",
    ),
    click.option(
        "--cfg-truncation",
        type=Number(float, 0, 1),
        metavar="T",
        help="End the guidance when 1 - sigma is above T; 1 is never.  [default: 1]",
    ),
]

_PICTURE = [
    click.option(
        "--image",
        type=FILE,
        help="Picture to begin from. Without a size it keeps its own, in multiples of 16.",
    ),
    click.option(
        "--strength",
        type=Number(float, 0, 1),
        help="How much of the picture is redrawn: 0 nothing, 1 everything.  "
        "[default: 0.6; with a mask 1; with --enlarge 0.5, or 0.3 in regions]",
    ),
    click.option(
        "--strength-rule",
        type=click.Choice(STRENGTH_RULES),
        help="What --strength means: noise, the noise level to begin at; or what it means in "
        "diffusers or ComfyUI.  [default: noise]",
    ),
    click.option(
        "--fit",
        type=click.Choice(FITS),
        help="How a picture of another shape is fitted to the size.  [default: crop]",
    ),
    click.option(
        "--mask",
        type=FILE,
        help="Picture of the same size: white is redrawn, black keeps its bytes.  "
        "[default: the transparent part of --image]",
    ),
    click.option(
        "--mask-blur",
        type=Number(float, 0, 512),
        metavar="PIXELS",
        help="Blur the mask's edge.  [default: 0]",
    ),
    click.option(
        "--mask-grow",
        type=Number(int, 0, 512),
        metavar="PIXELS",
        help="Make the mask wider.  [default: 0]",
    ),
    click.option(
        "--crop-mask",
        type=Number(int, 0, 4096),
        metavar="PIXELS",
        help="Draw only the masked part, with so many pixels around it, at the full size, and "
        "paste it back.",
    ),
    click.option(
        "--differential",
        is_flag=True,
        default=None,
        help="The mask's grey says how much is redrawn.",
    ),
    click.option(
        "--region",
        type=Number(int, 32, 16384),
        metavar="PIXELS",
        help="Draw in overlapping regions with sides of PIXELS.  "
        "[default: the model's own side, where a picture is too large for model or memory]",
    ),
    click.option(
        "--control-image",
        type=FILE,
        help="Picture that the drawing follows (edges, depth, a pose), by the ControlNet of "
        "--control. Without a size the drawing has its own.",
    ),
    click.option(
        "--control-scale",
        type=Number(float, 0, 10),
        metavar="S",
        help="How much it follows; 0 is not at all.  [default: 0.75]",
    ),
    click.option(
        "--enlarge",
        type=Number(float, 1, 8),
        metavar="FACTOR",
        help="Draw the picture of --from-image FACTOR times as large.",
    ),
    click.option(
        "--explore",
        type=Number(int, 2, 256),
        metavar="N",
        help="Draw N seeds at half the size, and a contact sheet of them.",
    ),
    click.option(
        "--pick",
        type=Number(int, 0, 2**64 - 1),
        metavar="SEED",
        help="Enlarge this seed of the contact sheet of --from-image.  [--enlarge: 2]",
    ),
]

# arguments of ZImage.generate, and of ZImage.canvas
OF_JOB = (
    *("sampler", "sigmas", "shift", "cfg_normalization", "cfg_truncation"),
    *("strength", "strength_rule", "differential", "region"),
    *("control_image", "control_scale"),
    *("prompt_weights", "text_weight", "variance"),
)
OF_CANVAS = "image", "mask", "fit", "mask_blur", "mask_grow", "crop_mask"


def picture_options(command: Callable) -> Callable:
    """Add these options to a command; all are None where they are not given."""
    return with_options([*_PROMPT, *_SAMPLER, *_PICTURE], command)
