"""Nodes about the text."""

from comfy_api.latest import io

from . import host, settings, tensors
from .load import CATEGORY, PipeType

VARIANCE = "zimage_jax_variance"  # a conditioning's key


class TextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboTextEncoder",
            display_name="Z-Image-Turbo Text Encoder",
            category=CATEGORY,
            description="A prompt's features by Qwen3, as CLIPTextEncode gives them for "
            "qwen_3_4b: KSampler takes them too.",
            inputs=[
                PipeType.Input("pipe", tooltip="From the loader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to draw: up to 512 tokens, English or Chinese.",
                ),
                io.Boolean.Input(
                    "prompt_weights",
                    default=False,
                    tooltip="Brackets weigh words: (word:1.3), (word) 1.1, [word] 1/1.1. Off: "
                    "brackets are text, as in ComfyUI's own encoder.",
                ),
                io.Float.Input(
                    "text_weight",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="Weight of text in quotes.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("conditioning", tooltip="For our samplers, or KSampler.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, pipe, prompt, prompt_weights, text_weight) -> io.NodeOutput:
        cap = host.ready(pipe, host.Shown(cls.hidden.unique_id).tell)
        body = {
            "prompt": settings.text_of(prompt, prompt_weights),
            "prompt_weights": prompt_weights,
            "text_weight": text_weight,
            "lora": pipe.loras_of_job(),
            "memory": pipe.memory_of_job(cap),
        }
        found = tensors.tensors(host.ENGINE.post("/tensors/encode", body, host.check))["features"]
        return io.NodeOutput([[found, {}]])


class TextRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboTextRefiner",
            display_name="Z-Image-Turbo Text Refiner",
            category=CATEGORY,
            description="How far a picture's seed reaches into its text, before the DiT's context "
            "refiner reads it. The refiner itself runs in the engine, once for a picture.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="From any encoder of qwen_3_4b."),
                io.Float.Input(
                    "variance",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Noise on the features, from each picture's seed: pictures of one prompt "
                    "differ more. 0 leaves the text as it is.",
                ),
            ],
            outputs=[io.Conditioning.Output("conditioning", tooltip="For our samplers.")],
        )

    @classmethod
    def execute(cls, conditioning, variance) -> io.NodeOutput:
        return io.NodeOutput([[of, {**facts, VARIANCE: variance}] for of, facts in conditioning])
