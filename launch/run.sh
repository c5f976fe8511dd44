#!/usr/bin/env bash
# Train, and start again after failures; the same as mot supervise, with the options of deepspeed
# alone: bash launch/run.sh --num_gpus 8 launch/train.py --config configs/mine.toml
#   RESTARTS=N           restarts within WINDOW_MINUTES at most; default: 5
#   WINDOW_MINUTES=M     default: 60
#   PYTHON=/path/to/python   default: python
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m mot_megatron.cli.supervise --restarts "${RESTARTS:-5}" \
    --window-minutes "${WINDOW_MINUTES:-60}" -- "$@"
