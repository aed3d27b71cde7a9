"""The nodes, as ComfyUI gets them."""

from comfy_api.latest import ComfyAPI, ComfyExtension, io

from . import host
from .draw import BatchProcessor, Sampler, Scheduler
from .load import ARTICLES_LOADER, BlockChunk, Control, Loader, Lora
from .text import TextEncoder, TextRefiner


class Extension(ComfyExtension):
    async def on_load(self) -> None:
        host.set_up()
        await ComfyAPI().node_replacement.register(ARTICLES_LOADER)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        about_model = [Loader, BlockChunk, Lora, Control]
        return [*about_model, TextEncoder, TextRefiner, Scheduler, Sampler, BatchProcessor]
