"""Private names of torch, which no other package uses: a new release can break this one only.

One subject per file. Each function states what it gains over the public API, and falls back to the
public API where a release of torch lacks the private name.
"""
