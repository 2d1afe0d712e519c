"""Language models: one file per architecture; each registers itself in `LANGUAGE_MODELS`."""
