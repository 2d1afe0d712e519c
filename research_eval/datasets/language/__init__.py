"""Running text for causal language models: from files to one stream of token ids for each split, and its facts."""
