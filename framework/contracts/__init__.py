"""What plugins implement, one file each, and what a callback may read and do during a fit (`context.py`)."""
