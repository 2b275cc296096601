"""Checkpoints: folders that are whole or not there.

    checkpoints/step-00001234/
        model.safetensors    the model's tensors by name; of tied ones one, the other names in the file's metadata
        training.pt          everything else that it takes to go on, in plain types
        MANIFEST.json        written last: step, versions, size and sha256 of each file

It is written in a hidden folder beside, every file is fsynced, and a rename makes it visible: a kill at any moment
leaves the earlier ones as they were. Reading verifies first, and never unpickles anything but tensors and plain types.
Checksums find accidents, not attackers. One process at a time may write to a folder of checkpoints.
"""

from .checks import check_memory, check_size
from .layout import (
    FILES,
    MANIFEST,
    MODEL,
    TRAINING,
    folder_name,
    listed,
    own_sha256,
    refuse_links,
    step_of,
    target_of,
)
from .reading import load, load_model, newest, read_manifest, read_shapes, step_in, verify
from .retention import clean, link_to, remove, set_aside
from .writing import commit, save

__all__ = [
    "FILES",
    "MANIFEST",
    "MODEL",
    "TRAINING",
    "check_memory",
    "check_size",
    "clean",
    "commit",
    "folder_name",
    "link_to",
    "listed",
    "load",
    "load_model",
    "newest",
    "own_sha256",
    "read_manifest",
    "read_shapes",
    "refuse_links",
    "remove",
    "save",
    "set_aside",
    "step_in",
    "step_of",
    "target_of",
    "verify",
]
