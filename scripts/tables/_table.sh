# shellcheck shell=bash
# Shared by the scripts of the paper's tables: their rows, the choice of rows, and skipping finished runs.
# Sourced, not run directly. Compatible with bash 3.2 (macOS).
#
# A table's script sets
#   table     its name, in messages and as a folder
#   title     the line above its list of rows
#   models    its columns, as names of the model scripts in scripts/; empty if each row is such a model
#   columns   the heading of each column of figures
#   method    if rows are models: their mixing method, the second half of a folder's name
#   open_flags   flags of its rows that the user may set to other values, with another --output
# declares its rows in the paper's order with `row` and `row_to_come`, defines `train_row` anew unless every run is a
# model's script with flags, `adapt_row` if what a row adds depends on more than the row, and ends with
# `run_table "$@"`.
# shellcheck disable=SC2154  # these come from that script

# shellcheck source=scripts/_imagenet.sh
source "$(dirname "${BASH_SOURCE[0]}")/../_imagenet.sh"
# shellcheck source=scripts/tables/_given.sh
source "$(dirname "${BASH_SOURCE[0]}")/_given.sh"
# shellcheck source=scripts/tables/_finished.sh
source "$(dirname "${BASH_SOURCE[0]}")/_finished.sh"
# shellcheck source=scripts/tables/_list.sh
source "$(dirname "${BASH_SOURCE[0]}")/_list.sh"
# shellcheck source=scripts/tables/_small.sh
source "$(dirname "${BASH_SOURCE[0]}")/_small.sh"

row_names=() row_labels=() row_figures=() row_flags=() row_there=() open_flags=()

# row NAME LABEL FIGURES FLAG...: a row that can be run; FIGURES are the paper's, one per column, with spaces between
# them, and FLAG... are what the row adds to its recipe (words without spaces).
row() { add_row 1 "$@"; }

# row_to_come NAME LABEL FIGURES: a row whose method is not implemented yet.
row_to_come() { add_row 0 "$@"; }

add_row() {
  row_there+=("$1")
  row_names+=("$2")
  row_labels+=("$3")
  row_figures+=("$4")
  shift 4
  row_flags+=("$*")
}

# train_row MODEL ARGUMENT...: one run, with the arguments that the model scripts take. A table with another recipe
# redefines this function.
train_row() { train_by_script "$@"; }

# train_by_script MODEL ARGUMENT...: the recipe of scripts/MODEL.sh.
train_by_script() {
  local model=$1
  shift
  bash "$root/scripts/$model.sh" "$@"
}

# adapt_row NAME: may change `flags`, what the row adds to its recipe; `small` is 1 for a rehearsal, else 0.
adapt_row() { :; }

# run_table ARGUMENT...: lists or runs the rows that the user chose.
run_table() {
  local data='' nproc='' output=$root/output asked='' only='' seed=0 small=0 small_steps='' list=0
  local listing=0 checking=0 pretraining=0 elsewhere=0 passed=() chosen=() chosen_models=() finished=()
  read_arguments "$@"
  if ((list)); then
    list_rows
    exit 0
  fi
  if ((small)); then
    [[ -z $nproc ]] || die "--nproc $nproc: --small runs in one process; leave it out"
    [[ -z $only ]] || die "--model$only: --small trains $small_model in every row; leave it out"
    ((${#models[@]})) || only_method
    models=("$small_model")
  else
    [[ -z $small_steps ]] || die "--steps $small_steps: only a rehearsal is cut short; add --small"
  fi
  refuse_row_flags

  if ((listing)); then
    nproc=${nproc:-4}
    list_runs "$asked" "$only"
    exit 0
  fi
  choose_rows "$asked"
  choose_models "$only"
  need_data "$data"
  find_torchrun
  ((small)) || [[ -n $nproc ]] || nproc=$(count_gpus)
  checking=1
  for_each_run run_row
  compare_finished
  checking=0
  for_each_run run_row
}

# Reads a table's own arguments into the variables of run_table; the rest are `passed` on to main.py.
read_arguments() {
  local flag value used
  while (($#)); do
    name_flag "$1"
    case $flag in
      -h | --help)
        show_header
        exit 0
        ;;
      --list) list=1 ;;
      --list-tsv) listing=1 ;;
      --small) small=1 ;;
      --row | --model | --data-path | --nproc | --output | --output-dir | --steps | --seed)
        take_value "$@"
        shift "$used"
        read_argument
        continue
        ;;
      *) passed+=("$1") ;;
    esac
    shift
  done
}

# Reads the argument `flag` with its `value`.
read_argument() {
  case $flag in
    --row)
      [[ $value == *[!,\ ]* ]] || die "--row needs numbers or names, with commas between them"
      asked+=" ${value//,/ }"
      ;;
    --model) only+=" ${value//,/ }" ;;
    --data-path) data=$value ;;
    --nproc) nproc=$value ;;
    --output | --output-dir) output=${value%/} elsewhere=1 ;;
    --steps)
      is_count "$value" || die "--steps $value: must be a whole number above 0"
      small_steps=$value
      ;;
    --seed)
      seed=$value
      passed+=(--seed "$seed")
      ;;
  esac
}

# for_each_run COMMAND: COMMAND INDEX MODEL NAME for each of the chosen rows on each of the chosen models; NAME is that
# of the row in its run's folder.
for_each_run() {
  local index model
  for index in "${chosen[@]}"; do
    if ((${#models[@]} == 0)); then
      "$1" "$index" "${row_names[index]}" "$method"
      continue
    fi
    for model in "${chosen_models[@]}"; do
      "$1" "$index" "$model" "${row_names[index]}"
    done
  done
}

# If rows are models, a rehearsal has a single row: their method.
only_method() {
  row_names=("$method") row_labels=("${columns[0]}") row_figures=('') row_flags=("--mixer $method") row_there=(1)
}

# run_row INDEX MODEL NAME: one run, unless it is finished. With `checking` nothing is run or printed: a finished run is
# recorded for compare_finished, with the command that would run it now.
run_row() {
  local index=$1 model=$2 folder flags=() extra=() arguments=() words=() epochs suffix=''
  local what="$table, row $((index + 1)), ${row_names[index]}"
  [[ $seed == 0 ]] || suffix=_seed$seed
  read -r -a flags <<<"${row_flags[index]}"
  adapt_row "$3"
  if ((small)); then
    train_small "small, $what" "$output/small/$table/$3$suffix" ${flags[@]+"${flags[@]}"}
    return
  fi
  ((${#models[@]} == 0)) || what+=" on $model"
  folder=$output/$table/${model}_$3$suffix
  ((!checking)) || [[ -f $folder/log.txt ]] || return 0
  choose_extra "$what" ${flags[@]+"${flags[@]}"}
  arguments=(--data-path "$data" --nproc "$nproc" --output "$folder"
    ${flags[@]+"${flags[@]}"} ${extra[@]+"${extra[@]}"})
  # The words of the command; a command that cannot run is refused here.
  words_of_run train_row "$model" "${arguments[@]}"
  read_epochs "${words[@]}"
  if ((checking)); then
    ! is_finished "$folder" "$epochs" || note_finished "$what" "$folder" "${words[@]}"
    return 0
  fi
  train_once "$what" "$folder" "$epochs" train_row "$model" "${arguments[@]}"
}

# words_of_run COMMAND...: sets `words` to the words of the last command that COMMAND would `run`.
words_of_run() {
  local words_file word
  words_file=$(mktemp)
  (
    set -e
    export DRY_RUN=1 WORDS_TO=$words_file
    "$@"
  ) >/dev/null
  words=()
  while IFS= read -r -d '' word; do
    words+=("$word")
  done <"$words_file"
  rm -f "$words_file"
}

# train_once WHAT FOLDER EPOCHS COMMAND...: runs COMMAND, unless FOLDER has the last epoch; if it fails or is stopped,
# the table ends.
train_once() {
  local what=$1 folder=$2 epochs=$3 status
  shift 3
  if is_finished "$folder" "$epochs"; then
    say "$what: finished, epoch $((epochs - 1)) is in $folder/log.txt; skipped"
    return
  fi
  if [[ -e $folder/log.txt ]]; then
    say "$what: resuming in $folder"
  else
    say "$what: into $folder"
  fi
  # After || or in a condition, bash would ignore set -e inside.
  set +e
  (
    set -e
    "$@"
  )
  status=$?
  set -e
  if ((status)); then
    printf 'error: %s: stopped with exit code %s, see above; the same command resumes from here\n' "$what" "$status" >&2
    exit "$status"
  fi
  if [[ ${DRY_RUN:-0} != 1 ]] && was_stopped "$folder"; then
    printf 'error: %s: stopped by a signal before its end; the same command resumes from here\n' "$what" >&2
    exit 1
  fi
}

# Sets `epochs`: the last --epochs among the words.
read_epochs() {
  local last
  read_last --epochs "$@"
  epochs=$last
  is_count "$epochs" || die "--epochs $epochs: must be a whole number above 0"
}

# Sets `chosen`: the indices of the rows that the words name, by number or name; without words, of all available rows.
choose_rows() {
  local words=() word index
  read -r -a words <<<"$1"
  if ((${#words[@]} == 0)); then
    for ((index = 0; index < ${#row_names[@]}; index++)); do
      if ((row_there[index])); then
        chosen+=("$index")
      else
        say "$table, row $((index + 1)), ${row_names[index]}: not available yet; left out"
      fi
    done
    return
  fi
  for word in "${words[@]}"; do
    find_row "$word"
    ((row_there[index])) ||
      die "--row $word: $table's ${row_names[index]} is not available yet; the paper has ${row_figures[index]// / and }"
    [[ " ${chosen[*]-} " == *" $index "* ]] || chosen+=("$index")
  done
}

# Sets `index`: the index of a row, found by its number or name.
find_row() {
  local known=''
  for ((index = 0; index < ${#row_names[@]}; index++)); do
    [[ $1 != "${row_names[index]}" && $1 != "$((index + 1))" ]] || return 0
    known+=", $((index + 1)) ${row_names[index]}"
  done
  die "--row $1: $table has no such row; its rows: ${known#, }"
}

# Sets `chosen_models`: the columns that the words name; without words, all.
choose_models() {
  local words=() word
  read -r -a words <<<"$1"
  if ((${#words[@]} == 0)); then
    chosen_models=(${models[@]+"${models[@]}"})
    return
  fi
  ((${#models[@]})) || die "--model ${words[*]}: the rows of $table are its models; choose with --row, see --list"
  for word in "${words[@]}"; do
    [[ " ${models[*]} " == *" $word "* ]] || die "--model $word: $table has no such column; its columns: ${models[*]}"
    [[ " ${chosen_models[*]-} " == *" $word "* ]] || chosen_models+=("$word")
  done
}
