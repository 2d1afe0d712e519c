"""Tables, statistics and pictures of stored results. It reads `store` and `routing` only: no model, no torch."""
