#!/usr/bin/env bash
# include/bigsmall.h must compile by itself as C99 and as C++17, without a warning.
set -euo pipefail
cd "$(dirname "$0")/.."

strict=(-Wall -Wextra -Werror -pedantic -fsyntax-only -Iinclude)
unit='#include "bigsmall.h"'

"${CC:-cc}" -std=c99 "${strict[@]}" -x c - <<<"$unit"
if command -v "${CXX:-c++}" >/dev/null; then
	"${CXX:-c++}" -std=c++17 "${strict[@]}" -x c++ - <<<"$unit"
else
	echo "note: no C++ compiler here, so bigsmall.h was not checked as C++17"
fi
