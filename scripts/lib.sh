# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# shellcheck disable=SC2034 # the sourcing script uses what is set here
#
# What the build scripts share: paths, messages, logs, the lock.
# Sourced, never run.

set -euo pipefail
umask 022
export LC_ALL=C.UTF-8

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

# The base, which is the QEMU series to build, and where everything about it goes.
series=${BASE:-$(cat "$top/patches/default")}
out=$top/build/$series
logs=$out/logs
patches=$top/patches/$series

# pyenv, conda and the like must not get between QEMU and Debian's packages.
python=${PYTHON:-/usr/bin/python3}

say()
{
    printf '%s\n' "$*"
}

# One sentence to the user, and the end.
die()
{
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# The same for what is not this machine's fault: who calls this skips something.
unavailable()
{
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 77
}

# The bases that there are patches for.
known_bases()
{
    local file

    for file in "$top"/patches/*/suites; do
        file=${file%/suites}
        printf '%s ' "${file##*/}"
    done
}

# Before anything is made from the name of a base.
case " $(known_bases)" in
*" $series "*) ;;
*) die "there are no patches for BASE=$series, only for $(known_bases | sed 's/ $//');" \
       "docs/adding-a-base.rst says how to add a base" ;;
esac

# The lines of a file that are neither empty nor comments.
lines_of()
{
    sed -e 's/[[:space:]]*#.*//' -e '/^[[:space:]]*$/d' "$1"
}

# A path as the user knows it: relative to the checkout.
shown()
{
    printf '%s' "${1#"$top"/}"
}

on_tty()
{
    [ -t 1 ] && [ "${TERM:-dumb}" != dumb ]
}

# log_tail LOG [START-PATTERN]: the lines of a log that explain a failure:
# from the first that matches the pattern, or the last ones.
log_tail()
{
    local log=$1 pattern=${2:-} first=

    if [ -n "$pattern" ]; then
        first=$(grep -n -m1 -E "$pattern" "$log" | cut -d: -f1 || true)
    fi
    if [ -n "$first" ]; then
        sed -n "$first,\$p" "$log" | head -n 40
    else
        tail -n 20 "$log"
    fi | sed 's/^/    /' >&2
}

# logged LOG-NAME WHAT COMMAND...: runs COMMAND with its output in a log;
# if it fails, shows the end of the log and stops.
logged()
{
    local log=$logs/$1.log what=$2
    shift 2

    mkdir -p "$logs"
    if ! "$@" >"$log" 2>&1 </dev/null; then
        log_tail "$log" '(^|[ :])(ERROR|E): '
        die "$what failed; the whole log: $(shown "$log")"
    fi
}

# Only one build at a time may change what is below build/. The scripts call
# each other, so the first one takes the lock for all.
take_lock()
{
    [ -z "${SPARSE_RAM_LOCKED:-}" ] || return 0
    mkdir -p "$top/build"
    exec 9>"$top/build/.lock"
    if ! flock -n 9; then
        say "another make is at work below build/; waiting for it to finish"
        flock 9
    fi
    export SPARSE_RAM_LOCKED=1
}

# A stamp says what a directory was made from. It is removed before the work
# starts and written when it is complete, so that an interrupted step is never
# taken for a finished one.
stamp_is()
{
    [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]
}

write_stamp()
{
    printf '%s\n' "$2" >"$1.tmp"
    mv -f "$1.tmp" "$1"
}

hash_of()
{
    sha256sum | cut -d' ' -f1
}

# replace_tree NEW OLD: gives OLD the content of NEW, which is used up. A file
# whose content stays keeps its time, so that ninja compiles only what changed;
# a changed one gets the time of now, even if NEW's is older.
replace_tree()
{
    if [ -d "$2" ]; then
        rsync -rlp --checksum --delete "$1/" "$2/"
        rm -rf "$1"
    else
        mkdir -p "$(dirname "$2")"
        mv "$1" "$2"
    fi
}

# The trees: TREE is stock or patched. Both lie at the same place relative to
# their build directory, because then their compiler calls are the same and
# ccache compiles a file only once for both. The links have the short names.
# A tree has a second and a third build directory for sanitizers: TREE-asan and
# TREE-tsan stand for these.
tree_src()
{
    printf '%s' "$out/${1%-?san}-tree/src"
}

tree_build()
{
    case $1 in
    *-?san) printf '%s' "$out/${1%-*}-tree/build-${1##*-}" ;;
    *) printf '%s' "$out/$1-tree/build" ;;
    esac
}

link_tree()
{
    local tree=${1%-?san} build

    build=$(tree_build "$1")
    mkdir -p "$out/$tree-tree"
    ln -sfn "$tree-tree/src" "$out/$tree-src"
    ln -sfn "$tree-tree/${build##*/}" "$out/$1"
}

# configure_like BUILD OTHER WHAT: configures a build directory, unless it is, with the
# options of another, of which ccache knows the most.
configure_like()
{
    [ ! -f "$1/build.ninja" ] || return 0
    mkdir -p "$1"
    cd "$1"
    logged "configure-$3" "configuring the $3" sh "$2/config.status"
    cp -a "$2/qemu-bundle/." "$1/qemu-bundle/"
}

# set_compiler TREE: sets cc to the compiler, called through ccache where there is
# one. The two trees' compiler calls differ in nothing but the directory they are
# made from: they share what was compiled.
set_compiler()
{
    cc=${CC:-gcc}
    if command -v ccache >/dev/null; then
        cc="ccache $cc"
        export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$out/$1-tree}
        export CCACHE_NOHASHDIR=${CCACHE_NOHASHDIR:-1}
    fi
}
