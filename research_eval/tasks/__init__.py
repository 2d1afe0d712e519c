"""Task kinds: the objective that a model is trained for. One file per kind."""
