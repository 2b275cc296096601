"""All uses of private names of torch, so that a new release of torch can break this package only.

One subject per file. Each function states its gain over the public API, and falls back to the
public API in a release of torch without the private name.
"""
