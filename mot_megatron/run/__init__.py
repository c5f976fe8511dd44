"""A run: the loop around training steps, its console, TensorBoard, summary and samples."""
