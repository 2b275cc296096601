"""The model of a run after training: loading, predictions, export."""
