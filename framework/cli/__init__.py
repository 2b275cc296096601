"""The command line: commands, help, output, completion."""
