"""As much of vLLM as a loader touches, with the rules of 0.32. Without torch, so that a test sees who imports that."""

__version__ = "0.32.0"


class LLM:
    """Has the class that loads its weights, found as vLLM does: plugins make formats known, then the format counts."""

    def __init__(self, model: str, load_format: str = "auto") -> None:
        import sys
        from importlib.metadata import entry_points

        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

        group = "vllm.general_plugins"
        for plugin in entry_points(group=group) if sys.version_info >= (3, 10) else set(entry_points()[group]):
            plugin.load()()
        self.model = model
        self.loader = _LOAD_FORMAT_TO_MODEL_LOADER[load_format]
