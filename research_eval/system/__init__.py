"""The project's view of its machine: memory and versions, untrusted files, checksums, and progress on the screen."""
