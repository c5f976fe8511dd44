#!/usr/bin/env bash
# Set up the environment, build a corpus, train a small three-modality model with the deepspeed
# launcher, generate samples and print a table of results. When run again, it reuses what exists.
# Arguments are passed to launch/train.py: bash launch/quickstart.sh --set training.train_steps=400
# (except that the name and folder of the run are fixed).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
CORPUS=corpora/openmoji
CONFIG=configs/quickstart.toml
RUN=runs/quickstart
SEQUENCES_PER_STEP=8

say() {
    printf '[quickstart, %d s] %s\n' "$SECONDS" "$*"
}

if [ -f "$CORPUS/corpus.toml" ]; then
    say "using the existing corpus in $CORPUS"
else
    say "building the corpus in $CORPUS"
    "$PYTHON" tools/prepare_corpus.py openmoji --output "$CORPUS"
fi

# Use as many GPUs as divide the batch, or up to two CPU ranks if there is no GPU.
gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
devices="$gpus"
if [ "$gpus" -eq 0 ]; then
    # Unset OMP_NUM_THREADS, which nproc would report instead of the number of processors.
    devices="$(env -u OMP_NUM_THREADS nproc)"
    [ "$devices" -le 2 ] || devices=2
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
ranks=1
while [ $((ranks * 2)) -le "$devices" ] && [ "$ranks" -lt "$SEQUENCES_PER_STEP" ]; do
    ranks=$((ranks * 2))
done

say "training on $ranks ranks (${gpus} GPUs)"
"$PYTHON" -m deepspeed.launcher.runner --quiet --num_accelerators "$ranks" \
    launch/train.py --config "$CONFIG" \
    --set "training.micro_batch_size=$((SEQUENCES_PER_STEP / ranks))" "$@" \
    --set run.directory=runs --set run.name=quickstart

say "continuing a prompt"
"$PYTHON" tools/generate.py --checkpoint "$RUN" --prompt "red heart" --output "$RUN/samples"

say "samples are in $RUN/samples; to see the curves, images and sounds, run"
printf '  %s -m tensorboard.main --logdir %s\n' "$PYTHON" "$ROOT/runs"
printf '  and open http://localhost:6006/#custom_scalars\n'
say "done; held out, against what counting tokens achieves:"
"$PYTHON" tools/show_run.py --checkpoint "$RUN" --require unigram
