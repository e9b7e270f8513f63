# shellcheck shell=bash
# Which rows are finished, and whether they were run as they would be now.
# Sourced by _table.sh, never run by itself. Kept to what bash 3.2 (macOS) understands.
# shellcheck disable=SC2154  # root, table and finished come from _table.sh

# is_finished FOLDER EPOCHS: whether log.txt there, a line of JSON per epoch, has the last one. A line that was cut
# short does not count, nor an epoch that was: status.json says how many are done.
is_finished() {
  local done_there
  [[ -f $1/log.txt ]] && grep -Eq "\"epoch\": *$(($2 - 1)) *(,.*)?}\$" "$1/log.txt" || return 1
  [[ -f $1/status.json ]] || return 0
  done_there=$(grep -Eo '"epoch": *[0-9]+' "$1/status.json" | grep -Eo '[0-9]+$') || return 0
  ((done_there >= $2))
}

# has_steps FOLDER N: whether a rehearsal there came to its end after N steps or more; without N it did not.
has_steps() {
  local step
  [[ -n $2 ]] || return 1
  [[ -f $1/status.json ]] && grep -Eq '"state": *"done"' "$1/status.json" || return 1
  step=$(grep -Eo '"step": *[0-9]+' "$1/status.json" | grep -Eo '[0-9]+$') || return 1
  ((step >= $2))
}

# was_stopped FOLDER: whether the run there was stopped by a signal. It has saved then, and its exit code may be 0.
was_stopped() { [[ -f $1/status.json ]] && grep -Eq '"state": *"preempted"' "$1/status.json"; }

# note_finished WHAT FOLDER WORD...: a finished run, and the command that would make it now; WHAT is for messages.
note_finished() {
  local what=$1 folder=$2
  shift 2
  finished+=("$what" "$folder" "$#" "$@")
}

# Refuses to skip what was noted where its recipe is another one than now: one start of python for all of it.
compare_finished() {
  local status=0
  ((${#finished[@]})) || return 0
  PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} python3 "$root/scripts/tables/_finished.py" "${finished[@]}" || status=$?
  ((status != 2)) || exit 2
  ((status == 0)) || die "the finished runs of $table could not be compared with this command, see above"
}
