"""One run: its preparation, folder, journal, scores and pictures, and the code that reads it back."""
