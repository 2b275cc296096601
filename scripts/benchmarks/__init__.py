"""What `scripts/bench` measures. Modules that run in the environment of a peer import torch and that peer only."""
