"""What the commands show about runs: lists, filters, comparisons, speed, the live view."""
