"""`python -m framework` is `framework`."""

from framework.cli.main import main

main()
