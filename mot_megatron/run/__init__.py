"""A run: the training loop with its console output, TensorBoard log, samples and summary."""
