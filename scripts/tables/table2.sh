#!/usr/bin/env bash
# Table 2 of the paper: SMMix beside other image-mixing methods, DeiT-S and Swin-T on ImageNet-1k, 300 epochs.
#
#   bash scripts/tables/table2.sh --list
#   bash scripts/tables/table2.sh --data-path /imagenet --model deit_small --row cutmix,smmix
#   bash scripts/tables/table2.sh --data-path /imagenet --mix-protocol switch --output output/switch
#   bash scripts/tables/table2.sh --data-path /imagenet [OPTION ...] [ARGUMENT of main.py ...]
#
# Expected top-1 (the paper's numbers), DeiT-S and Swin-T: Vanilla 75.7 and 80.2, CutMix 79.8 and 81.2, AttentiveMix
# 80.3 and 81.3, SaliencyMix 79.9 and 81.4, PuzzleMix 80.5 and 81.5, F-Mix 77.4 and 79.6, ResizeMix 78.6 and 81.4,
# AutoMix 80.8 and 81.8, SMMix 81.1 and 81.8. Not run by us: no figure of our own. PuzzleMix and AutoMix are not
# available yet.
#
# --list            the rows and the paper's figures
# --row N|NAME      rows to run, by number or name, separated by commas; may be repeated; default: all available rows
# --model NAME      one column only, deit_small or swin_tiny
# --data-path, --nproc, NNODES=... and DRY_RUN=1   as in scripts/deit_small.sh
# --output ROOT     runs are in ROOT/table2/<model>_<row>; default: output. The same command skips finished rows and
#                   resumes an interrupted one.
# --small [--steps N]   a rehearsal on CIFAR-10: see docs/tables.md
# All other flags go to main.py after the recipe and override it; flags that the rows set are refused,
# except --mix-protocol, --mix-alpha, --resize-placement and --attentive-teacher with another --output.
#
# Where the paper's figures come from. All but SMMix's are those of the Open-Mixup benchmark (Westlake-AI/openmixup,
# docs/en/mixup_benchmarks/Mixup_imagenet.md, "DeiT Training Settings with ViTs"), so every row runs its recipe: total
# batch 1024, peak rate 1e-3, clipping at 5, the schedule stepped every update, random erasing, no repeated
# augmentation, no averaged weights; DeiT-S without drop path and with 5 warm-up epochs, Swin-T with 0.2 and 20. SMMix's
# 81.1 and 81.8 were reached with another recipe, as far as it is known that of scripts/deit_small.sh and
# scripts/swin_tiny.sh; under this one SMMix has no published figure.
#   - Vanilla mixes nothing, not even with Mixup; smoothing, RandAugment and random erasing stay.
#   - The paper's CutMix is the benchmark's row "DeiT", Mixup (0.8) or CutMix (1.0) on each step; SMMix switches with
#     Mixup likewise. The benchmark's own row CutMix (alpha 0.2 on every step) is 80.13 on DeiT-S.
#   - The other rows mix every batch with their one method (--mix-protocol single) and the benchmark's alpha. To have
#     all of them switch with Mixup as SMMix does, which is the fairer comparison, add --mix-protocol switch and another
#     --output, as in the third line above.
# What else stands between a run and the paper's figure:
#   - The benchmark reports the mean over 3 trials of the best epoch. One run has one seed (--seed), and its last epoch
#     lies below its best.
#   - Drop path on DeiT-S is 0 because the benchmark's files leave it out and its model's default is 0; its AutoMix
#     alone has 0.1. Older versions of its DeiT-S files warm up for 20 epochs.
#   - AttentiveMix is the benchmark's AttentiveMix+. Its text says Beta(2, 8) for the share of cells, its code drew from
#     Beta(2, 2), and its teacher stayed in training mode, so that batch norm took the batch's statistics and drifted;
#     its text says ResNet-18 or 50, its DeiT-S file ResNet-50. Here: Beta(2, 8), ResNet-50 with torchvision's first
#     weights (timm downloads them: --attentive-teacher resnet50.tv_in1k), evaluation mode. What made 80.3 is open; for
#     the law as coded: --mix-alpha 2.
#   - SaliencyMix: the published code and the benchmark hand the detector normalised floats, which it reads as bytes,
#     and use one image's map for the whole batch; their boxes sit at random, in effect. Here each image's own pixels
#     are looked at, so this row is the paper's method and may differ from its 79.9 and 81.4 either way.
#   - ResizeMix: the benchmark clips the box at the borders and squeezes the source into what is left, with one place
#     per batch; the authors' own code keeps the box inside (--resize-placement inside).
#   - PuzzleMix: the benchmark's loss averages the shares of a batch before it weighs the two labels, so its 80.5 and
#     81.5 will not be those of a correct loss. The other rows have one share per batch and are not touched by this.
#   - The benchmark pairs images at random, this project with the batch reversed. Versions of its files differ in their
#     precision, float16 or float32 (--amp none).

set -euo pipefail

# shellcheck source=scripts/tables/_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/_table.sh"

# shellcheck disable=SC2034  # read by run_table
{
  table=table2
  title="Table 2 of the paper: top-1 on ImageNet-1k in %, the paper's figures (not run by us)"
  models=(deit_small swin_tiny)
  columns=(DeiT-S Swin-T)
  open_flags=(--mix-protocol --mix-alpha --resize-placement --attentive-teacher)
}

row vanilla 'Vanilla' '75.7 80.2' --mixer none
row cutmix 'CutMix' '79.8 81.2' --mixer cutmix
row attentivemix 'AttentiveMix(+)' '80.3 81.3' --mixer attentivemix --mix-protocol single --mix-alpha 2 8 \
  --attentive-teacher resnet50.tv_in1k
row saliencymix 'SaliencyMix' '79.9 81.4' --mixer saliencymix --mix-protocol single --mix-alpha 0.2
row_to_come puzzlemix 'PuzzleMix' '80.5 81.5'
row fmix 'F-Mix' '77.4 79.6' --mixer fmix --mix-protocol single --mix-alpha 0.2 --fmix-decay 3
row resizemix 'ResizeMix' '78.6 81.4' --mixer resizemix --mix-protocol single --resize-scope 0.1 0.8 \
  --resize-placement clipped
row_to_come automix 'AutoMix' '80.8 81.8'
row smmix 'SMMix' '81.1 81.8' --mixer smmix

# A rehearsal trains AttentiveMix's classifier itself. Its map has a cell for 32 x 32 pixels, so both networks are shown
# the images at 128 pixels; the ViT cuts them into patches of 16, as many tokens as ever.
adapt_row() {
  [[ $small == 1 && $1 == attentivemix ]] || return 0
  pretrain test_resnet --model test_resnet --input-size 128 --mixer none
  flags=(--mixer attentivemix --mix-protocol single --mix-alpha 2 8 --attentive-teacher "$pretrained"
    --input-size 128 --patch-size 16)
}

# The benchmark's recipe. Its warm-up begins at 1e-5 (Swin-T: 1e-6) times the peak rate.
train_row() {
  local model=$1 largest
  local -a own
  shift
  case $model in
    deit_small)
      largest=256
      own=(--model deit_small_patch16_224 --drop-path 0 --warmup-epochs 5 --warmup-lr 1e-8)
      ;;
    swin_tiny)
      largest=128
      own=(--model swin_tiny_patch4_window7_224 --drop-path 0.2 --warmup-epochs 20 --warmup-lr 1e-9)
      ;;
  esac
  # shellcheck disable=SC2034  # read by train_on_imagenet
  recipe=(
    --data-set IMNET --input-size 224 --eval-crop-ratio 0.875 "${own[@]}"
    --epochs 300 --seed 0 --amp fp16 --auto-resume
    --opt adamw --opt-eps 1e-8 --weight-decay 0.05 --clip-grad 5.0
    --lr 5e-4 --sched cosine --min-lr 1e-5 --sched-on-updates
    --drop 0 --no-model-ema
    --aa rand-m9-mstd0.5-inc1 --train-interpolation bicubic
    --no-repeated-aug --reprob 0.25 --remode pixel --recount 1
    --smoothing 0.1 --mixup 0.8 --cutmix 1.0 --mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch
    --variant paper --side-ratio 0.25 0.75
  )
  train_on_imagenet "$model" 1024 "$largest" "$@"
}

run_table "$@"
