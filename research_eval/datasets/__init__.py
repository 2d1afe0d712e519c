"""One file per task; `providers.py` turns a config into splits."""
