#!/usr/bin/env bash
# From nothing to a trained three-modality model: environment, corpus, training through the
# deepspeed launcher, samples, and a closing table. Run again, it reuses what is there.
# Arguments go to launch/train.py: bash launch/quickstart.sh --set training.train_steps=400
# (but the run's name and folder are the quickstart's).
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
    say "the corpus is there: $CORPUS"
else
    say "building the corpus in $CORPUS"
    "$PYTHON" tools/prepare_corpus.py openmoji --output "$CORPUS"
fi

# GPUs, as many as divide the batch; without one, two ranks on the CPU.
gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
devices="$gpus"
if [ "$gpus" -eq 0 ]; then
    # Before OMP_NUM_THREADS is set: nproc would take it for the number of processors.
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

say "samples are in $RUN/samples; to watch the curves, pictures and sounds:"
printf '  %s -m tensorboard.main --logdir %s\n' "$PYTHON" "$ROOT/runs"
printf '  and open http://localhost:6006/#custom_scalars\n'
say "done; held out, against what counting tokens achieves:"
"$PYTHON" tools/show_run.py --checkpoint "$RUN" --require unigram
