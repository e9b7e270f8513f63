#!/usr/bin/env bash
# DeiT III-S on ImageNet-1k with SMMix, 800 epochs: a recipe of 2022 (ours). The recipe is recipes/deit3_small.yaml.
#
#   bash scripts/deit3_small.sh --data-path /imagenet [--nproc N] [--dry-run] [ARGUMENT of main.py ...]
#   bash scripts/deit3_small.sh --data-path /imagenet --mixer cutmix     the CutMix baseline, same recipe
#
# Published by DeiT III: CutMix 81.4. The SMMix paper has no figure for this recipe. Not run by us.
# DeiT III's hardware: 8 GPUs, 8 x 256 images per step. Other numbers of processes keep the total of 2048.
# --help explains --nproc, several machines and the output folder.

source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
launch --recipe deit3_small "$@"
