# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# shellcheck disable=SC2154 # lib.sh and the sourcing script set what is used here
#
# Debian's archive through an apt configuration of our own: the machine's
# sources, lists and cache stay as they are, its mirror and proxy are honoured.
# Sourced, after lib.sh; $advice must say what to do where there is no archive.

apt_dir=$out/source/apt
apt_conf=$apt_dir/apt.conf
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# The base addresses of the Debian archives that this machine uses, one a
# line, each with the kind of suites it has: "main ADDRESS" or "security ADDRESS".
archive_bases()
{
    # shellcheck disable=SC2016 # apt-get expands it
    apt-get "$@" indextargets --format '$(ORIGIN)|$(RELEASE)|$(REPO_URI)' \
            'Created-By: Packages' 2>/dev/null |
        awk -F'|' '$1 == "Debian" {
                kind = $2 ~ /-security$/ ? "security" : "main"
                if (!seen[kind, $3]++)
                    print kind, $3
            }'
}

# Prints what archive_bases does, also on a machine whose package lists are
# empty (a new container): then they are fetched, but not into the machine's.
find_bases()
{
    local bases lists=$apt_dir/machine-lists
    local opts=(-o "Dir::State::Lists=$lists" -o "Dir::Cache=$apt_dir/cache")

    bases=$(archive_bases)
    if [ -z "$bases" ]; then
        mkdir -p "$lists/partial" "$apt_dir/cache/archives/partial"
        if [ "$(id -u)" = 0 ]; then
            opts+=(-o APT::Sandbox::User=root)
        fi
        apt-get "${opts[@]}" update >>"$logs/source.log" 2>&1 || true
        bases=$(archive_bases "${opts[@]}")
    fi
    printf '%s\n' "$bases"
}

write_apt_conf()
{
    cat <<END
Dir::Etc::SourceList "$apt_dir/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "$apt_dir/lists";
Dir::Cache "$apt_dir/cache";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
// What the machine does after an update of its own lists is not for ours.
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
END
    if [ "$(id -u)" = 0 ]; then
        # The unprivileged _apt user cannot enter a private home directory.
        echo 'APT::Sandbox::User "root";'
    fi
}

# write_sources TYPE SUITE...: sources.list lines for the suites, each in the
# archives of its kind; these come on standard input as archive_bases has them.
write_sources()
{
    local type=$1 kind base suite suite_kind
    shift

    while read -r kind base; do
        for suite; do
            case $suite in
            *-security) suite_kind=security ;;
            *) suite_kind=main ;;
            esac
            [ "$kind" != "$suite_kind" ] ||
                echo "$type [signed-by=$keyring] $base $suite main"
        done
    done
}

# The suites that there are besides SUITE, a line each: sid has none.
more_suites()
{
    case $1 in
    sid | unstable) ;;
    *) printf '%s\n' "$1-updates" "$1-security" ;;
    esac
}

# fetch DIR PACKAGE...: downloads packages, verified by apt, and unpacks them in DIR,
# instead of what was there; fails if they cannot be had.
fetch()
{
    local dir=$1 download=$1.download file
    shift

    rm -rf "$dir" "$download"
    mkdir -p "$download"
    (cd "$download" && apt-get -c "$apt_conf" -q download "$@") \
        >>"$logs/source.log" 2>&1 || return 1
    for file in "$download"/*.deb; do
        dpkg-deb -x "$file" "$dir"
    done
    rm -rf "$download"
}

# open_archive TYPE SUITE...: sets the private configuration up for these
# suites and fetches their indices; dies if there is no Debian archive or no
# network. TYPE is deb or deb-src. A suite that has gone is no failure.
open_archive()
{
    local bases

    mkdir -p "$apt_dir/lists/partial" "$apt_dir/cache/archives/partial" "$logs"
    : >"$logs/source.log"
    bases=$(find_bases)
    [ -n "$bases" ] ||
        die "this machine's apt knows no Debian archive that can be reached; $advice"
    write_apt_conf >"$apt_conf"
    printf '%s\n' "$bases" | write_sources "$@" >"$apt_dir/sources.list"
    apt-get -c "$apt_conf" update >>"$logs/source.log" 2>&1 || true
    if ! compgen -G "$apt_dir/lists/*Release" >/dev/null; then
        die "no index could be fetched from $(printf '%s' "$bases" |
            cut -d' ' -f2 | paste -sd' ') (no network?); $advice," \
            "or see $(shown "$logs/source.log")"
    fi
}
