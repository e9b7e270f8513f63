# shellcheck shell=bash
# How a row of a table is rehearsed: a tiny ViT on a part of CIFAR-10, one process, no GPU needed.
# Sourced by _table.sh, never run by itself. Kept to what bash 3.2 (macOS) understands.
#
# The setting is short of data on purpose, because only there mixing helps a model this small: 2,000 images, 200 epochs.
# Its figures say nothing about ImageNet and are no reproduction of the paper's.
# shellcheck disable=SC2154  # data, output, table, small_steps, passed and flags come from _table.sh

small_model=vit_mini_patch4_32 # 96 wide, 6 deep, 32 pixels in patches of 4
small_recipe=(
  --model "$small_model" --subset 2000 --epochs 200 --batch-size 128 --seed 0 --auto-resume
  --opt adamw --weight-decay 0.05 --lr 1e-3 --unscale-lr --sched cosine --warmup-epochs 5 --warmup-lr 1e-6 --min-lr 1e-5
  --drop-path 0.1 --no-model-ema --eval-crop-ratio 1.0
  --aa rand-m9-mstd0.5-inc1 --train-interpolation bicubic --no-repeated-aug --reprob 0.25
  --smoothing 0.1 --mixup 0.8 --cutmix 1.0 --mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch
)

# Sets `arguments`: those of main.py for a rehearsal in FOLDER, with the flags that follow.
small_arguments() {
  local folder=$1 kind=IMNET
  shift
  [[ ! -d $data/cifar-10-batches-py ]] || kind=CIFAR10
  arguments=("${small_recipe[@]}" "$@" --data-set "$kind" --data-path "$data" --output-dir "$folder")
  [[ -z $small_steps ]] || arguments+=(--max-steps "$small_steps")
  arguments+=(${passed[@]+"${passed[@]}"})
}

# train_small WHAT FOLDER FLAG...: one rehearsal, unless it is finished; WHAT is for messages.
train_small() {
  local what=$1 folder=$2 arguments=() epochs
  shift 2
  small_arguments "$folder" "$@"
  read_epochs "${arguments[*]}"
  if [[ -n $small_steps ]] && has_steps "$folder" "$small_steps"; then
    say "$what: finished, $small_steps steps are in $folder; skipped"
    return
  fi
  train_once "$what" "$folder" "$epochs" run python3 "$root/main.py" "${arguments[@]}"
}

# pretrain NAME FLAG...: a network that a row of a rehearsal looks through, trained small itself, once for all tables
# and seeds. Sets `pretrained`, its checkpoint.
pretrain() {
  local folder=$output/small/pretrained/$1 name=$1
  shift
  pretrained=$folder/checkpoint.pth
  ((listing)) || passed_with_seed_0 train_small "small, pre-training of $name" "$folder" "$@"
}

passed_with_seed_0() {
  local passed=(${passed[@]+"${passed[@]}"} --seed 0)
  "$@"
}

# has_steps FOLDER N: whether a rehearsal there came to its end after N steps or more.
has_steps() {
  local step
  [[ -f $1/status.json ]] && grep -Eq '"state": *"done"' "$1/status.json" || return 1
  step=$(grep -Eo '"step": *[0-9]+' "$1/status.json" | grep -Eo '[0-9]+$') || return 1
  ((step >= $2))
}
