"""As much of SGLang as a loader touches, with the rules of 0.5.23."""
