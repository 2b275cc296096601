"""`python -m framework` is `framework`."""

from .cli import main

main()
