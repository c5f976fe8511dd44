"""The Mixture-of-Transformers model: grouping, untied layers, attention, objectives, FLOPs."""
