#!/usr/bin/env bash
# Table 8 of the paper: the law of the side ratio delta, DeiT-S on ImageNet-1k, 300 epochs.
#
#   bash scripts/tables/table8.sh --list
#   bash scripts/tables/table8.sh --data-path /imagenet --row u01
#   bash scripts/tables/table8.sh --data-path cifar10 --small
#   bash scripts/tables/table8.sh --data-path /imagenet [OPTION ...] [ARGUMENT of main.py ...]
#
# Expected top-1 (the paper's numbers): fixed 81.0, u01 81.0, default 81.1. Not run by us: no figure of our own.
#
# --list            the rows and the paper's figures
# --row N|NAME      rows to run, by number or name, separated by commas; may be repeated; default: all available rows
# --data-path, --nproc, NNODES=... and DRY_RUN=1   as in scripts/deit_small.sh
# --output ROOT     runs are in ROOT/table8/deit_small_<row>, with _seed<k> added if --seed is not 0; default: output.
#                   The same command skips finished rows and resumes an interrupted one.
# --small [--steps N]   a rehearsal on CIFAR-10: see docs/tables.md
# All other flags go to main.py after the recipe and override it; flags that the rows set are refused.
#
# A row is scripts/deit_small.sh and its flags. Sides are whole tokens, at least one and at most all but one: U(0, 1) is
# cut off there.

set -euo pipefail

# shellcheck source=scripts/tables/_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/_table.sh"

# shellcheck disable=SC2034  # read by run_table
{
  table=table8
  title="Table 8 of the paper, the side ratio: top-1 on ImageNet-1k in %, the paper's figures (not run by us)"
  models=(deit_small)
  columns=(DeiT-S)
}

row fixed 'delta = 0.5' '81.0' --mixer smmix --side-ratio 0.5 0.5
row u01 'U(0, 1)' '81.0' --mixer smmix --side-ratio 0 1
row default 'U(0.25, 0.75)' '81.1' --mixer smmix --side-ratio 0.25 0.75

run_table "$@"
