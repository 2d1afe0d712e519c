"""One file per architecture; each registers itself in `MODELS_MAP`."""
