#!/usr/bin/env bash
# A run on Cloud TPU VMs: waits for the slice, installs this clone on all its hosts, runs on all of them, and starts again what was interrupted.
#
#   bash launch/tpu_vm.sh --name pretrain --zone us-west4-a --type v5litepod-256 --runtime v2-alpha-tpuv5-lite [--project P] [--spot]
#       [--setup 'mountpoint -q /mnt || sudo mount ...'] [--max-restarts 100] [--dry-run] -- train --config pretrain_3b:v5e:16x16 --workdir /mnt/runs/pretrain_3b
#
# Behind -- stands a job of blip3o-jax; of generate and edit each host makes a share. --setup runs on every host at every start, before the
# package is installed, e.g. to mount the disk that holds data and results. The slice is created as a queued resource where there is none of that
# name, again where it was pre-empted, and stays when the run is over: delete it with the command that is printed last. --dry-run prints the
# gcloud commands. The job, its config and whether that is for slices of this type are checked here first (launch/check_job.py; the clone's .venv
# or another Python must have the package). Exit code: the run's; 1 where the installation or --setup failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

name='' zone='' type='' runtime='' project='' spot=false setup=true max_restarts=100 dry_run=false
wrong() {
  echo "$1" >&2
  exit 2
}
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' launch/tpu_vm.sh; }
while (($#)); do
  case $1 in
    --name | --zone | --type | --runtime | --project | --setup | --max-restarts)
      [[ $# -gt 1 && $2 != --* ]] || wrong "$1 wants a value."
      declare "$(tr - _ <<<"${1#--}")=$2"
      shift 2
      ;;
    --spot) spot=true && shift ;;
    --dry-run) dry_run=true && shift ;;
    --) shift && break ;;
    --help | -h) usage && exit ;;
    *) wrong "Unknown argument '$1'; the job stands behind --, and --help shows the options before it." ;;
  esac
done
for option in name zone type runtime; do
  [[ -n ${!option} ]] || wrong "--$option is missing."
done
[[ $max_restarts =~ ^[0-9]+$ ]] || wrong "--max-restarts is a number, not '$max_restarts'."
(($#)) || wrong "Give the job behind --, e.g. -- train --config pretrain_3b --workdir /mnt/runs/pretrain_3b."
for word in "$@"; do
  case ${word%%=*} in
    --name | --zone | --type | --runtime | --project | --setup | --max-restarts | --spot | --dry-run)
      wrong "${word%%=*} stands behind --, where the job's own options are; put it before --."
      ;;
  esac
done
# What reads buckets is installed where the job names one.
extras=tpu
[[ "$*" != *gs://* ]] || extras+=,gcs
[[ "$*" != *s3://* ]] || extras+=,s3
# All that can be wrong is found before a slice is asked for: the job's options, its config, the programs, what is installed.
export PATH="$PWD/.venv/bin:$PATH"
python=$(command -v python || command -v python3) || wrong "No Python here, with which the job is checked."
preflight=$("$python" launch/check_job.py --type "$type" --fresh -- "$@") || wrong "Nothing was asked for: the job would not start."
$dry_run || command -v gcloud >/dev/null || wrong "gcloud is not installed here; see https://cloud.google.com/sdk/docs/install."
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --prefix=blip3o_jax/ --output="$archive" HEAD || wrong "The hosts get this clone's last commit, and there is none."
git diff --quiet HEAD || echo "The hosts get this clone's last commit, without the changes since." >&2
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
  say "Installing on all hosts, which usually takes some minutes."
  call compute tpus tpu-vm scp "$archive" "$name:blip3o_jax.tar.gz" "${where[@]}" --worker=all --quiet || return 1
  on_all "$setup" || return 1
  # shellcheck disable=SC2016 # expanded on the hosts
  on_all 'set -e; rm -rf blip3o_jax; tar xzf blip3o_jax.tar.gz; cd blip3o_jax; source launch/venv.sh; pip install --quiet ".['"$extras"']"'
}

# The job on all hosts; their output is this script's. gcloud does not hand on exit codes of hosts, so each keeps its own.
run() {
  local job
  job="blip3o-jax$(printf ' %q' "$@")"
  [[ -z $preflight ]] || job="python launch/preflight.py $preflight && $job"
  on_all "rm -f blip3o.exit; cd blip3o_jax; source launch/env/tpu.env; source launch/venv.sh; $job; code=\$?; echo \$code > ~/blip3o.exit; exit \$code"
  $dry_run && return 0
  local codes code
  # shellcheck disable=SC2016 # expanded on the hosts
  codes=$(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet --command='echo "blip3o.exit=$(cat blip3o.exit || echo 255)"' 2>/dev/null |
    sed -n 's/.*blip3o\.exit=\([0-9][0-9]*\).*/\1/p' | sort -rn)
  # First what starts the job again, then what a host says of itself, then what its end does to the others.
  for code in 255 75 143 130 2; do
    ! grep -qx "$code" <<<"$codes" || return "$code"
  done
  [[ -n $codes ]] || return 255 # the hosts are gone
  return "${codes%%$'\n'*}"      # the highest
}

for ((restarts = 0; restarts <= max_restarts; restarts++)); do
  ensure_slice
  if install; then
    say "Running: blip3o-jax $*"
    run "$@"
    code=$?
  else
    say "The installation or --setup failed on a host, as it says above."
    code=1 # fails again, unless the hosts were taken away
  fi
  # 75: saved after a SIGTERM or SIGUSR1; 143: one that came before the run listened. 130: ended from a keyboard. 255: a host does not answer. Anything else is the run's own end, unless its hosts were taken away meanwhile.
  now=$(state)
  if ((code == 0)) || { ((code != 75 && code != 143 && code != 255)) && [[ $now == ACTIVE ]]; }; then
    say "The run ended with code $code. The slice is still there: gcloud compute tpus queued-resources delete $name ${where[*]} --force"
    exit "$code"
  fi
  say "Interrupted (code $code, the slice is ${now:-gone}); start $((restarts + 2)) follows."
  sleep "$($dry_run && echo 0 || echo "$poll")"
done
say "Interrupted $max_restarts times; that is enough."
exit 75
