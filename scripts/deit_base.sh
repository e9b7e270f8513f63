#!/usr/bin/env bash
# DeiT-B on ImageNet-1k with SMMix, 300 epochs: its column of Table 1. The recipe is recipes/deit_base.yaml.
#
#   bash scripts/deit_base.sh --data-path /imagenet [--nproc N] [--dry-run] [ARGUMENT of main.py ...]
#   bash scripts/deit_base.sh --data-path /imagenet --mixer cutmix     the CutMix baseline, same recipe
#
# Expected top-1 (the paper's figures): CutMix 81.8, SMMix 82.9. Not run by us.
# DeiT's hardware: two machines with 8 GPUs each, 16 x 64 images per step. Other numbers of processes keep the total of 1024.
# --help explains --nproc, several machines and the output folder.

source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
launch --recipe deit_base "$@"
