# shellcheck shell=bash
# What the scripts share: messages, the environment beside the project, the start of a run. Sourced, not run directly.
# Compatible with bash 3.2 (macOS).

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
dry_run=0 # with --dry-run: commands are shown and not run

say() { printf '== %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the head of the script that was started.
show_header() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Prints a command as it can be typed, and runs it.
run() {
  printf '%q ' "$@"
  printf '\n'
  ((dry_run)) || "$@"
}

# launch ARGUMENT...: scripts/launch.py in the activated environment, or else in the one of scripts/quickstart.sh.
launch() {
  command -v torchrun >/dev/null || PATH=$venv/bin:$PATH
  exec python3 "$root/scripts/launch.py" "$@"
}

# Makes sure that .venv exists and holds what the given requirements files name, and puts it first on PATH.
# PYTHON names the interpreter that makes it. Nothing is installed twice: a stamp keeps each file's checksum. Tools
# in it start as `python -m ...`, because its launchers (torchrun, mypy) break if the project's folder moves.
use_environment() {
  local file stamp checksum
  ((!dry_run)) || return 0
  [[ -x $venv/bin/python ]] || make_environment "${PYTHON:-python3}"
  for file in "$@"; do
    stamp=$venv/installed-$file.cksum
    checksum=$(cksum <"$root/$file")
    if [[ -f $stamp && $(cat "$stamp") == "$checksum" ]]; then
      say "environment: reusing .venv; $file is as it was installed"
      continue
    fi
    say "environment: installing $file into .venv (minutes, the first time)"
    "$venv/bin/python" -m pip install --quiet -r "$root/$file" ||
      die "pip could not install $file, see above; if .venv itself is broken, remove it and run this again"
    printf '%s\n' "$checksum" >"$stamp"
  done
  PATH=$venv/bin:$PATH
}

make_environment() {
  local python=$1 version
  command -v "$python" >/dev/null ||
    die "$python: not found; install Python 3.10 or later, or name one: PYTHON=/path/to/python3"
  version=$("$python" --version 2>&1) || die "$python --version fails: $version"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$python is $version; Python 3.10 or later is needed, name one: PYTHON=/path/to/python3"
  say "environment: making .venv with $version"
  "$python" -m venv "$venv" || {
    rm -rf "$venv"
    die "$python cannot make an environment (on Debian and Ubuntu: apt install python3-venv)"
  }
}
