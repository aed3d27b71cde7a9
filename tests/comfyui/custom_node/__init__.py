"""A test node inside ComfyUI: tensors to files."""

import os

import folder_paths
from safetensors.torch import save_file


class SaveTensors:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "tests", True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        optional = {"image": ("IMAGE",), "latent": ("LATENT",)}
        return {"required": {"name": ("STRING", {})}, "optional": optional}

    def save(self, name, image=None, latent=None):
        found = {} if image is None else {"image": image.contiguous()}
        if latent is not None:
            found["latents"] = latent["samples"].contiguous()
        save_file(found, os.path.join(folder_paths.get_output_directory(), name))
        return {}


NODE_CLASS_MAPPINGS = {"TestsSaveTensors": SaveTensors}
