"""The commands `list` and `show`: tables, pages and plots of the registered parts."""
