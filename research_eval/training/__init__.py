"""The training loop and its parts: steps, optimisers, evaluation, checkpoints and the watch on routing."""
