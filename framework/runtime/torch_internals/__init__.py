"""Private names of torch: one function each, with its gain and a fallback to the public API."""
