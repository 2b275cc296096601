"""The interfaces that plugins implement, one file each, and the running fit (`context.py`)."""
