"""Text from language models: sampling, decoding with a cache, and trained models ready to write."""
