#!/usr/bin/env bash
# Try many hosts on one machine: N processes of `gpt2-jax train` over loopback.
#
#     launch/local.sh N [arguments of gpt2-jax train ...]
#
# DEVICES (4) is the number of CPU devices of each process, PORT (a free one) that of
# the coordinator. Every line is prefixed with the number of its process. When one
# fails, the others are asked to end and killed after GRACE (10) seconds; Ctrl-C lets
# them save first, and a second Ctrl-C kills. The exit status is the first that is not 0.
set -uo pipefail

usage() {
  echo "error: $1; usage: launch/local.sh N [arguments of gpt2-jax train ...]" >&2
  exit 2
}

n=${1-}
case $n in '' | *[!0-9]* | 0*) usage "N is '$n'; allowed: a number from 1 on" ;; esac
shift
command -v gpt2-jax >/dev/null || usage "gpt2-jax is not on PATH"

free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])'
port=${PORT:-$(python3 -c "$free_port")} || exit 2
devices=${DEVICES:-4}
grace=${GRACE:-10}
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT

start() {
  mkfifo "$scratch/$1"
  prefix "$1" <"$scratch/$1" &
  prefixes[$1]=$!
  (
    export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
    export JAX_NUM_PROCESSES=$n JAX_PROCESS_ID=$1 JAX_PLATFORMS=cpu
    export XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=$devices"
    exec gpt2-jax train "${@:2}" </dev/null >"$scratch/$1" 2>&1
  ) &
  jobs[$1]=$!
}

prefix() {
  trap '' INT TERM
  while IFS= read -r line || [ -n "$line" ]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

# Ask the processes to end, or kill them with what they started.
signal_all() {
  local i group=
  [ "$1" = KILL ] && group=-
  for ((i = 0; i < n; i++)); do
    if [ -n "${jobs[i]-}" ]; then
      kill "-$1" -- "$group${jobs[i]}" 2>/dev/null
    fi
  done
}

interrupted=0 status=0 deadline=
# shellcheck disable=SC2317  # the trap calls it
interrupt() {
  interrupted=$((interrupted + 1))
  if [ "$interrupted" -eq 1 ]; then
    echo "stopping all $n processes; once more kills them" >&2
    signal_all TERM
  else
    signal_all KILL
  fi
}
trap interrupt INT TERM

# Each in a process group of its own: a Ctrl-C at the terminal reaches this script alone,
# and the processes get one signal, not two, which would end them without saving.
jobs=() prefixes=()
set -m
for ((i = 0; i < n; i++)); do
  start "$i" "$@"
done
set +m

alive=$n
while [ "$alive" -gt 0 ]; do
  for ((i = 0; i < n; i++)); do
    if [ -z "${jobs[i]}" ] || kill -0 "${jobs[i]}" 2>/dev/null; then
      continue
    fi
    wait "${jobs[i]}"
    code=$?
    jobs[i]=
    alive=$((alive - 1))
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$code
      if [ "$interrupted" -eq 0 ] && [ "$alive" -gt 0 ]; then
        echo "process $i ended with status $code; ending the others" >&2
        signal_all TERM
        deadline=$((SECONDS + grace))
      fi
    fi
  done
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    signal_all KILL
  fi
  if [ "$alive" -gt 0 ]; then
    sleep 0.1
  fi
done
wait "${prefixes[@]}" # for their last lines
if [ "$interrupted" -gt 0 ] && [ "$status" -eq 0 ]; then
  status=130
fi
exit "$status"
