"""The Trainer: training step, evaluation, validation of its arguments."""
