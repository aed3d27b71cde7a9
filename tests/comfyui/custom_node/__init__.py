"""Test nodes inside ComfyUI: tensors to files, and its own classes at small widths."""

import os

import folder_paths
from safetensors.torch import save_file

from .small_widths import LoadSmall


class SaveTensors:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "tests", True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        optional = {
            "image": ("IMAGE",),
            "latent": ("LATENT",),
            "conditioning": ("CONDITIONING",),
        }
        return {"required": {"name": ("STRING", {})}, "optional": optional}

    def save(self, name, image=None, latent=None, conditioning=None):
        found = {} if image is None else {"image": image.contiguous()}
        if latent is not None:
            found["latents"] = latent["samples"].contiguous()
        if conditioning is not None:
            found["features"] = conditioning[0][0].contiguous()
        save_file(found, os.path.join(folder_paths.get_output_directory(), name))
        return {}


NODE_CLASS_MAPPINGS = {"TestsSaveTensors": SaveTensors, "TestsLoadSmall": LoadSmall}
