"""As much of vLLM as a loader touches, with the rules of 0.32. Without torch, so that a test sees who imports that."""

__version__ = "0.32.0"
