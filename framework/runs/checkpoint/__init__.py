"""Checkpoints: folders that are complete or do not exist.

    checkpoints/step-00001234/
        model.safetensors    the tensors of the model by name; of tied tensors the first one, the
                             other names are in the metadata of the file
        training.pt          the rest of the state, in plain types
        training-00001-1.safetensors ...
                             the parts of sharded tensors of the training state, by the processes
                             that have them (strategy=fsdp)
        MANIFEST.json        written last: step, versions, size and sha256 of each file

A checkpoint is written into a hidden folder, each file is flushed to the disk (fsync), and a rename
makes the folder visible: a kill at any moment leaves the earlier checkpoints unchanged. Reading
verifies the checksums first and unpickles only tensors and plain types. Checksums detect accidents,
not attacks. Only one process at a time may write to a folder of checkpoints.
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
from .sharded import ShardedSnapshot, commit_sharded, sharded_snapshot
from .writing import commit, save

__all__ = [
    "FILES",
    "MANIFEST",
    "MODEL",
    "TRAINING",
    "ShardedSnapshot",
    "check_memory",
    "check_size",
    "clean",
    "commit",
    "commit_sharded",
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
    "sharded_snapshot",
    "step_in",
    "step_of",
    "target_of",
    "verify",
]
