"""A picture of the full-size model by diffusers, in bfloat16: what scripts/compare/program.py
starts. Needs the reference extra.

    python -m scripts.compare.draw_with_diffusers CELL FOLDER

CELL is JSON as scripts/compare/program.py has it. Writes FOLDER/picture.png and FOLDER/report.json
with seconds by stage."""

import importlib.metadata
import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.hooks import apply_group_offloading  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen3Model  # noqa: E402

from scripts.compare import sweep  # noqa: E402
from scripts.compare.rival import GROUP, MODES, Parts  # noqa: E402
from tests import reference  # noqa: E402

DISK = "group block, disk"  # besides compare_rival's


def load(folder: Path) -> ZImagePipeline:
    """The pipeline of a folder of sources, but for the tokenizer, which is a file alone."""
    words = {"torch_dtype": torch.bfloat16}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json")),
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = reference.TEMPLATE
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKL.from_pretrained(folder / "vae", **words),
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel.from_single_file(
            str(folder / "transformer/diffusion_pytorch_model.safetensors"),
            config=str(folder / "transformer"),
            **words,
        ),
    )


@torch.no_grad()
def main(cell: dict, folder: Path) -> None:
    gpu = torch.cuda.is_available()
    if gpu and "max_vram_mib" in cell:
        torch.cuda.set_per_process_memory_fraction(
            cell["max_vram_mib"] * 2**20 / torch.cuda.get_device_properties(0).total_memory
        )
    pipe = load(Path(cell["model"]) / "sources")
    parts = Parts(
        text=(pipe.text_encoder, "forward"),
        denoise=(pipe.transformer, "forward"),
        decode=(pipe.vae, "decode"),
    )
    if cell["mode"] == DISK:
        words = GROUP | {"onload_device": torch.device("cuda" if gpu else "cpu")}
        for name in (
            "transformer",
            "text_encoder",
            "vae",
        ):  # a folder each: files of one would pass for another's
            apply_group_offloading(
                getattr(pipe, name),
                offload_type="block_level",
                num_blocks_per_group=1,
                offload_to_disk_path=str(folder / name),
                **words,
            )
    else:
        MODES[cell["mode"]](pipe)
    width, height = sweep.pixels(cell["size"])
    picture = pipe(
        cell["prompt"],
        width=width,
        height=height,
        num_inference_steps=cell["steps"],
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(cell["seed"]),
    ).images[0]
    picture.save(folder / "picture.png")
    versions = {
        package: importlib.metadata.version(package)
        for package in ("diffusers", "transformers", "torch")
    }
    report: dict = {"seconds": parts.seconds, "versions": versions}
    if gpu:
        report["peak_device_bytes"] = torch.cuda.max_memory_reserved()
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
