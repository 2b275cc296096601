"""Durations as text, for all commands."""


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, such as 8.2 s, 12.5 min or 3.1 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def small_duration(seconds: float) -> str:
    """Return a duration also in microseconds or milliseconds."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else duration(seconds)
