"""The Megatron-Core side: build, import and export, score, train, save."""
