#!/usr/bin/env bash
# Table 1 of the paper: CutMix and SMMix on ten models, ImageNet-1k, 300 epochs.
#
#   bash scripts/tables/table1.sh --list
#   bash scripts/tables/table1.sh --data-path /imagenet --row smmix --model deit_small,pvt_tiny
#   bash scripts/tables/table1.sh --data-path cifar10 --small
#   bash scripts/tables/table1.sh --data-path /imagenet [OPTION ...] [ARGUMENT of main.py ...]
#
# Expected top-1 (the paper's numbers), in the order of the columns: CutMix 72.2, 79.8, 81.8, 77.6, 79.1, 75.1, 79.8,
# 81.2, 81.7 and 81.2, SMMix 73.6, 81.1, 82.9, 78.9, 80.2, 76.4, 81.0, 82.2, 82.7 and 81.8. Not run by us: no figure of
# our own. The column TransMix has a script of its own, scripts/tables/table1_transmix.sh.
#
# --list            the rows and the paper's figures
# --row N|NAME      rows to run, by number or name, separated by commas; may be repeated; default: all available rows
# --model NAME      columns to run; default: all
# --data-path, --nproc, NNODES=... and DRY_RUN=1   as in scripts/deit_small.sh
# --output ROOT     runs are in ROOT/table1/<model>_<row>, with _seed<k> added if --seed is not 0; default: output. The
#                   same command skips finished rows and resumes an interrupted one.
# --small [--steps N]   a rehearsal on CIFAR-10: see docs/tables.md
# All other flags go to main.py after the recipe and override it; flags that the rows set are refused.
#
# A run is scripts/<model>.sh with --mixer, and its recipe is said there; both rows have the same.
# The paper quotes CutMix's figures from the models' own papers, so part of its gains may be the recipe's.

set -euo pipefail

# shellcheck source=scripts/tables/_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/_table.sh"

# shellcheck disable=SC2034  # read by run_table
{
  table=table1
  title="Table 1 of the paper: top-1 on ImageNet-1k in %, the paper's figures (not run by us)"
  models=(deit_tiny deit_small deit_base cait_xxs24 cait_xxs36 pvt_tiny pvt_small pvt_medium pvt_large swin_tiny)
  columns=(DeiT-T DeiT-S DeiT-B XXS-24 XXS-36 PVT-T PVT-S PVT-M PVT-L Swin-T)
}

row cutmix 'CutMix' '72.2 79.8 81.8 77.6 79.1 75.1 79.8 81.2 81.7 81.2' --mixer cutmix
row smmix 'SMMix' '73.6 81.1 82.9 78.9 80.2 76.4 81.0 82.2 82.7 81.8' --mixer smmix

run_table "$@"
