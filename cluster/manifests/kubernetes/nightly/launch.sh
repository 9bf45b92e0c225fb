#!/bin/sh
# Starts the RayJob of this period, or finds the one that an earlier pod of the same Job has started, and waits for its end.
#
# The RayJob is a copy of the suspended one that $TEMPLATE names. It is called after the Job, which the CronJob calls after
# the period: so there is one a period, whatever becomes of this pod. (`-run`, because KubeRay calls a Job of its own like
# the RayJob.) The Job owns it: to delete the Job is to end the run.
#
# Exit codes: dpo-ray's own, as Ray tells it in the RayJob's message (0 done, 4 the gate refused the model, ...; 1 where it
# tells none) · 124 the RayJob's deadline · 69 the API server, which another pod may reach.
set -u

seconds=${SECONDS_BETWEEN:-15} # between two looks
patience=${LOOKS_IN_VAIN:-40}  # looks in a row that the API server may leave without an answer
run="$JOB_NAME-run"
said=$(mktemp)

say() { printf '%s %s\n' "$(date -u +%H:%M:%SZ)" "$*"; }

# The shell answers a signal only between two commands, and no more than one look later.
trap 'say "This pod ends; $run goes on, and the next pod of $JOB_NAME waits for it. To end it: kubectl delete job $JOB_NAME"; exit 143' TERM

give_up() {
  say "$1: $(tail -n 3 "$said")"
  exit "$2"
}

field() { kubectl get rayjob "$1" -o "jsonpath=$2" 2>"$said"; }

create() {
  entrypoint=$(field "$TEMPLATE" '{.spec.entrypoint}') || return 1
  quoted=$(printf '%s --run-id %s' "$entrypoint" "$run" | sed 's/[\\"]/\\&/g')
  owner="{\"apiVersion\": \"batch/v1\", \"kind\": \"Job\", \"name\": \"$JOB_NAME\", \"uid\": \"$JOB_UID\"}"
  own="{\"metadata\": {\"name\": \"$run\", \"ownerReferences\": [$owner]}, \"spec\": {\"entrypoint\": \"$quoted\"}}"
  kubectl get rayjob "$TEMPLATE" -o json 2>"$said" >"$said.template" || return 1
  kubectl patch --local --type merge -f "$said.template" -p "$(cat "$(dirname "$0")/as_run.yaml")" -o json 2>"$said" >"$said.run" || return 1
  kubectl patch --local --type merge -f "$said.run" -p "$own" -o json 2>"$said" >"$said.own" || return 1
  kubectl create -f "$said.own" >/dev/null 2>"$said" || return 1
}

misses=0
missed() {
  misses=$((misses + 1))
  [ "$misses" -lt "$patience" ] || give_up "The API server did not answer $patience times in a row" 69
  sleep "$seconds"
}

while :; do
  if found=$(kubectl get rayjob "$run" --ignore-not-found -o name 2>"$said") && [ -n "$found" ]; then
    say "$run is there already: waiting for its end. Its log: kubectl logs --follow job/$run"
    break
  elif create; then
    say "$run is created. Its log: kubectl logs --follow job/$run"
    break
  fi
  case $(cat "$said") in
    *NotFound*) give_up "There is no RayJob $TEMPLATE to copy, or no RayJobs at all: apply the overlay, and install KubeRay" 2 ;;
    *Forbidden* | *Invalid* | *BadRequest*) give_up "$run was refused" 2 ;;
  esac
  missed # AlreadyExists as well: the next look finds it
done

# What came of a run that did not succeed, by the exit code that Ray tells in the message.
finish() {
  state=$1 message=$2
  printf '%s\n' "$message" | tail -n 20
  case $state in
    */*DeadlineExceeded)
      say "$run did not end in time ($state). What is finished is kept, and the next run goes on from there."
      exit 124
      ;;
  esac
  code=$(printf '%s\n' "$message" | sed -n 's/.*entrypoint command failed with exit code \(-\{0,1\}[0-9][0-9]*\).*/\1/p' | head -n 1)
  case $code in
    4)
      say "$run: the gate refused the model (exit code 4), and what was published before still is. Its measures: runs/$run in run.output"
      exit 4
      ;;
    2 | 3 | 75 | 130) ;;
    -*) say "$run: its process was killed by signal ${code#-}" && code=1 ;;
    *) code=1 ;;
  esac
  say "$run failed with exit code $code ($state). What is finished is kept, and the next run goes on from there. Its log: kubectl logs job/$run"
  exit "$code"
}

misses=0
before=nothing
while :; do
  if state=$(field "$run" '{.status.jobDeploymentStatus}/{.status.jobStatus}/{.status.reason}'); then
    if [ "$state" != "$before" ]; then
      before=$state
      case $state in
        //) say "$run: KubeRay's operator has not looked at it yet" ;;
        *) say "$run: ${state%/}" ;;
      esac
    fi
    case $state in
      Complete/SUCCEEDED/*) exit 0 ;;
      Complete/* | Failed/* | ValidationFailed/*)
        message=$(field "$run" '{.status.message}') && finish "$state" "$message"
        missed # without the message, a gate that refused would pass for a failure
        ;;
      *)
        misses=0
        sleep "$seconds"
        ;;
    esac
  else
    case $(cat "$said") in
      *NotFound*) give_up "$run was deleted before it ended" 1 ;;
    esac
    missed
  fi
done
