# shellcheck shell=bash
# Finds finished runs, and compares their recipes with this command.
# Sourced by _table.sh, not run directly. Compatible with bash 3.2 (macOS).
# shellcheck disable=SC2154  # root, table and finished come from _table.sh

# is_finished FOLDER EPOCHS: whether log.txt, with one line of JSON per epoch, has the last epoch. An incomplete line
# does not count, nor an incomplete epoch: status.json has the number of complete ones.
is_finished() {
  local done_there
  [[ -f $1/log.txt ]] && grep -Eq "\"epoch\": *$(($2 - 1)) *(,.*)?}\$" "$1/log.txt" || return 1
  [[ -f $1/status.json ]] || return 0
  done_there=$(grep -Eo '"epoch": *[0-9]+' "$1/status.json" | grep -Eo '[0-9]+$') || return 0
  ((done_there >= $2))
}

# has_steps FOLDER N: whether the rehearsal in FOLDER ended after N steps or more; false if N is empty.
has_steps() {
  local step
  [[ -n $2 ]] || return 1
  [[ -f $1/status.json ]] && grep -Eq '"state": *"done"' "$1/status.json" || return 1
  step=$(grep -Eo '"step": *[0-9]+' "$1/status.json" | grep -Eo '[0-9]+$') || return 1
  ((step >= $2))
}

# was_stopped FOLDER: whether a signal stopped the run in FOLDER. Then it has saved, and its exit code may be 0.
was_stopped() { [[ -f $1/status.json ]] && grep -Eq '"state": *"preempted"' "$1/status.json"; }

# note_finished WHAT FOLDER WORD...: records a finished run and the command that would run it now; WHAT is for messages.
note_finished() {
  local what=$1 folder=$2
  shift 2
  finished+=("$what" "$folder" "$#" "$@")
}

# Stops if a recorded run has another recipe than its command. One start of Python compares all of them.
compare_finished() {
  local status=0
  ((${#finished[@]})) || return 0
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} python3 "$root/scripts/tables/_finished.py" "${finished[@]}" || status=$?
  ((status != 2)) || exit 2
  ((status == 0)) || die "the finished runs of $table could not be compared with this command, see above"
}
