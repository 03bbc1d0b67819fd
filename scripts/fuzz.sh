#!/usr/bin/env bash
# Runs every fuzz target for so long, or so many inputs: fuzz.sh 60s, fuzz.sh 2000x. A finding fails, and is kept in the package's
# testdata/fuzz.
set -euo pipefail
cd "$(dirname "$0")/.."
each=${1:?how long or how many, such as 60s or 2000x}
for package in ./codecs ./codecs/rans ./codecs/reference ./tests/go; do
	targets=$(go test -list '^Fuzz' "$package" | grep '^Fuzz')
	for target in $targets; do
		# To shorten what is merely interesting would take most of the time.
		if ! said=$(go test -run '^$' -fuzz "^$target\$" -fuzztime "$each" -fuzzminimizetime 10x -parallel "${FUZZ_WORKERS:-2}" "$package" 2>&1); then
			echo "$said"
			exit 1
		fi
		echo "$target: $(grep -o 'execs: [0-9]*' <<<"$said" | tail -n 1)"
	done
done
