#!/usr/bin/env bash
# Table 7 of the paper: SMMix's three components on and off, DeiT-S on ImageNet-1k, 300 epochs.
#
#   bash scripts/tables/table7.sh --list
#   bash scripts/tables/table7.sh --data-path /imagenet --row consistency
#   bash scripts/tables/table7.sh --data-path cifar10 --small
#   bash scripts/tables/table7.sh --data-path /imagenet [OPTION ...] [ARGUMENT of main.py ...]
#
# Expected top-1 (the paper's numbers): none 79.8, mixing 80.4, consistency 80.3, mixing_fine 80.9, mixing_consistency
# 80.8, all 81.1. Not run by us: no figure of our own.
#
# --list            the rows and the paper's figures
# --row N|NAME      rows to run, by number or name, separated by commas; may be repeated; default: all available rows
# --data-path, --nproc, NNODES=... and DRY_RUN=1   as in scripts/deit_small.sh
# --output ROOT     runs are in ROOT/table7/deit_small_<row>, with _seed<k> added if --seed is not 0; default: output.
#                   The same command skips finished rows and resumes an interrupted one.
# --small [--steps N]   a rehearsal on CIFAR-10: see docs/tables.md
# All other flags go to main.py after the recipe and override it; flags that the rows set are refused.
#
# A row is scripts/deit_small.sh and its flags. mixing: the max-min attention region mixing of Sec. 4.1, without it
# plain CutMix; fine: L_fine, which needs that mixing; consistency: L_con, on CutMix too, where lam is the box's share.
# none and all are the two columns of Table 1 once more.

set -euo pipefail

# shellcheck source=scripts/tables/_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/_table.sh"

# shellcheck disable=SC2034  # read by run_table
{
  table=table7
  title="Table 7 of the paper, the components of SMMix: top-1 on ImageNet-1k in %, the paper's figures (not run by us)"
  models=(deit_small)
  columns=(DeiT-S)
}

row none 'none (CutMix)' '79.8' --mixer cutmix --con-weight 0
row mixing 'mixing' '80.4' --mixer smmix --fine-weight 0 --con-weight 0
row consistency 'consistency' '80.3' --mixer cutmix --con-weight 1
row mixing_fine 'mixing, fine' '80.9' --mixer smmix --fine-weight 1 --con-weight 0
row mixing_consistency 'mixing, consistency' '80.8' --mixer smmix --fine-weight 0 --con-weight 1
row all 'all (SMMix)' '81.1' --mixer smmix --fine-weight 1 --con-weight 1

run_table "$@"
