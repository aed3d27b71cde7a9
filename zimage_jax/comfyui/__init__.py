"""Nodes for ComfyUI: `nodes` is the folder for custom_nodes, this package puts it there."""
