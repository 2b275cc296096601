"""A run on disk: folder, checkpoints, background writing, status file."""
