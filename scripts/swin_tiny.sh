#!/usr/bin/env bash
# Swin-T on ImageNet-1k with SMMix, 300 epochs: its column of Table 1. The recipe is recipes/swin_tiny.yaml.
#
#   bash scripts/swin_tiny.sh --data-path /imagenet [--nproc N] [--dry-run] [ARGUMENT of main.py ...]
#   bash scripts/swin_tiny.sh --data-path /imagenet --mixer cutmix     the CutMix baseline, same recipe
#
# Expected top-1 (the paper's figures): CutMix 81.2, SMMix 81.8. Not run by us.
# Swin's hardware: 8 GPUs, 8 x 128 images per step. Other numbers of processes keep the total of 1024.
# --help explains --nproc, several machines and the output folder.

source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
launch --recipe swin_tiny "$@"
