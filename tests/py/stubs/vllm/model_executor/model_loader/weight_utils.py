from __future__ import annotations


def maybe_download_from_modelscope(model: str, revision: str | None = None) -> str | None:
    return None


def enable_tqdm(use_tqdm_on_load: bool) -> bool:
    return use_tqdm_on_load
