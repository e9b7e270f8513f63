#!/usr/bin/env bash
# Table 9 of the paper: which network guides the mixing, DeiT-T on ImageNet-1k, 300 epochs.
#
#   bash scripts/tables/table9.sh --list
#   bash scripts/tables/table9.sh --data-path /imagenet --row self
#   bash scripts/tables/table9.sh --data-path cifar10 --small
#   bash scripts/tables/table9.sh --data-path /imagenet [OPTION ...] [ARGUMENT of main.py ...]
#
# Expected top-1 (the paper's numbers): deit_tiny 73.5, deit_small 74.1, self 73.6. Not run by us: no figure of our own.
# The row ema, the run's own averaged weights, is an addition of ours without a figure of the paper.
#
# --motivator-tiny FILE, --motivator-small FILE   weights of DeiT-T and DeiT-S for rows 1 and 2
# --list            the rows and the paper's figures
# --row N|NAME      rows to run, by number or name, separated by commas; may be repeated; default: all available rows
# --data-path, --nproc, NNODES=... and DRY_RUN=1   as in scripts/deit_small.sh
# --output ROOT     runs are in ROOT/table9/deit_tiny_<row>, with _seed<k> added if --seed is not 0; default: output.
#                   The same command skips finished rows and resumes an interrupted one.
# --small [--steps N]   a rehearsal on CIFAR-10: see docs/tables.md
# All other flags go to main.py after the recipe and override it; flags that the rows set are refused.
#
# A row is scripts/deit_tiny.sh and its flags. The paper does not say which weights its pre-trained networks have; by
# default they are DeiT's own, which timm names and downloads.
# --small downloads nothing: deit_tiny is guided by the rehearsal's own network, trained with CutMix on the same images,
# and deit_small by a DeiT-T (192 wide, 12 deep), likewise. They are trained first, into ROOT/small/pretrained, each
# once for all seeds; DeiT-T takes much longer than a row does.

set -euo pipefail

# shellcheck source=scripts/tables/_table.sh
source "$(dirname "${BASH_SOURCE[0]}")/_table.sh"

# shellcheck disable=SC2034  # read by run_table
{
  table=table9
  title="Table 9 of the paper, the motivator: top-1 on ImageNet-1k in %, the paper's figures (not run by us)"
  models=(deit_tiny)
  columns=(DeiT-T)
}

row deit_tiny 'pre-trained DeiT-T' '73.5' --mixer smmix
row deit_small 'pre-trained DeiT-S' '74.1' --mixer smmix
row self 'self (SMMix)' '73.6' --mixer smmix --motivator self
row ema 'averaged weights (ours)' '-' --mixer smmix --motivator ema --model-ema

# The networks that rows 1 and 2 are guided by.
adapt_row() {
  case $small,$1 in
    0,deit_tiny) flags+=(--motivator "$motivator_tiny") ;;
    0,deit_small) flags+=(--motivator "$motivator_small") ;;
    1,deit_tiny)
      pretrain cutmix_vit_mini --mixer cutmix
      flags+=(--motivator "$pretrained")
      ;;
    1,deit_small)
      pretrain cutmix_deit_tiny --mixer cutmix --model deit_tiny_patch16_224 --input-size 32 --patch-size 4
      flags+=(--motivator "$pretrained")
      ;;
    1,ema) flags+=(--model-ema-decay 0.99) ;;
  esac
}

motivator_tiny=deit_tiny_patch16_224.fb_in1k motivator_small=deit_small_patch16_224.fb_in1k rest=()
while (($#)); do
  name_flag "$1"
  case $flag in
    --motivator-tiny | --motivator-small)
      take_value "$@"
      shift "$used"
      [[ $flag != --motivator-tiny ]] || motivator_tiny=deit_tiny_patch16_224=$value
      [[ $flag != --motivator-small ]] || motivator_small=deit_small_patch16_224=$value
      ;;
    --motivator) die "--motivator: each row has its own; give --motivator-tiny FILE or --motivator-small FILE" ;;
    *)
      rest+=("$1")
      shift
      ;;
  esac
done
run_table ${rest[@]+"${rest[@]}"}
