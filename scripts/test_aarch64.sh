#!/usr/bin/env bash
# Runs tests/py against the aarch64 wheel on x86-64: in a Debian of that architecture, whose programs QEMU executes.
# Needs root, debootstrap and qemu-aarch64-static (Debian's packages debootstrap and qemu-user-static).
#
#   scripts/test_aarch64.sh WHEEL [pytest arguments]      PYTHON: a Python with pip; ROOTFS: where to keep that Debian
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"
wheel="$(realpath "${1:?the aarch64 wheel}")"
shift
rootfs="${ROOTFS:-$repository/build/aarch64}"
for tool in debootstrap qemu-aarch64-static; do
	command -v "$tool" >/dev/null || { echo "skipped: $tool is missing"; exit 0; }
done
[ "$(id -u)" = 0 ] || { echo "skipped: this needs root"; exit 0; }

# The kernel starts QEMU for programs of aarch64. F: it opens QEMU now, so that it need not lie inside the new root.
binfmt=/proc/sys/fs/binfmt_misc
[ -e "$binfmt/register" ] || mount -t binfmt_misc binfmt_misc "$binfmt"
if [ ! -e "$binfmt/qemu-aarch64" ]; then
	magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
	mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
	echo ":qemu-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >"$binfmt/register"
fi

if [ ! -e "$rootfs/.ready" ]; then
	rm -rf "$rootfs"
	debootstrap --arch=arm64 --foreign --variant=minbase --include=python3 bookworm "$rootfs" "${MIRROR:-http://deb.debian.org/debian}" >/dev/null
	for package in "$rootfs"/var/cache/apt/archives/*.deb; do
		dpkg -x "$package" "$rootfs"
	done
	touch "$rootfs/.ready"
fi
rm -rf "$rootfs/site" "$rootfs/repository"
"${PYTHON:-python3}" -m pip install -q --target "$rootfs/site" --python-version 311 --only-binary=:all: \
	--platform manylinux_2_17_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
	huggingface_hub pytest xxhash zstandard "$wheel"
mkdir "$rootfs/repository"
# Without python/: what runs is the wheel.
(cd "$repository" && git ls-files | grep -v '^python/bigsmall/' | tar -cf - -T -) | tar -xf - -C "$rootfs/repository"
mountpoint -q "$rootfs/proc" || mount -t proc proc "$rootfs/proc"
mountpoint -q "$rootfs/dev" || mount --rbind /dev "$rootfs/dev"
trap 'umount -l "$rootfs/dev" "$rootfs/proc"' EXIT
# There is no torch in it. test_lifetime.py measures memory, of which QEMU takes its own.
[ $# -gt 0 ] || set -- -q tests/py --ignore=tests/py/test_lifetime.py
chroot "$rootfs" env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 PYTHONPATH=/site \
	sh -c 'cd /repository && exec python3 -m pytest -p no:cacheprovider "$@"' sh "$@"
