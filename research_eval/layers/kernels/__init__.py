"""Ways to execute many experts on rows sorted by expert: one by one, fused for a CPU, or grouped in one product."""
