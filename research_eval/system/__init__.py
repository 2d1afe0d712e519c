"""What the project takes from its machine: memory and versions, files from outside, checksums, the screen."""
