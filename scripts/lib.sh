# Sourced by the scripts beside it; no program of its own.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
case $target in /*) ;; *) target=$root/$target ;; esac
export CARGO_TARGET_DIR=$target
# rustup installs here, and a shell that was open before does not know it yet.
[ -d "${CARGO_HOME:-$HOME/.cargo}/bin" ] && PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
# Tools of the administrator (debugfs, losetup, xfs_db) are not in everybody's path.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '\n== %s\n' "$*"; }
warn() { printf '%s: warning: %s\n' "${0##*/}" "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# Runs a command as root: directly, else through sudo.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "needs root for: $* (run as root, or install sudo)"
  fi
}

# Installs those of the named Debian packages that are missing; silent and without network when none is.
debian_packages() {
  local package missing=()
  command -v dpkg-query >/dev/null ||
    die "this is no Debian or Ubuntu; install what these packages hold, then run again with XOFS_SKIP_PACKAGES=1: $*"
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# Fails unless the first version number is the second one or later.
at_least() { [ "$(printf '%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# What a run could leave behind: mounts of ours, loop devices, processes. One line each, sorted.
leftovers() {
  {
    awk '$3 ~ /^fuse/ && $3 != "fusectl" { print "mount " $2 }' /proc/self/mounts
    losetup --list --noheadings --output NAME,BACK-FILE 2>/dev/null | sed 's/^/loop device /' || true
    pgrep -x 'xofs|mount.xofs' 2>/dev/null | sed 's/^/process /' || true
  } | sort
}

# Installs what tests/interop needs of npm, if its lock changed since. npm writes the file last that is asked for.
node_packages() {
  (
    cd "$root/tests/interop"
    [ node_modules/.package-lock.json -nt package-lock.json ] && exit
    npm ci --ignore-scripts --no-audit --no-fund
    touch node_modules/.package-lock.json
  )
}

# Unpacks a fixture once into the target folder and prints where: <there>/repo and <there>/expected.
unpack_fixture() {
  local archive=$root/tests/fixtures/$1.tar.zst there=$target/fixtures/$1 fresh
  if [ ! -d "$there" ] || [ "$archive" -nt "$there/.complete" ]; then
    mkdir -p "$target/fixtures"
    fresh=$(mktemp -d "$target/fixtures/.$1.XXXXXX")
    tar -C "$fresh" --zstd -xf "$archive"
    touch "$fresh/$1/.complete"
    rm -rf "$there"
    mv -T "$fresh/$1" "$there"
    rmdir "$fresh"
  fi
  printf '%s\n' "$there"
}

# Writes what goes with the binaries into a folder: man/man1, man/man8, and completions/{bash,zsh,fish}.
write_documents() {
  local xofs=$1 there=$2 shell
  mkdir -p "$there/man/man1" "$there/man/man8" "$there/completions"
  "$xofs" man "$there/man/man1"
  cp "$root/docs/mount.xofs.8" "$there/man/man8/"
  for shell in bash zsh fish; do "$xofs" completions "$shell" >"$there/completions/$shell"; done
}
