"""Prompts for ComfyUI's API, of the tiny model."""

import json
from pathlib import Path

from zimage_jax.comfyui.__main__ import NODES

EXAMPLES = NODES / "example_workflows"
LOADER = {
    **{"model": "tiny (in the package)", "text_encoder": "none", "vae": "none"},
    **{"chunk_count": 2, "max_chunk_memory": 0.0, "max_vram": 0.0, "host_memory": 0.0},
    **{"text_encoder_offload": False, "text_branch_always_loaded": False},
}
SCHEDULE = {
    **{"steps": 4, "shift": 3.0, "sampler": "euler", "sigmas": "simple"},
    **{"kv_group": "1", "kv_dtype": "default", "kv_switch_t": 500.0, "kv_reuse": 1},
    "dynamic_prefetch": True,
}
COMMON = {
    **{"seed": 7, "width": 64, "height": 64, "cfg": 1.0},
    **{"vae_decode": "exact", "tile_size": 64},
}
SAMPLER = {
    **{"pipe": ["1", 0], "positive": ["3", 0], "schedule": ["2", 0]},
    **{"strength": 1.0, "strength_rule": "noise"},
    **COMMON,
}


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def text_to_image(prompt: str = "a red circle", *, loader=None, schedule=None, **sampler) -> dict:
    """Nodes 1 loader, 2 schedule, 3 text, 4 sampler, 5 the picture, 6 the report."""
    return {
        "1": node("ZImageTurboLoader", **LOADER | (loader or {})),
        "2": node("ZImageTurboScheduler", **SCHEDULE | (schedule or {})),
        "3": node(
            "ZImageTurboTextEncoder",
            **{"pipe": ["1", 0], "prompt": prompt, "prompt_weights": False, "text_weight": 1.0},
        ),
        "4": node("ZImageTurboSampler", **SAMPLER | sampler),
        "5": node("SaveImage", images=["4", 0], filename_prefix="zimage"),
        "6": node("PreviewAny", source=["4", 2]),
    }


def with_pipe(prompt: dict, *nodes: dict) -> dict:
    """The prompt with nodes between its loader and those that compute, one after another."""
    pipe = ["1", 0]
    for number, of in enumerate(nodes):
        prompt[f"pipe {number}"] = node(of["class_type"], pipe=pipe, **of["inputs"])
        pipe = [f"pipe {number}", 0]
    for number in ("3", "4"):
        prompt[number]["inputs"]["pipe"] = pipe
    return prompt


def report(outputs: dict, of: str = "6"):
    """The report that PreviewAny shows."""
    return json.loads(outputs[of]["text"][0])


def api(workflow: Path, nodes: dict) -> dict:
    """A workflow of the page as a prompt of the API. `nodes`: what /object_info says of them."""
    saved = json.loads(workflow.read_text("utf-8"))
    links = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    found = {}
    for each in saved["nodes"]:
        if each["type"] not in nodes:  # a note
            assert each["type"] in ("Note", "MarkdownNote"), each["type"]
            continue
        inputs = {i["name"]: links[i["link"]] for i in each["inputs"] if i.get("link")}
        values = list(each.get("widgets_values", []))
        about = nodes[each["type"]]["input"]
        for name, (kind, *more) in {**about["required"], **about.get("optional", {})}.items():
            options = more[0] if more else {}
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                inputs.setdefault(name, values.pop(0))
                if options.get("control_after_generate"):
                    values.pop(0)
        assert len(values) <= 1, (each["type"], values)  # LoadImage has its upload button
        found[str(each["id"])] = node(each["type"], **inputs)
    return found
