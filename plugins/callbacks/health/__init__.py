"""The callback `health`: numbers of each layer during training, and warnings about problems."""
