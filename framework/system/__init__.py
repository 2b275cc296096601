"""The process and the operating system: signals, standard streams, files, locks, git."""
