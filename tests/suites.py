"""The suite of each test file: `scripts/test unit`, `training` or `system` runs one of them.

- unit: parts, settings, files and errors; seconds for each file.
- training: short fits and commands in this process.
- system: other processes, signals, sweeps, searches, servers, scripts and benchmarks.

One table assigns the files, so that a suite can be read in one place and a new file has a suite
immediately: the longest entry that is a prefix of the path gives the suite.
"""

from functools import cache
from pathlib import Path

SUITES = ("unit", "training", "system")
TESTS = Path(__file__).parent
SUITE_OF = {
    "cli": "system",
    "cli/test_advice.py": "training",
    "cli/parts/test_part_tables.py": "unit",
    "cli/test_parsers.py": "unit",
    "cli/test_output.py": "training",
    "composition": "unit",
    "composition/test_compose.py": "training",
    "composition/test_trust.py": "training",
    "composition/test_without_effect.py": "training",
    "contracts": "training",
    "contracts/test_direction.py": "unit",
    "contracts/test_duration.py": "unit",
    "contracts/test_measures.py": "unit",
    "contracts/test_state.py": "unit",
    "data": "unit",
    "data/test_batches.py": "training",
    "data/test_convert.py": "training",
    "data/test_folds.py": "training",
    "data/test_loader.py": "training",
    "data/test_source_states.py": "training",
    "errors": "training",
    "experiment": "training",
    "experiment/test_launch.py": "system",
    "experiment/test_plan.py": "unit",
    "plugins": "unit",
    "plugins/callbacks": "training",
    "plugins/datasets/test_text.py": "training",
    "plugins/layers/test_audio.py": "training",
    "plugins/optim/test_optimizers.py": "training",
    "plugins/tasks": "training",
    "plugins/tasks/test_supervised.py": "unit",
    "plugins/test_conformance.py": "training",
    "plugins/test_transforms.py": "training",
    "older": "training",
    "project": "system",
    "project/test_messages.py": "unit",
    "project/test_private_names.py": "unit",
    "registry": "unit",
    "runs": "unit",
    "runs/test_hostile.py": "training",
    "runs/test_status_file.py": "training",
    "runtime": "training",
    "runtime/test_device.py": "unit",
    "runtime/test_memory_format.py": "unit",
    "runtime/test_seeds.py": "unit",
    "runtime/test_connection.py": "system",
    "runtime/test_shared_memory.py": "system",
    "runtime/test_threads.py": "unit",
    "runtime/torch_internals": "unit",
    "runtime/torch_internals/test_lazy_compiler.py": "system",
    "runtime/torch_internals/test_missing_names.py": "system",
    "system": "system",
    "system/test_files.py": "unit",
    "training": "training",
    "contracts/test_pure_optimizer.py": "unit",
    "tuning": "system",
    "tuning/vectorized/test_stacked_trainer.py": "training",
    "tuning/vectorized/test_equivalence_check.py": "training",
    "tuning/search/test_space.py": "unit",
}
LONGEST = (  # these run first, so that no process waits at the end for one of another
    "project/test_readme.py",
    "tuning/sweep/test_launchers.py",
    "project/test_bench.py",
    "cli/test_json.py",
    "plugins/strategies/test_sharded_checkpoint.py",
    "plugins/strategies/test_ddp_experiments.py",
    "tuning/vectorized/test_vectorized_processes.py",
    "tuning/sweep/test_sweep_processes.py",
    "experiment/test_launch.py",
    "experiment/test_resume.py",
    "experiment/test_check.py",
    "experiment/test_find.py",
    "experiment/test_export.py",
    "experiment/test_experiments.py",
    "experiment/test_hugging_face.py",
    "plugins/strategies/test_fsdp.py",
    "plugins/strategies/test_ddp.py",
    "training/test_shards.py",
    "system/test_signals.py",
    "system/test_streams.py",
    "project/test_campaign.py",
    "project/test_mutants.py",
    "project/test_template.py",
    "runtime/torch_internals/test_lazy_compiler.py",
    "tuning/search/test_search_pruning.py",
    "composition/test_catalogue.py",
)


@cache
def suite_of(file: Path) -> str | None:
    """Return the suite of a test file; None without an entry, or outside this folder."""
    if not file.is_relative_to(TESTS):
        return None
    path = file.relative_to(TESTS)
    for entry in (path, *path.parents):
        if str(entry) in SUITE_OF:
            return SUITE_OF[str(entry)]
    return None


@cache
def place_of(file: Path) -> int:
    """Return the place of a test file in `LONGEST`; the other files come after these."""
    path = str(file.relative_to(TESTS)) if file.is_relative_to(TESTS) else ""
    return LONGEST.index(path) if path in LONGEST else len(LONGEST)
