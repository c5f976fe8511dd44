#!/usr/bin/env bash
# From nothing to a trained three-modality model: environment, corpus, training through the
# deepspeed launcher, samples, and a closing table. Run again, it reuses what is there.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
CORPUS=corpora/openmoji
RUN=runs/quickstart

if [ -f "$CORPUS/corpus.toml" ]; then
    echo "[quickstart] corpus: $CORPUS is there"
else
    echo "[quickstart] corpus: building $CORPUS"
    "$PYTHON" tools/prepare_corpus.py openmoji --output "$CORPUS"
fi

ranks="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')"
echo "[quickstart] training on $ranks ranks"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m deepspeed.launcher.runner --num_accelerators "$ranks" \
    launch/train.py --config configs/quickstart.toml "$@"

echo "[quickstart] samples"
"$PYTHON" tools/generate.py --checkpoint "$RUN/checkpoints" --prompt "a red apple" \
    --output "$RUN/samples"

"$PYTHON" -m json.tool "$RUN/summary.json"
echo "TensorBoard: $PYTHON -m tensorboard.main --logdir $ROOT/runs"
