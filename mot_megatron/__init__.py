"""Training of Mixture-of-Transformers models on megatron-core and DeepSpeed."""

import warnings

# megatron-core says, once per file and process, that Transformer Engine and Apex are absent. They
# change speed only, and the lines would bury what people have to read.
warnings.filterwarnings("ignore", r"Transformer Engine and Apex are not installed")
