"""Parameter groups, learning-rate schedule and DeepSpeed ZeRO."""
