#!/usr/bin/env bash
# Table A4 of the paper: six mixing schemes, DeiT-S on ImageNet-1k, 100 epochs.
#
#   bash scripts/tables/tablea4.sh --list
#   bash scripts/tables/tablea4.sh --data-path /imagenet --row random_corr
#   bash scripts/tables/tablea4.sh --data-path cifar10 --small
#   bash scripts/tables/tablea4.sh --data-path /imagenet [OPTION ...] [ARGUMENT of main.py ...]
#
# Expected top-1 (the paper's numbers): random_corr 74.2, random_max 73.8, random_min 74.5, max_corr 74.4, max_max 74.3,
# max_min 74.7. Not run by us: no figure of our own.
#
# --list            the rows and the paper's figures
# --row N|NAME      rows to run, by number or name, separated by commas; may be repeated; default: all available rows
# --data-path, --nproc, NNODES=... and DRY_RUN=1   as in scripts/deit_small.sh
# --output ROOT     runs are in ROOT/tablea4/deit_small_<row>, with _seed<k> added if --seed is not 0; default: output.
#                   The same command skips finished rows and resumes an interrupted one.
# --small [--steps N]   a rehearsal on CIFAR-10: see docs/tables.md
# All other flags go to main.py after the recipe and override it; flags that the rows set are refused.
#
# A row is scripts/deit_small.sh with 100 epochs and its flags: where the region is taken in the source, and where it
# goes in the target; corr is the place it was taken from. All rows have both loss terms, L_fine and L_con. The paper
# does not say how a random region is drawn: here each image has its own, uniform over the windows inside the grid.

set -euo pipefail

# shellcheck source=scripts/tables/_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/_table.sh"

# shellcheck disable=SC2034  # read by run_table
{
  table=tablea4
  title="Table A4 of the paper, the mixing schemes: top-1 on ImageNet-1k in %, the paper's figures (not run by us)"
  models=(deit_small)
  columns=(DeiT-S)
}

row random_corr 'Random -> Corr' '74.2' --mixer smmix --source-region random --target-region corr
row random_max 'Random -> Max Attn' '73.8' --mixer smmix --source-region random --target-region max
row random_min 'Random -> Min Attn' '74.5' --mixer smmix --source-region random --target-region min
row max_corr 'Max Attn -> Corr' '74.4' --mixer smmix --source-region max --target-region corr
row max_max 'Max Attn -> Max Attn' '74.3' --mixer smmix --source-region max --target-region max
row max_min 'Max Attn -> Min Attn' '74.7' --mixer smmix --source-region max --target-region min

# 100 epochs; a rehearsal has those of all rehearsals.
train_row() {
  local model=$1
  shift
  train_by_script "$model" --epochs 100 "$@"
}

run_table "$@"
