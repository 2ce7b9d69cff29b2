#!/usr/bin/env bash
# One layer of harness.check in a job: a regression fails it, what could not be decided or measured is a warning.
#
#     check.sh NAME [arguments of harness.check]
#
# Leaves checks/NAME.json and checks/NAME.xml (JUnit), and adds to the job's summary.
set -uo pipefail

name=$1
shift
mkdir -p checks
code=0
python -m harness.check "$@" --json --markdown "${GITHUB_STEP_SUMMARY:-checks/summary.md}" \
    --junit "checks/$name.xml" > "checks/$name.json" || code=$?
case $code in
    3) echo "::warning title=$name::inconclusive: this runner is too noisy to decide; the job's summary says how noisy" ;;
    4) echo "::warning title=$name::nothing could be measured on this runner; the job's summary says why" ;;
    *) exit "$code" ;;
esac
