"""ComfyUI's lists of files: one set of suffixes is shared by all kinds of models."""

from __future__ import annotations

import os

supported_pt_extensions: set[str] = {".ckpt", ".pt", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {
    "checkpoints": ([], supported_pt_extensions),
    "vae": ([], supported_pt_extensions),
}


def get_filename_list(folder_name: str) -> list[str]:
    folders, suffixes = folder_names_and_paths[folder_name]
    return sorted(
        name for folder in folders for name in os.listdir(folder) if os.path.splitext(name)[-1].lower() in suffixes
    )
