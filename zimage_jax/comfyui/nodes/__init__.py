"""Z-Image-Turbo for ComfyUI, drawn by zimage_jax in a process of its own.

This folder goes into custom_nodes: `python -m zimage_jax.comfyui install COMFYUI_FOLDER` copies it, a
link to it works too. It imports the standard library and what ComfyUI itself has, never zimage_jax.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI calls this; nothing of ComfyUI is imported before."""
    from .extension import Extension

    return Extension()
