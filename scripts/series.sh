# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # lib.sh sets what is used here, and scripts use it
#
# The series as commits. A repository, build/git, has the whole source of each
# base that was needed, and on it one commit for each patch. What is applied,
# mailed, packaged and edited is taken from these commits. Sourced after lib.sh.
#
# A patch of patches/ has hunks for QEMU's files. Of a file of ours, it has hunks
# only if a later patch changes the file again: the last one says "Completes: FILE",
# and the file as it is then lies in the project, at the same path as in QEMU.
#
# patches/ is the series for the base that patches/reference names. Another base
# has in patches/BASE what differs: a patch of the same name is taken instead of
# that of patches/; patches/BASE/series says "+NAME" for a patch in front of all
# others, "-NAME" for one that is left out, and "=NAME VERSION" from which version
# of the reference's patch the one that is taken instead was made.
#
# Each message says "Topic: NAME", one of patches/topics and in that order. A topic
# is mailed by itself, with the letter patches/letters/NAME.

repo=$top/build/git
reference=$(cat "$top/patches/reference")
[ "$series" != "$reference" ] || patches=$top/patches

# Where files of ours lie: the same path here and in QEMU's tree.
own_dirs=(include util migration system tests/unit tests/qtest tests/bench lab/qtest
          docs/devel docs/system)

# Nothing in the settings of the user may change what is made here, and the same
# patches are the same commits.
project_name='The sparse-ram project'
project_mail=qemu-devel@nongnu.org
run_git()
{
    env -u GIT_DIR -u GIT_WORK_TREE -u GIT_CONFIG_PARAMETERS \
        GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
        GIT_AUTHOR_NAME="${who_name:-$project_name}" \
        GIT_AUTHOR_EMAIL="${who_mail:-$project_mail}" \
        GIT_AUTHOR_DATE="${when:-@1700000000 +0000}" \
        GIT_COMMITTER_NAME="${signer_name:-$project_name}" \
        GIT_COMMITTER_EMAIL="${signer_mail:-$project_mail}" \
        GIT_COMMITTER_DATE="${when:-@1700000000 +0000}" \
        git --git-dir="$repo" "$@"
}

# What each script begins with. Sets work, a directory that goes when the script does.
begin()
{
    take_lock
    mkdir -p "$logs"
    work=$(mktemp -d "${TMPDIR:-/tmp}/sparse-ram.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    index=$work/index
}

in_index()
{
    GIT_INDEX_FILE=$index run_git "$@"
}

# What git does to the content of files, it must not do here.
set_attributes()
{
    mkdir -p "$1/info"
    echo '* -text -eol -filter -ident -working-tree-encoding !diff' \
         >"$1/info/attributes"
}

# The whole source of the base as a commit, whatever its .gitignore says.
# Sets base.
import_base()
{
    local id tree

    id=$(cat "$out/stock-tree/src.stamp")
    if base=$(run_git rev-parse -q --verify "base-$series^{commit}" 2>/dev/null) &&
       [ "$(run_git log -1 --format=%b "$base")" = "$id" ]; then
        return
    fi
    command -v git >/dev/null || die "git is missing: please install it"
    say "importing QEMU $(cat "$(tree_src stock)/VERSION") into $(shown "$repo")"
    [ -d "$repo" ] || git init -q --bare "$repo"
    set_attributes "$repo"
    rm -f "$index"
    # Small files as well are put into one pack, without looking for deltas.
    GIT_INDEX_FILE=$index run_git --work-tree="$(tree_src stock)" \
        -c core.bare=false -c core.compression=1 -c core.bigFileThreshold=1 \
        add -A -f .
    tree=$(in_index write-tree)
    base=$(printf 'QEMU %s\n\n%s\n' "$(cat "$(tree_src stock)/VERSION")" "$id" |
               run_git commit-tree "$tree")
    run_git tag -f "base-$series" "$base" >/dev/null
}

# patches_of ROOT [BASE]: the patches of a base in their order, as paths relative
# to ROOT, which is laid out as patches/ is.
patches_of()
{
    local root=$1 of=${2:-$series} name left_out=' '

    [ -f "$root/series" ] || die "$(shown "$root/series") is missing"
    if [ "$of" != "$reference" ] && [ -f "$root/$of/series" ]; then
        while read -r name _; do
            case $name in
            +*) echo "$of/${name#+}" ;;
            -*) left_out+="${name#-} " ;;
            =*) ;;
            *) die "$(shown "$root/$of/series"): $name has no +, - or = in front" ;;
            esac
        done < <(lines_of "$root/$of/series")
    fi
    for name in $(lines_of "$root/series"); do
        [[ $left_out != *" $name "* ]] || continue
        if [ "$of" != "$reference" ] && [ -f "$root/$of/$name" ]; then
            echo "$of/$name"
        else
            echo "$name"
        fi
    done
}

# start_differences BASE: the list of what it has instead, unless there is one.
start_differences()
{
    [ -f "$top/patches/$1/series" ] || cat >"$top/patches/$1/series" <<END
# SPDX-License-Identifier: GPL-2.0-or-later
# How the series for QEMU $1 differs from patches/series, see scripts/series.sh.
END
}

# version_of PATCH: tells a patch from another, wherever in a file its hunks are.
version_of()
{
    sed 's/^@@ -[0-9,]* +[0-9,]* @@/@@/' "$1" | hash_of | cut -c 1-12
}

# stale_patches ROOT BASE: what the base has instead of patches that are not what
# they were when it was made.
stale_patches()
{
    local name version

    [ -f "$1/$2/series" ] || return 0
    while read -r name version; do
        [[ $name = =* ]] || continue
        name=${name#=}
        [ "$(version_of "$1/$name" 2>/dev/null)" = "$version" ] || echo "$name"
    done < <(lines_of "$1/$2/series")
}

# The message of a patch without the names of the files that it completes; and
# without its topic if it is to be mailed.
message()
{
    sed -e '/^---$/,$d' -e '/^Completes:/,/^$/d' -e '1s/^Subject: \[PATCH\] //' "$1" |
        if [ -n "${signer_name:-}" ]; then sed '/^Topic: /d'; else cat; fi
}

# topic_of PATCH: what it is mailed with. A topic that has no letter is not mailed.
topic_of()
{
    sed -n -e '/^---$/q' -e 's/^Topic: //p' "$1"
}

mailed_topics()
{
    local topic

    for topic in $(lines_of "$top/patches/topics"); do
        [ ! -f "$top/patches/letters/$topic" ] || echo "$topic"
    done
}

completes()
{
    sed -n -e '/^---$/q' -e '/^Completes:/,/^$/p' "$1" |
        sed -e 's/^Completes://' | tr -s ',[:space:]' '\n' | sed '/^$/d'
}

# completed ROOT: all files that the patches named on standard input complete, sorted.
completed()
{
    local patch

    while read -r patch; do
        completes "$1/$patch"
    done | sort
}

sign_off()
{
    if [ -n "${signer_name:-}" ]; then
        run_git interpret-trailers \
            --trailer "Signed-off-by: $signer_name <$signer_mail>"
    else
        cat
    fi
}

# hunks PATCH: who sends the series maintains what it brings.
hunks()
{
    if [ -n "${who_name:-}" ]; then
        WHO="$who_name <$who_mail>" perl -pe \
            's/^([ +]M: )The sparse-ram project <.*>$/$1$ENV{WHO}/' "$1"
    else
        cat "$1"
    fi
}

# apply_patch ROOT OWN NAME: puts a patch, and the files that it completes from
# the directory OWN, into the index. No fuzz; an offset in lines is no harm.
apply_patch()
{
    local patch=$1/$3 file mode

    [ -f "$patch" ] || die "$(shown "$1/series") lists $3, which is not there"
    if ! hunks "$patch" | in_index apply --cached --allow-empty \
             --whitespace=nowarn - 2>"$work/apply.log"; then
        die "$(shown "$patch") does not apply to" \
            "$(run_git log -1 --format=%s "$base"):" \
            "$(sed -n 's/^error: //p' "$work/apply.log" | head -n 1)"
    fi
    for file in $(completes "$patch"); do
        [ -f "$2/$file" ] || die "$(shown "$patch") says that it completes" \
            "$file, which is not there"
        ! run_git cat-file -e "$base:$file" 2>/dev/null ||
            die "$file exists in $(run_git log -1 --format=%s "$base") itself;" \
                "a change to it belongs into a patch in $(shown "$1")"
        mode=100644
        [ ! -x "$2/$file" ] || mode=100755
        printf '%s %s\t%s\n' "$mode" "$(run_git hash-object -w --no-filters \
            "$2/$file")" "$file" | in_index update-index --add --index-info
    done
}

# make_commits ROOT OWN [NAME...]: one for each patch, on the base. Sets commits, the
# first of which is the base, and names, the patches, all of them if none is given.
make_commits()
{
    local name parent=$base

    names=("${@:3}")
    [ $# -gt 2 ] || mapfile -t names < <(patches_of "$1")
    commits=("$base")
    in_index read-tree "$base"
    for name in "${names[@]}"; do
        apply_patch "$1" "$2" "$name"
        parent=$(message "$1/$name" | run_git stripspace |
                 sign_off | run_git commit-tree -p "$parent" "$(in_index write-tree)")
        commits+=("$parent")
        [ -z "${made:-}" ] || echo "${name##*/} $parent" >>"$made"
    done
}

# Files of ours that lie here, whether git knows them already or not.
own_files()
{
    local dirs=() dir

    for dir in "${own_dirs[@]}"; do
        [ ! -d "$top/$dir" ] || dirs+=("$dir")
    done
    [ ${#dirs[@]} -gt 0 ] || return 0
    (cd "$top" && find "${dirs[@]}" -type f ! -name '.*' ! -name '*~' \
         ! -name '*.orig' ! -name '*.rej' | sort)
}

# Nothing may be missing from the patches, and nothing be left over.
check_complete()
{
    local file

    own_files | comm -23 - <(printf '%s\n' "${names[@]}" |
                                 completed "$top/patches") >"$work/unknown"
    read -r file <"$work/unknown" || return 0
    die "$file is in no patch: name it in one, as \"Completes: $file\", or add it" \
        "to a commit of make edit"
}

check_strays()
{
    local file

    for file in "$patches"/*.patch; do
        file=${file#"$top/patches/"}
        [ ! -f "$top/patches/$file" ] || [[ " ${names[*]} " == *" $file "* ]] ||
            die "patches/$file is in no series: remove it, or list it"
    done
}

# state_of BASE: one hash for all that the series of a base is made from here.
state_of()
{
    (cd "$top" && for file in patches/series patches/*.patch \
         "patches/$1"/series "patches/$1"/*.patch $(own_files); do
         [ ! -f "$file" ] || sha256sum "$file"
     done) | hash_of
}

# The series of the base as it is in this project. Sets base, commits and names,
# and the branch of the repository that is called as the base.
load_series()
{
    local id key

    import_base
    id="$(state_of "$series") $base"
    key=$out/series.commits
    if [ -z "${signer_name:-}" ] && [ -f "$key" ] &&
       [ "$(head -n 1 "$key")" = "$id" ] &&
       run_git cat-file -e "$(tail -n 1 "$key")" 2>/dev/null; then
        mapfile -t names < <(patches_of "$top/patches")
        mapfile -t commits < <(sed 1d "$key")
        return
    fi
    make_commits "$top/patches" "$top"
    check_complete
    check_strays
    if [ -z "${signer_name:-}" ]; then
        run_git update-ref "refs/heads/$series" "${commits[-1]}"
        printf '%s\n' "$id" "${commits[@]}" >"$key.tmp"
        mv "$key.tmp" "$key"
    fi
}

# check_out COMMIT DIR INDEX: makes the files of a directory those of a commit.
# What does not change keeps its time, so that ninja compiles only the rest.
check_out()
{
    rm -f "$3.lock"
    GIT_INDEX_FILE=$3 run_git --work-tree="$2" -c core.bare=false \
        update-index -q --refresh >/dev/null || true
    GIT_INDEX_FILE=$3 run_git --work-tree="$2" -c core.bare=false \
        read-tree --reset -u "$1"
}

# copy_base DIR INDEX STAMP: a copy of the base's source, if there is none or it is
# of another base.
copy_base()
{
    ! stamp_is "$3" "$base" || return 0
    rm -rf "$3" "$2" "$1.new"
    mkdir -p "${1%/*}"
    cp -a --reflink=auto "$(tree_src stock)" "$1.new"
    replace_tree "$1.new" "$1"
    GIT_INDEX_FILE=$2 run_git read-tree "$base"
    write_stamp "$3" "$base"
}

# --- the tree that people work in ---

edit=$out/edit

# As the user has set up git, but for what would touch the content of files.
run_edit()
{
    git -C "$edit" "$@"
}

# What make needs besides the target, as the user would say it.
base_option()
{
    [ "$series" = "$(cat "$top/patches/default")" ] || printf ' BASE=%s' "$series"
}

# unfinished DIR: what git is in the middle of there.
unfinished()
{
    local dir state

    dir=$(git -C "$1" rev-parse --absolute-git-dir)
    for state in rebase-merge:rebase rebase-apply:rebase MERGE_HEAD:merge \
                 CHERRY_PICK_HEAD:cherry-pick REVERT_HEAD:revert; do
        if [ -e "$dir/${state%:*}" ]; then
            echo "${state#*:}"
            return
        fi
    done
}

is_clean()
{
    [ -z "$(git -C "$1" status --porcelain)" ]
}

# What DIR's HEAD was, and the patches and files of ours, when both were the same:
# remember_saved DIR, saved_head DIR, saved_state DIR. Each worktree of a repository
# has its own.
saved_file()
{
    printf '%s/sparse-ram' "$(git -C "$1" rev-parse --absolute-git-dir)"
}

remember_saved()
{
    { git -C "$1" rev-parse HEAD
      state_of "$series"
    } >"$(saved_file "$1")"
}

saved_head()
{
    sed -n 1p "$(saved_file "$1")" 2>/dev/null
}

saved_state()
{
    sed -n 2p "$(saved_file "$1")" 2>/dev/null
}

# Before what is in the tree is replaced
check_saved()
{
    if [ -n "$(unfinished "$edit")" ] || ! is_clean "$edit" ||
       [ "$(saved_head "$edit")" != "$(run_edit rev-parse HEAD)" ]; then
        die "$(shown "$edit") has work that is not saved: make save$(base_option)" \
            "saves it, and rm -rf $(shown "$edit") discards it"
    fi
}

# A clone of the repository, unless there is one that has nothing to be lost.
open_edit()
{
    if [ -d "$edit/.git" ]; then
        check_saved
        run_edit fetch -q -f origin
        return
    fi
    rm -rf "$edit"
    git clone -q --no-checkout "$repo" "$edit"
    set_attributes "$edit/.git"
    run_edit config core.autocrlf false
    # Of QEMU's thousands of files nothing has to be packed again.
    run_edit config gc.auto 0
    if ! run_edit var GIT_COMMITTER_IDENT >/dev/null 2>&1; then
        run_edit config user.name "$project_name"
        run_edit config user.email "$project_mail"
    fi
}
