"""The measurements of `scripts/bench`.

Modules that run in the environment of a peer import only torch and that peer.
"""
