"""Named parts: registries, settings read from signatures, type conversion, plugin discovery."""
