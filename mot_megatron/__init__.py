"""Train Mixture-of-Transformers models with megatron-core and DeepSpeed."""

import warnings

# megatron-core warns in several files of every process that Transformer Engine and Apex are absent.
# They affect speed only, and the warnings would hide more important output.
warnings.filterwarnings("ignore", r"Transformer Engine and Apex are not installed")
