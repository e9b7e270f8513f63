#!/usr/bin/env bash
# From a fresh machine to a trained model: makes .venv, trains a small vision transformer with SMMix on 1,797 scans of
# handwritten digits (they are inside scikit-learn: nothing is downloaded), evaluates it. Runs on CPUs, in minutes.
#
#   bash scripts/quickstart.sh [--dry-run] [ARGUMENT of main.py ...]
#
# --dry-run    show the commands and end
# PYTHON=...   the interpreter that makes .venv (Python 3.10 or later)

# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

output=output/quickstart
# --device cpu, because two processes need two GPUs. Weak augmentation, because the scans are 8 x 8 pixels; mixing on
# half of the batches, because the run is short.
settings=(
  --data-set DIGITS --model vit_nano_patch4_32 --input-size 24 --device cpu --num-workers 0
  --mixer smmix --mixup 0.8 --mixup-prob 0.5
  --epochs 60 --warmup-epochs 5 --batch-size 32 --lr 2e-3 --unscale-lr
  --no-repeated-aug --aa none --reprob 0 --drop-path 0 --model-ema-decay 0.99
)

given=()
for word in "$@"; do
  case $word in
    -h | --help)
      show_header
      exit 0
      ;;
    --dry-run) dry_run=1 ;;
    --output?dir*) die "$word: this script writes to $output; call main.py itself for another folder" ;;
    *) given+=("$word") ;;
  esac
done

cd "$root"
# Each process computes in one thread: with more, the processes would take the cores from each other. torchrun chooses
# the same, with a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say "1 of 3: environment"
use_environment requirements.txt

say "2 of 3: training on DIGITS with SMMix, 2 processes"
if ((${#given[@]} > 0 && !dry_run)); then # a mistyped flag must not cost the last run's results
  python -c 'import errors, main; raise SystemExit(errors.run_command(lambda: main.read_args(None)))' \
    "${settings[@]}" "${given[@]}"
fi
if [[ -e $output ]]; then
  say "removing the last run's $output"
  ((dry_run)) || rm -rf "$output"
fi
run python scripts/launch.py --nproc 2 "${settings[@]}" --output-dir "$output" ${given[@]+"${given[@]}"}

say "3 of 3: evaluating the trained model (and the running average of its weights, \"ema\")"
run python main.py --eval --resume "$output/checkpoint.pth" --device cpu

((!dry_run)) || exit 0
say "done; everything is in $root/$output:"
say "  log.txt          one line of JSON per epoch; train.log is what was printed"
say "  mixing.png       what SMMix made of four pairs of images"
say "  checkpoint.pth   the last epoch; best_checkpoint.pth is the best one"
say "  curves           $venv/bin/python -m tensorboard.main --logdir $root/$output"
