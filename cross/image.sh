#!/usr/bin/env bash
# Builds the container image of one architecture: dist/lineside-VERSION-ARCH.oci.tar
#
#   cross/image.sh amd64|arm64 [release|dev] [OUTPUT]
#
# The program is linked statically with the C library. `+crt-static` is set for the last link only, so that nothing else is
# compiled again. The program is built without the feature `demo`. The image contains the stripped program, the root
# certificates of this machine and the licences; it has no shell and no dynamic loader. Two runs on one machine give the same
# digest.
#
# `dev` uses the development profile, as the tests do: the hot dependencies are optimised, and it builds minutes faster. ARM64
# requires Debian's rustc-web cargo-web rust-web-src gcc-aarch64-linux-gnu libc6-dev-arm64-cross.
set -euo pipefail
arch=${1:-}
profile=${2:-release}
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
output=${3:-dist/lineside-$version-$arch.oci.tar}
folder=$profile
[ "$profile" = dev ] && folder=debug
strip=strip
case $arch in
amd64)
	target=x86_64-unknown-linux-gnu
	${CARGO:-cargo} rustc --quiet -p lineside --bin lineside --no-default-features --profile "$profile" -- -C target-feature=+crt-static
	program=target/$folder/lineside
	;;
arm64)
	target=aarch64-unknown-linux-gnu
	for tool in /usr/bin/cargo aarch64-linux-gnu-gcc aarch64-linux-gnu-strip; do
		command -v "$tool" >/dev/null || {
			echo "image.sh: $tool is missing; apt-get install rustc-web cargo-web rust-web-src gcc-aarch64-linux-gnu libc6-dev-arm64-cross" >&2
			exit 1
		}
	done
	# Debian's compiler, which includes the sources of the standard library. PATH excludes the toolchain of rustup.
	PATH=/usr/bin:$PATH RUSTC_BOOTSTRAP=1 CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
		/usr/bin/cargo rustc --quiet -Zbuild-std=std,panic_abort --target $target -p lineside --bin lineside --no-default-features \
		--profile "$profile" -- -C target-feature=+crt-static
	program=target/$target/$folder/lineside
	strip=aarch64-linux-gnu-strip
	;;
*)
	sed -n '2,13s/^# \?//p' "$0" >&2
	exit 64
	;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$strip" -o "$work/lineside" "$program"
${CARGO:-cargo} metadata --format-version 1 --locked --filter-platform "$target" | python3 cross/licences.py >"$work/third-party.txt"
certificates=/etc/ssl/certs/ca-certificates.crt
[ -f "$certificates" ] || { echo "image.sh: $certificates is missing; apt-get install ca-certificates" >&2; exit 1; }
python3 cross/image.py --output "$output" --name "localhost/lineside:$version" --arch "$arch" --max-mib 40 \
	--program "/usr/bin/lineside=$work/lineside" \
	--file "/etc/ssl/certs/ca-certificates.crt=$certificates" \
	--file /usr/share/licenses/lineside/LICENSE-APACHE=LICENSE-APACHE \
	--file /usr/share/licenses/lineside/LICENSE-MIT=LICENSE-MIT \
	--file "/usr/share/licenses/lineside/third-party.txt=$work/third-party.txt" \
	--folder /tmp --entrypoint /usr/bin/lineside \
	--label org.opencontainers.image.title=lineside --label "org.opencontainers.image.version=$version" \
	--label "org.opencontainers.image.licenses=Apache-2.0 OR MIT"
