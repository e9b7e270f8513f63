# shellcheck shell=bash
# Starts a training run on ImageNet: its arguments, the split of the total batch, torchrun on one or more machines.
# Sourced, not run directly. Each script holds its recipe.

# shellcheck source=scripts/_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"

# train_on_imagenet NAME TOTAL LARGEST ARGUMENT...: trains with the flags of the array `recipe`.
#   NAME      of the output folder
#   TOTAL     images per optimizer step, over all processes
#   LARGEST   most images per process and micro-batch; more micro-batches make up the total
train_on_imagenet() {
  local name=$1 total=$2 largest=$3 data='' nproc='' output='' mixer=smmix flag value used
  local passed=()
  batch='' accum=''
  shift 3
  while (($#)); do
    name_flag "$1"
    case $flag in
      -h | --help)
        show_header
        exit 0
        ;;
      --data-path | --nproc | --output | --output-dir | --batch-size | --accum-steps | --mixer) ;;
      *)
        passed+=("$1")
        shift
        continue
        ;;
    esac
    take_value "$@"
    shift "$used"
    case $flag in
      --data-path) data=$value ;;
      --nproc) nproc=$value ;;
      --output | --output-dir) output=$value ;;
      --batch-size) batch=$value ;;
      --accum-steps) accum=$value ;;
      --mixer) mixer=$value ;;
    esac
  done

  need_data "$data"
  find_torchrun
  [[ -n $nproc ]] || nproc=$(count_gpus)
  read_launch "$nproc"
  share_batch "$total" "$largest" $((nproc * ${NNODES:-1}))
  # shellcheck disable=SC2154  # recipe comes from the script that sources this file
  run "${launch[@]}" "$root/main.py" "${recipe[@]}" --mixer "$mixer" --batch-size "$batch" --accum-steps "$accum" \
    --data-path "$data" --output-dir "${output:-$root/output/${name}_$mixer}" ${passed[@]+"${passed[@]}"}
}

# Sets `flag`: the name of a flag, with hyphens instead of underscores; any other word unchanged.
name_flag() {
  flag=${1%%=*}
  [[ $flag != --* ]] || flag=${flag//_/-}
}

# Sets `value`, the value of the flag at the beginning of the words, and `used`, the number of words that it takes.
take_value() {
  if [[ $1 == *=* ]]; then
    value=${1#*=} used=1
  else
    (($# > 1)) || die "$flag needs a value"
    value=$2 used=2
  fi
}

need_data() {
  [[ -n $1 ]] || die "--data-path DIR is missing: the folder that holds ImageNet's train/ and val/"
}

# An activated environment comes first, then the one that scripts/quickstart.sh makes.
find_torchrun() { command -v torchrun >/dev/null || PATH=$venv/bin:$PATH; }

# The comment at the head of the script that was started.
show_header() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

count_gpus() {
  python3 -c 'import torch; print(max(1, torch.cuda.device_count()))' 2>/dev/null || echo 1
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# Sets `launch`: torchrun for NPROC processes here, and for several machines what NNODES, NODE_RANK, MASTER_ADDR and
# MASTER_PORT say.
read_launch() {
  is_count "$1" || die "--nproc $1: must be a whole number above 0"
  is_count "${NNODES:-1}" || die "NNODES=$NNODES: must be a whole number above 0"
  if ((${NNODES:-1} == 1)); then
    stay_on_loopback
    launch=(torchrun --standalone --local_addr=127.0.0.1 "--nproc_per_node=$1")
    return
  fi
  [[ -n ${MASTER_ADDR:-} && -n ${NODE_RANK:-} ]] ||
    die "NNODES=$NNODES needs MASTER_ADDR (the first machine's address) and NODE_RANK (0 there, then 1, 2, ...)"
  launch=(torchrun "--nnodes=$NNODES" "--node_rank=$NODE_RANK" "--master_addr=$MASTER_ADDR"
    "--master_port=${MASTER_PORT:-29500}" "--nproc_per_node=$1")
}

# Sets `batch` (per process) and `accum` where the user did not, so that their product over all processes stays TOTAL.
share_batch() {
  local total=$1 largest=$2 processes=$3 given=$batch share actual
  [[ -z $batch ]] || is_count "$batch" || die "--batch-size $batch: must be a whole number above 0"
  [[ -z $accum ]] || is_count "$accum" || die "--accum-steps $accum: must be a whole number above 0"
  share=$((total / processes / ${accum:-1}))
  [[ -n $batch ]] || batch=$((share < largest || ${accum:-0} ? share : largest))
  if [[ -z $accum ]]; then
    accum=1
    ((batch == 0 || total % (processes * batch))) || accum=$((total / (processes * batch)))
  fi
  actual=$((batch * processes * accum))
  [[ -n $given ]] || ((actual == total)) ||
    die "the total batch of $total does not divide evenly into $processes processes x $accum micro-batches;" \
      "take another --nproc (a power of 2), or set --batch-size yourself"
  say "total batch: $batch per process x $processes processes x $accum accumulated = $actual"
  ((actual == total)) ||
    say "note: this recipe's total batch is $total; with $actual the peak learning rate changes in proportion"
}
