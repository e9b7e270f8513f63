# shellcheck shell=bash
# Rehearses a row of a table: a tiny ViT on a part of CIFAR-10, in one process, without a GPU.
# Sourced by _table.sh, not run directly. Compatible with bash 3.2 (macOS).
#
# It has little data on purpose (2,000 images, 200 epochs): only then does mixing help a model this small. Its figures
# say nothing about ImageNet and do not reproduce the paper's.
# shellcheck disable=SC2154  # data, output, table, small_steps, passed, checking and listing come from _table.sh

small_model=vit_mini_patch4_32 # 96 wide, 6 deep, 32 pixels in patches of 4
small_recipe=(
  --model "$small_model" --subset 2000 --epochs 200 --batch-size 128 --seed 0 --auto-resume
  --opt adamw --weight-decay 0.05 --lr 1e-3 --unscale-lr --sched cosine --warmup-epochs 5 --warmup-lr 1e-6 --min-lr 1e-5
  --drop-path 0.1 --no-model-ema --eval-crop-ratio 1.0 --eval-every 10
  --aa rand-m9-mstd0.5-inc1 --train-interpolation bicubic --no-repeated-aug --reprob 0.25
  --smoothing 0.1 --mixup 0.8 --cutmix 1.0 --mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch
)

# small_arguments WHAT FOLDER FLAG...: sets `arguments`, main.py's for a rehearsal in FOLDER; WHAT is for messages.
small_arguments() {
  local what=$1 folder=$2 kind=IMNET extra=()
  shift 2
  [[ ! -d $data/cifar-10-batches-py ]] || kind=CIFAR10
  choose_extra "$what" "$@"
  arguments=("${small_recipe[@]}" "$@" --data-set "$kind" --data-path "$data" --output-dir "$folder")
  [[ -z $small_steps ]] || arguments+=(--max-steps "$small_steps")
  arguments+=(${extra[@]+"${extra[@]}"})
}

# train_small WHAT FOLDER FLAG...: one rehearsal, unless it is finished. With `checking` it is only recorded.
train_small() {
  local what=$1 folder=$2 arguments=() epochs command
  small_arguments "$@"
  read_epochs "${arguments[@]}"
  command=(python3 "$root/main.py" "${arguments[@]}")
  if ((checking)); then
    ! is_finished "$folder" "$epochs" && ! has_steps "$folder" "$small_steps" ||
      note_finished "$what" "$folder" "${command[@]}"
    return 0
  fi
  if has_steps "$folder" "$small_steps"; then
    say "$what: finished, $small_steps steps are in $folder; skipped"
    return
  fi
  train_once "$what" "$folder" "$epochs" run "${command[@]}"
}

# pretrain NAME FLAG...: trains a small motivator or teacher for a rehearsal, once for all tables and seeds. Sets
# `pretrained`, its checkpoint.
pretrain() {
  local folder=$output/small/pretrained/$1 name=$1
  shift
  pretrained=$folder/checkpoint.pth
  ((listing)) || train_for_all "small, pre-training of $name" "$folder" "$@"
}

# A pre-training has seed 0 and gets no flag that only rows use.
train_for_all() {
  local passed=(${passed[@]+"${passed[@]}"} --seed 0) pretraining=1
  train_small "$@"
}
