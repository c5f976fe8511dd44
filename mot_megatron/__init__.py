"""Training of Mixture-of-Transformers models on megatron-core and DeepSpeed."""
