"""Parts of language models: attention that never looks ahead, experts for single tokens, and causal routes."""
