"""ComfyUI's reader of files."""

from __future__ import annotations


def load_torch_file(ckpt, safe_load=False, device=None, return_metadata=False):
    import safetensors
    import torch

    device = torch.device("cpu") if device is None else device
    if not ckpt.lower().endswith((".safetensors", ".sft")):
        loaded = torch.load(ckpt, map_location=device, weights_only=True)
        return (loaded, None) if return_metadata else loaded
    with safetensors.safe_open(ckpt, framework="pt", device=device.type) as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return (loaded, file.metadata()) if return_metadata else loaded
