# shellcheck shell=bash
# Prints the lists of --list and --list-tsv.
# Sourced by _table.sh, not run directly. Compatible with bash 3.2 (macOS).
# shellcheck disable=SC2034,SC2154  # what it reads and sets is _table.sh's

# Prints the rows with their numbers and the paper's figures.
list_rows() {
  local index figure figures=() note
  printf '%s\n\n' "$title"
  printf ' #  %-18s %-23s' row label
  printf '%8s' "${columns[@]}"
  printf '\n'
  for ((index = 0; index < ${#row_names[@]}; index++)); do
    read -r -a figures <<<"${row_figures[index]}"
    note=''
    ((row_there[index])) || note='   not available yet'
    printf '%2d  %-18s %-23s' $((index + 1)) "${row_names[index]}" "${row_labels[index]}"
    for figure in "${figures[@]}"; do
      printf '%8s' "$figure"
    done
    printf '%s\n' "$note"
  done
}

# Prints a line for each run of the chosen rows, fields with tabs between them: table, row, label, model, the paper's
# figure (if any), and the arguments of main.py (if the row is available) without data and output folder.
list_runs() {
  local place
  if [[ -n $1 ]]; then
    choose_rows "$1"
  else
    for ((place = 0; place < ${#row_names[@]}; place++)); do
      chosen+=("$place")
    done
  fi
  choose_models "$2"
  for_each_run list_run
}

list_run() {
  local place index=$1 model=$2 label=${row_labels[$1]} figures=() figure='' flags=() extra=() arguments=() command=''
  read -r -a figures <<<"${row_figures[index]}"
  figure=${figures[0]-}
  ((${#models[@]})) || label=${columns[0]}
  for ((place = 0; place < ${#models[@]}; place++)); do
    [[ ${models[place]} != "$model" ]] || figure=${figures[place]-}
  done
  if ((row_there[index])); then
    read -r -a flags <<<"${row_flags[index]}"
    adapt_row "$3"
    if ((small)); then
      small_arguments '' . ${flags[@]+"${flags[@]}"}
      command="main.py ${arguments[*]}"
    else
      choose_extra '' ${flags[@]+"${flags[@]}"}
      command=$(
        set -e
        export DRY_RUN=1
        train_row "$model" --data-path . --nproc "$nproc" --output . ${flags[@]+"${flags[@]}"} \
          ${extra[@]+"${extra[@]}"}
      )
    fi
  fi
  ((!small)) || figure=''
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$table" "$3" "$label" "$model" "${figure#-}" "$(only_recipe "$command")"
}

# only_recipe COMMAND: the words after main.py in the text of a command, without data and output folder.
only_recipe() {
  local words=() word kept=() skip=1
  read -r -d '' -a words <<<"$1" || true
  for word in ${words[@]+"${words[@]}"}; do
    case $word in
      */main.py | main.py)
        kept=() skip=0
        continue
        ;;
      --data-path | --output-dir | --data-set) skip=2 ;;
    esac
    ((skip)) || kept+=("$word")
    ((skip == 0)) || skip=$((skip - 1))
  done
  printf '%s' "${kept[*]-}"
}
