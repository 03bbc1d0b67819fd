"""Other libraries that load models: transformers and what builds on it, diffusers, vLLM, SGLang.

Each module here imports its library only when it is used.
"""
