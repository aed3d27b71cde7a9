"""Nodes about the model: its memory, its LoRAs and its ControlNet."""

from comfy_api.latest import io

from . import host, settings, tensors

PipeType = io.Custom("ZIMAGE_JAX_PIPE")
CATEGORY = "Z-Image-Turbo"
# workflows that name the article's other loader get this one
ARTICLES_LOADER = io.NodeReplace("ZImageTurboLoader", "ZImageTurboModelLoader")
_GIB = {"min": 0.0, "max": 1024.0, "step": 0.1}


class Loader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboLoader",
            display_name="Z-Image-Turbo Loader",
            category=CATEGORY,
            description="A model and where its parameters may be. The engine, a process of its own, "
            "opens it when the first node computes.",
            search_aliases=["ZImageTurboModelLoader", "zimage_jax", "low vram"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=host.models(),
                    default=host.TINY,
                    tooltip="A folder in models/zimage_jax or models/diffusers, a DiT of "
                    "models/diffusion_models with the two files below, or the tiny model.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=host.text_encoders(),
                    default=host.NONE,
                    tooltip="Qwen3-4B's file, for a DiT's file; none for a folder.",
                ),
                io.Combo.Input(
                    "vae",
                    options=host.vaes(),
                    default=host.NONE,
                    tooltip="The VAE's file, for a DiT's file; none for a folder.",
                ),
                io.Int.Input(
                    "chunk_count",
                    default=4,
                    min=1,
                    max=128,
                    tooltip="Chunks of the DiT that may be on the device at once: fewer take less "
                    "memory and more time on a slow link. 1 copies each when it is needed, 2 copies "
                    "the next while one computes. The picture stays the same.",
                ),
                io.Float.Input(
                    "max_chunk_memory",
                    default=3.5,
                    **_GIB,
                    tooltip="The largest chunk, in GiB: 3.5 cuts the full model into 4. 0: 4 chunks, "
                    "or more if memory is short.",
                ),
                io.Float.Input(
                    "max_vram",
                    default=0.0,
                    **_GIB,
                    tooltip="Device memory that the engine may take, in GiB. 0: what is free when it "
                    "starts. Less than before starts the engine again, because memory that JAX took "
                    "is not given back.",
                ),
                io.Boolean.Input(
                    "text_encoder_offload",
                    default=False,
                    tooltip="Copy the text encoder to the device chunk by chunk.",
                ),
                io.Boolean.Input(
                    "text_branch_always_loaded",
                    default=False,
                    tooltip="Keep the text encoder on the device between pictures.",
                ),
                io.Float.Input(
                    "host_memory",
                    default=0.0,
                    **_GIB,
                    tooltip="Host memory for parameters, in GiB: the rest is read from disk through "
                    "it. 0: all of them stay in host memory if they fit.",
                ),
            ],
            outputs=[PipeType.Output("pipe", tooltip="For the other nodes of Z-Image-Turbo.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, text_encoder_offload, text_branch_always_loaded=False):
        try:
            settings.check_text_branch(text_encoder_offload, text_branch_always_loaded)
        except ValueError as fault:
            return str(fault)
        return True

    @classmethod
    def fingerprint_inputs(cls, model, text_encoder, vae, **widgets) -> str:
        """The files may have changed, though their names have not."""
        return host.stamp_of(host.model_path(model, text_encoder, vae))

    @classmethod
    def execute(cls, model, text_encoder, vae, max_vram, **widgets) -> io.NodeOutput:
        path = host.model_path(model, text_encoder, vae)
        pipe = settings.pipe_of(path, host.stamp_of(path), max_vram=max_vram, **widgets)
        host.Shown(cls.hidden.unique_id).tell(host.memory_line(pipe.cap))
        return io.NodeOutput(pipe)


class BlockChunk(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboBlockChunk",
            display_name="Z-Image-Turbo Block Chunk",
            category=CATEGORY,
            description="Says where one chunk of the DiT is. What it says of a chunk overrules the "
            "plan; the picture stays the same.",
            inputs=[
                PipeType.Input("pipe", tooltip="From the loader, or another Block Chunk."),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=127,
                    tooltip="Number of the chunk of main blocks, from 0.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(settings.MODES),
                    default="auto",
                    tooltip="resident: stays on the device. streamed: copied for each use. auto: as "
                    "the plan says.",
                ),
            ],
            outputs=[PipeType.Output("pipe", tooltip="The same, with this chunk's place.")],
        )

    @classmethod
    def execute(cls, pipe, chunk, mode) -> io.NodeOutput:
        return io.NodeOutput(pipe.with_pin(chunk, mode))


class Lora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboLora",
            display_name="Z-Image-Turbo LoRA",
            category=CATEGORY,
            description="Adds a LoRA: to the DiT for our samplers, and to the text encoder for our "
            "Text Encoder. Several in a row add up.",
            search_aliases=["LoraLoader", "LyCORIS", "zimage_jax"],
            inputs=[
                PipeType.Input("pipe", tooltip="From the loader, or another LoRA."),
                io.Combo.Input(
                    "lora",
                    options=host.loras(),
                    tooltip="A .safetensors file in models/loras, in any of the usual spellings.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-settings.LARGEST_WEIGHT,
                    max=settings.LARGEST_WEIGHT,
                    step=0.05,
                    tooltip="How much of it is added; 0 leaves it out. Another weight reads nothing "
                    "again.",
                ),
            ],
            outputs=[PipeType.Output("pipe", tooltip="The same, with this LoRA.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora, **widgets) -> str:
        """The file may have changed, though its name has not."""
        return host.stamp_of(host.lora_path(lora))

    @classmethod
    def execute(cls, pipe, lora, weight) -> io.NodeOutput:
        return io.NodeOutput(pipe.with_lora(lora, weight))


class Control(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageTurboControl",
            display_name="Z-Image-Turbo Control",
            category=CATEGORY,
            description="Pictures follow an image of edges, depth or a pose, by a ControlNet. The "
            "engine starts again for another ControlNet, and not for a pipe without one.",
            search_aliases=["ControlNet Union", "ZImageFunControlnet", "zimage_jax"],
            inputs=[
                PipeType.Input("pipe", tooltip="From the loader, or a LoRA."),
                io.Combo.Input(
                    "control_net",
                    options=host.control_nets(),
                    tooltip="Z-Image-Turbo's ControlNet Union: its file in models/model_patches.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="Edges, depth or a pose, cropped to the picture's ratio. A batch has one "
                    "for each picture.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.75,
                    min=0.0,
                    max=settings.LARGEST_SCALE,
                    step=0.05,
                    tooltip="How much pictures follow it.",
                ),
            ],
            outputs=[PipeType.Output("pipe", tooltip="The same, with what pictures follow.")],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net, **widgets) -> str:
        """The file may have changed, though its name has not."""
        return host.stamp_of(host.control_path(control_net))

    @classmethod
    def execute(cls, pipe, control_net, image, scale) -> io.NodeOutput:
        path = host.control_path(control_net)
        control = settings.Control(path, host.stamp_of(path), tensors.picture(image), scale)
        return io.NodeOutput(pipe.with_control(control))
