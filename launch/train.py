"""Train a model. Start it with the deepspeed launcher, or directly for a single rank.

deepspeed --num_gpus N launch/train.py --config configs/quickstart.toml --set training.train_steps=9
"""

from mot_megatron.cli.train import end_process, main

if __name__ == "__main__":
    end_process(main())
