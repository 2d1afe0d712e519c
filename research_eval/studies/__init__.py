"""Several runs of one question: seeds side by side, studies that search, and new configs made from past runs."""
