"""`python -m framework` runs the command line, like `framework`."""

from framework.cli.main import main

main()
