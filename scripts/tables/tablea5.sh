#!/usr/bin/env bash
# Table A5 of the paper: where the image attention score comes from, DeiT-S on ImageNet-1k, 300 epochs.
#
#   bash scripts/tables/tablea5.sh --list
#   bash scripts/tables/tablea5.sh --data-path /imagenet --row block6
#   bash scripts/tables/tablea5.sh --data-path cifar10 --small
#   bash scripts/tables/tablea5.sh --data-path /imagenet [OPTION ...] [ARGUMENT of main.py ...]
#
# Expected top-1 (the paper's numbers): none 80.7, block3 81.0, block6 81.1, block9 81.1, block12 81.1, rollout 81.1.
# Not run by us: no figure of our own.
#
# --list            the rows and the paper's figures
# --row N|NAME      rows to run, by number or name, separated by commas; may be repeated; default: all available rows
# --data-path, --nproc, NNODES=... and DRY_RUN=1   as in scripts/deit_small.sh
# --output ROOT     runs are in ROOT/tablea5/deit_small_<row>, with _seed<k> added if --seed is not 0; default: output.
#                   The same command skips finished rows and resumes an interrupted one.
# --small [--steps N]   a rehearsal on CIFAR-10: see docs/tables.md
# All other flags go to main.py after the recipe and override it; flags that the rows set are refused.
#
# A row is scripts/deit_small.sh and its flags. none: a random score for each token; block<d>: the score of block d of
# the 12; rollout: the mean of all blocks' scores. L_con is on, so the motivating pass runs to its end in every row;
# with --con-weight 0 it ends at the block that is read.
# --small has 6 blocks: block3, block6, block9 and block12 read blocks 2, 3, 5 and 6 there, the same depths rounded up.

set -euo pipefail

# shellcheck source=scripts/tables/_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/_table.sh"

# shellcheck disable=SC2034  # read by run_table
{
  table=tablea5
  title="Table A5 of the paper, the depth of the score: top-1 on ImageNet-1k in %, the paper's figures (not run by us)"
  models=(deit_small)
  columns=(DeiT-S)
}

row none 'none (random)' '80.7' --mixer smmix --score random
row block3 'd = 3' '81.0' --mixer smmix --score-block 3
row block6 'd = 6' '81.1' --mixer smmix --score-block 6
row block9 'd = 9' '81.1' --mixer smmix --score-block 9
row block12 'd = 12' '81.1' --mixer smmix --score-block 12
row rollout 'rollout' '81.1' --mixer smmix --score rollout

# Half as many blocks.
adapt_row() {
  [[ $small == 0 || $1 != block* ]] || flags=(--mixer smmix --score-block $(((${1#block} + 1) / 2)))
}

run_table "$@"
