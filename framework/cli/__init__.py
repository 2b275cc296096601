"""The command line: verbs, help, output, completion."""
