"""The process and the operating system: signals, standard streams, files of runs, locks, git."""
