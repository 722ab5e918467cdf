#!/usr/bin/env bash
# A run on Cloud TPU VMs: waits for the slice, installs this clone on all its hosts, runs on all of them, and starts again what was interrupted.
#
#   bash launch/tpu_vm.sh --name pretrain --zone us-west4-a --type v5litepod-256 --runtime v2-alpha-tpuv5-lite [--project P] [--spot]
#       [--setup 'sudo mount ...'] [--max-restarts 100] [--dry-run] -- train --config pretrain_3b:v5e:16x16 --workdir /mnt/runs/pretrain_3b
#
# Behind -- stands a job of blip3o-jax. --setup runs on every host before it, e.g. to mount the disk that holds data and workdir. The slice is
# created as a queued resource where there is none of that name, again where it was pre-empted, and stays when the run is over: delete it with
# the command that is printed last. --dry-run prints the gcloud commands. Exit code: the run's.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

name='' zone='' type='' runtime='' project='' spot=false setup=true max_restarts=100 dry_run=false
wrong() {
  echo "$1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --name | --zone | --type | --runtime | --project | --setup | --max-restarts)
      (($# > 1)) || wrong "$1 wants a value."
      declare "$(tr - _ <<<"${1#--}")=$2"
      shift 2
      ;;
    --spot) spot=true && shift ;;
    --dry-run) dry_run=true && shift ;;
    --) shift && break ;;
    *) wrong "Unknown argument '$1'; the beginning of this file says which there are." ;;
  esac
done
for option in name zone type runtime; do
  [[ -n ${!option} ]] || wrong "--$option is missing."
done
[[ $max_restarts =~ ^[0-9]+$ ]] || wrong "--max-restarts is a number, not '$max_restarts'."
(($#)) || wrong "Give the job behind --, e.g. -- train --config pretrain_3b --workdir /mnt/runs/pretrain_3b."
where=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")
poll=${POLL_SECONDS:-30}

say() { echo "$(date +%H:%M:%S) $*"; }

call() {
  if $dry_run; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    gcloud "$@"
  fi
}

# ACTIVE, SUSPENDED, ...; nothing when there is no slice of this name.
state() {
  $dry_run || gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null
}

# Waits until the slice is there. Creates it first, and again if it was pre-empted.
ensure_slice() {
  local now asked=false
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      '')
        $dry_run && $asked && return
        $asked && [[ $missing -ge 10 ]] && wrong "The slice $name was asked for and never appeared; see 'gcloud compute tpus queued-resources list'."
        if ! $asked; then
          say "Asking for $type as $name."
          local request=(compute tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$type" --runtime-version "$runtime")
          $spot && request+=(--spot)
          call "${request[@]}" "${where[@]}" --quiet || exit 1
          asked=true missing=0
        fi
        missing=$((missing + 1))
        ;;
      SUSPENDED | FAILED)
        say "The slice is $now; it is deleted and asked for again."
        call compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet || exit 1
        asked=false
        ;;
      *) say "The slice is $now." ;;
    esac
    $dry_run || sleep "$poll"
  done
}

on_all() {
  call compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet --command="$1"
}

install() {
  say "Installing on all hosts."
  git archive --format=tar.gz --prefix=blip3o_jax/ --output="$archive" HEAD || return 1
  call compute tpus tpu-vm scp "$archive" "$name:blip3o_jax.tar.gz" "${where[@]}" --worker=all --quiet || return 1
  # shellcheck disable=SC2016 # expanded on the hosts
  on_all 'set -e; rm -rf blip3o_jax; tar xzf blip3o_jax.tar.gz; cd blip3o_jax; source launch/venv.sh; pip install --quiet ".[tpu]"' || return 1
  on_all "$setup"
}

# The job on all hosts; their output is this script's. gcloud does not hand on exit codes of hosts, so the first one keeps its own.
run() {
  local job='' preflight='' before='' word
  for word in "$@"; do
    job+=" $(printf '%q' "$word")"
    [[ $before =~ ^--(config|workdir)$ ]] && preflight+=" $before $(printf '%q' "$word")"
    before=$word
  done
  job="blip3o-jax$job"
  [[ $preflight != *--workdir* ]] || job="python launch/preflight.py$preflight && $job"
  on_all "rm -f blip3o.exit; cd blip3o_jax; source launch/env/tpu.env; source launch/venv.sh; $job; code=\$?; echo \$code > ~/blip3o.exit; exit \$code"
  $dry_run && return 0
  local code
  code=$(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 --quiet --command='cat blip3o.exit' 2>/dev/null)
  [[ $code =~ ^[0-9]+$ ]] && return "$code"
  return 255 # the hosts are gone
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
for ((restarts = 0; restarts <= max_restarts; restarts++)); do
  ensure_slice
  code=255
  if install; then
    say "Running: blip3o-jax $*"
    run "$@"
    code=$?
  fi
  # 75: saved after a SIGTERM. 255: a host does not answer. Anything else is the run's own end, unless its hosts were taken away meanwhile.
  now=$(state)
  if ((code == 0)) || { ((code != 75 && code != 255)) && [[ $now == ACTIVE ]]; }; then
    say "The run ended with code $code. The slice is still there: gcloud compute tpus queued-resources delete $name ${where[*]} --force"
    exit "$code"
  fi
  say "Interrupted (code $code, the slice is ${now:-gone}); start $((restarts + 2)) follows."
  sleep "$($dry_run && echo 0 || echo "$poll")"
done
say "Interrupted $max_restarts times; that is enough."
exit 75
