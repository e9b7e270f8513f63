# shellcheck shell=bash
# Handles the user's flags for main.py: refuses those that the rows set, drops those that a row's mixer does not use,
# and passes the others on.
# Sourced by _table.sh, not run directly. Compatible with bash 3.2 (macOS).
# shellcheck disable=SC2034,SC2154  # table, passed, row_flags and the like come from _table.sh, extra goes there

# read_last FLAG WORD...: sets `last`, the last value of a flag among the words; empty without one.
read_last() {
  local name=$1 word before='' flag
  shift
  last=''
  for word in "$@"; do
    [[ $before != "$name" ]] || last=$word
    name_flag "$word"
    before=$flag
    if [[ $word == --*=* ]]; then
      [[ $flag != "$name" ]] || last=${word#*=}
      before=''
    fi
  done
}

# Refuses the flags that this table's rows set: with other values, a row's folder would hold another recipe.
refuse_row_flags() {
  local index word flag flags own=' ' listing=1 # with `listing`, adapt_row trains nothing
  for ((index = 0; index < ${#row_names[@]}; index++)); do
    ((row_there[index])) || continue
    read -r -a flags <<<"${row_flags[index]}"
    adapt_row "${row_names[index]}"
    for word in "${flags[@]}"; do
      [[ $word != --* ]] || own+="$word "
    done
  done
  for word in ${passed[@]+"${passed[@]}"}; do
    name_flag "$word"
    [[ $flag == --* && $own == *" ${flag/#--no-/--} "* ]] || continue
    [[ " ${open_flags[*]-} " == *" $flag "* ]] ||
      die "$flag: the rows of $table set it themselves; choose rows with --row, see --list"
    ((elsewhere)) || die "$flag: the rows of $table set it themselves; for another value give another --output too"
  done
}

# choose_extra WHAT FLAG...: sets `extra`, the user's flags that go to main.py in a row (or a pre-training) with these
# flags; WHAT is for messages.
choose_extra() {
  local what=$1 word flag is_left=0 left=() mixer has_con has_fine has_score
  shift
  read_uses "$@"
  extra=()
  for word in ${passed[@]+"${passed[@]}"}; do
    if [[ $word == --* ]]; then
      name_flag "$word"
      is_left=0
      ! has_no_use "$flag" || is_left=1
    fi
    if ((is_left)); then left+=("$word"); else extra+=("$word"); fi
  done
  ((${#left[@]} == 0 || listing || checking)) || say "$what: without ${left[*]}, which it does not use"
}

# read_uses FLAG...: sets what has_no_use needs to know of a row with these flags: its `mixer` (none for a pre-training)
# and whether it has L_con, L_fine and a score (1 or 0).
read_uses() {
  local last
  read_last --mixer "$@"
  mixer=$last has_con=0 has_fine=1 has_score=1
  [[ $mixer != smmix ]] || has_con=1
  read_last --con-weight "$@" ${passed[@]+"${passed[@]}"}
  [[ -z $last ]] || has_con=1
  [[ ! $last =~ ^[0.]+$ ]] || has_con=0
  read_last --fine-weight "$@" ${passed[@]+"${passed[@]}"}
  [[ ! $last =~ ^[0.]+$ ]] || has_fine=0
  [[ " $* " != *" --source-region random --target-region corr "* ]] || has_score=0
  ((!pretraining)) || mixer=''
}

# has_no_use FLAG: whether a row does not use a flag of main.py; config/mixing_flags.py has the same rules.
has_no_use() {
  local users='' pasting='smmix cutmix resizemix fmix attentivemix saliencymix transmix'
  case $1 in
    --variant | --region-head | --region-size | --side-ratio | --source-region | --target-region | --fine-weight)
      users=smmix
      ;;
    --score | --score-block) ((!has_score)) || users=smmix ;;
    --fine-temperature) ((!has_fine)) || users=smmix ;;
    --con-temperature | --con-warmup-epochs) ((!has_con)) || users=$pasting ;;
    --consistency | --guide-size | --guide-amp | --motivator)
      users=smmix
      ((!has_con)) || users=$pasting
      ;;
    --con-weight | --relabel) users=$pasting ;;
    --cutmix-minmax) users='cutmix transmix' ;;
    --mix-alpha) users='fmix attentivemix saliencymix' ;;
    --resize-scope | --resize-placement) users=resizemix ;;
    --fmix-decay) users=fmix ;;
    --attentive-teacher | --attentive-cells) users=attentivemix ;;
    *) return 1 ;;
  esac
  [[ -z $mixer || " $users " != *" $mixer "* ]]
}
