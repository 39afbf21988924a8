#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# A backup provider for vzdump in POSIX sh: containers as tar archives in a directory. Needs jq and flock.
#
#     <path>/<archive>/entry.json, config, firewall, files.tar      an archive
#     <path>/.tmp-<random>/<archive>/                               what a process is making or removing
#     <path>/.tmp-<random>/lock                                     locked as long as that process lives
#     <path>/.commits/<id>                                          what became of a commit
#
# It does one thing at a time: during a backup it answers only `status` and `list`, and what is cancelled. The
# rest waits. Everything that counts is synced before it is renamed, and every step that decides something is one
# rename or one link, which happens once or never.
set -u
number=0 held='' mine=''

send() { printf '%s\n' "$1"; }
get() { printf '%s' "$line" | jq -r "$1"; }
answer() { send "{\"jsonrpc\": \"2.0\", \"id\": $id, \"result\": ${1:-{\}}}"; }
fail() { # kind, sentence
    send "$(jq -cn --argjson id "$id" --arg kind "$1" --arg message "$2" \
        '{jsonrpc: "2.0", id: $id, error: {code: -32000, message: $message, data: {kind: $kind}}}')"
}

# The archive that a request names, as $archive and its directory $place; or an error is the answer.
archive() {
    archive=$(get .params.archive)
    case $archive in *[!A-Za-z0-9._-]* | .* | '') place=/nonexistent ;; *) place=$path/$archive ;; esac
    [ -f "$place/entry.json" ] || { fail not_found "There is no archive $archive."; return 1; }
}

# Makes this process's own directory, as $mine, and holds its lock, which says on every host that we are alive.
claim() {
    [ -z "$mine" ] || return 0
    mkdir -p "$path" && mine=$(mktemp -d "$path/.tmp-XXXXXXXX") && command exec 8<>"$mine/lock" &&
        flock -n 8 && [ -e "$mine/lock" ] && return 0
    mine='' # also if another process took it for a dead one's before it was locked
    return 1
}

# A request that waits is answered at once when it is cancelled, and never begun.
drop() { # id
    found=$(printf '%s' "$held" | jq --argjson id "$1" 'select(.id == $id) | 1')
    [ -n "$found" ] || return 0
    held=$(printf '%s' "$held" | jq -c --argjson id "$1" 'select(.id != $id)')
    held=${held:+$held
}
    id=$1
    fail cancelled "The request was cancelled before its turn came."
}

# Who asks for an outcome first forbids the commit; who commits first has the word.
outcome() {
    mkdir -p "$path/.commits" && word=$path/.commits/$commit
    printf refused >"$path/.commits/.new-$$" && sync "$path/.commits/.new-$$"
    ln "$path/.commits/.new-$$" "$word" 2>/dev/null && sync "$path/.commits"
    name=$(cat "$word")
    if [ "$name" = refused ]; then
        answer '{"outcome": "not_committed"}'
    elif [ -f "$path/$name/entry.json" ]; then
        answer "{\"outcome\": \"committed\", \"archive\": \"$name\"}"
    elif ! flock -n "$word" true; then
        answer '{"outcome": "pending"}'
    elif [ -f "$path/$name/entry.json" ]; then # it has come to its end meanwhile
        answer "{\"outcome\": \"committed\", \"archive\": \"$name\"}"
    else # whoever made it has died before it counted
        mv "$path/.commits/.new-$$" "$word" && sync "$path/.commits"
        answer '{"outcome": "not_committed"}'
    fi
    rm -f "$path/.commits/.new-$$"
}

start_guest() {
    kind=$(get .params.kind) guest=$(get .params.guest_id) time_s=$(get .params.start_time_s)
    name=vzdump-$kind-$guest-$(date -u -d "@$time_s" +%Y_%m_%d-%H_%M_%S)
    [ ! -e "$path/$name" ] || { fail invalid "There is an archive $name already."; return; }
    claim && work=$mine/$name && mkdir -p "$work" && : >"$work/files.tar" ||
        { fail io "Cannot write to $path."; return; }
    jq -cn --arg name "$name" --arg kind "$kind" --argjson guest "$guest" --arg time_s "$time_s" \
        '{name: $name, subtype: $kind, guest_id: $guest, time_s: $time_s}' >"$work/entry.new"
    answer "{\"guest\": \"$name\", \"archive_name\": \"$name\"}"
}

# What tar says in $words is not in the archive; fails if that is more than may be, or has zeros in its place. The
# last 16 KiB are told: with less it is all there is.
left_out() {
    printf '%s' "$words" | jq -ceRs --argjson skips "$skips" '
        (($skips and utf8bytelength > 15000) or
            test(": File shrank by [0-9]+ bytes?; padding with zeros(\n|$)") or
            test(": Warning: Read error at byte [0-9]+, [^:\n]*: [^:\n]*(\n|$)")) as $bad |
        [split("\n")[] | capture(
            "^tar: [.]?(?<path>.*): (Warning: (?<why>Cannot .*(?<!Operation not supported))|socket ignored)$")] |
        if $bad or (any(.why) and ($skips | not)) then empty
        else {ignored: map({path, why: (.why // "a socket")}), ignored_count: "\(length)"} end' |
        sed 's/^{//; s/}$//' | grep .
}

backup_container() {
    work=$mine/$(get .params.guest) number=$((number + 1))
    get .params.config >"$work/config"
    # As JSON: no rules and an empty file are not the same.
    printf '%s' "$line" | jq -c .params.firewall >"$work/firewall"
    send "$(printf '%s' "$line" | jq -c --arg id "tar-$number" --arg out "$work/files.tar" '.params |
        {jsonrpc: "2.0", id: $id, method: "container.command", params: {
            container: .container, identity: "mapped_root", stdout: $out,
            argv: (["tar", "-cf", "-", "--numeric-owner", "--sparse", "--acls", "--xattrs", "-C", .tree,
                "--one-file-system", "--null", "--no-verbatim-files-from", "--no-unquote",
                "--files-from=\(.lists)/selected"] +
                if .skip_unreadable then ["--ignore-failed-read"] else [] end)}}')"
    skips=$(get '.params.skip_unreadable // false')
    # While tar runs other requests may come: they are answered before this one.
    job=$id waits="\"tar-$number\"" cancelled='' told=$line
    while IFS= read -r line; do
        method=$(get '.method // ""') id=$(get '.id | tojson')
        if [ "$id" = "$waits" ] && [ -z "$method" ]; then break; fi
        if [ "$method" = '$/cancel' ]; then
            target=$(get '.params.id | tojson')
            if [ "$target" = "$job" ]; then
                cancelled=yes
                send "{\"jsonrpc\": \"2.0\", \"method\": \"\$/cancel\", \"params\": {\"id\": $waits}}"
            else
                drop "$target"
            fi
        elif [ "$method" = status ] || [ "$method" = list ]; then
            "do_$method"
        else
            held="$held$line
"
        fi
    done
    id=$job
    [ -z "$cancelled" ] || { fail cancelled "The backup was cancelled."; return; }
    code=$(get '.result.exit_code // 255') words=$(get '.error.message // .result.stderr_tail // ""')
    [ "$code" = 0 ] || { fail io "tar ended with $code: $words"; return; }
    ignored=$(left_out) || { fail io "Something cannot be read, or only in part: $words"; return; }
    entries=$(tar -tf "$work/files.tar" | wc -l) bytes=$(stat -c %s "$work/files.tar")
    [ "$entries" -gt 0 ] || { fail corrupt "The archive has no entries."; return; }
    line=$told
    answer "{\"entries\": \"$entries\", \"read_bytes\": \"$bytes\", \"written_bytes\": \"$bytes\", $ignored}"
}

commit() {
    name=$(get .params.guest) commit=$(get .params.id)
    work=$mine/$name word=$path/.commits/$commit
    bytes=$(stat -c %s "$work/files.tar")
    mkdir -p "$path/.commits"
    if (
        jq -c --arg id "$commit" --arg bytes "$bytes" '. + {commit_id: $id, size_bytes: $bytes}' \
            "$work/entry.new" >"$work/entry.json" &&
            rm "$work/entry.new" && sync "$work"/* "$work" &&
            printf %s "$name" >"$word.$$" && sync "$word.$$" && exec 9<>"$word.$$" && flock -n 9 &&
            ln "$word.$$" "$word" && rm "$word.$$" && sync "$path/.commits" &&
            mv -T "$work" "$path/$name" && sync "$path"
    ) >&2; then
        answer "{\"archive\": \"$name\", \"size_bytes\": \"$bytes\"}"
    else
        fail io "The archive $name could not be committed."
    fi
}

abort() {
    name=$(get .params.guest)
    # Without a directory of its own this process has stored nothing.
    if [ -z "$mine" ] || rm -rf "${mine:?}/$name"; then
        answer
    else
        fail io "What was stored of $name could not be removed."
    fi
}

remove() {
    archive || return
    number=$((number + 1))
    if claim && mv -T "$place" "$mine/dead-$number" && sync "$path" && rm -rf "$mine/dead-$number"; then
        answer
    else
        fail io "The archive $archive could not be removed, or not all of it."
    fi
}

do_status() {
    mkdir -p "$path"
    numbers=$(df -B1 --output=size,used "$path" | tail -1)
    answer "$(printf '%s' "$numbers" | jq -cR '[splits(" +") | select(. != "")] | {total_bytes: .[0], used_bytes: .[1]}')"
}

do_list() { # one page: some thousand archives fit into a line
    answer "$(cat /dev/null "$path"/*/entry.json 2>/dev/null | jq -cs '{archives: .}')"
}

handle() {
    method=$(get '.method // ""') id=$(get '.id | tojson')
    case $method in
    initialize)
        answer '{"name": "tar store", "api_version": 2, "properties": [{"name": "path", "kind": "path", "required": true, "description": "The directory."}],
            "capabilities": {"container": true, "container_restore": true, "remove": true}}' | tr -d '\n'
        echo
        ;;
    configure) path=$(get .params.properties.path) && answer ;;
    activate)
        mkdir -p "$path" || { fail io "Cannot make $path."; return; }
        for dead in "$path"/.tmp-*; do # a process that lives holds its lock
            [ ! -d "$dead" ] || flock -n "$dead/lock" rm -rf "$dead"
        done
        answer
        ;;
    status) do_status ;;
    list) do_list ;;
    guest_config)
        archive && answer "$(jq -cn --rawfile config "$place/config" --slurpfile firewall "$place/firewall" \
            '{config: ($config | rtrimstr("\n")), firewall: $firewall[0]}')"
        ;;
    commit_outcome) commit=$(get .params.id) && outcome ;;
    start_job) answer '{"job": "job"}' ;;
    start_guest) start_guest ;;
    backup_container) backup_container ;;
    commit) commit ;;
    abort) abort ;;
    remove) remove ;;
    restore_container) archive && answer "{\"restore\": \"$archive\"}" ;;
    container_data)
        answer "{\"kind\": \"tar\", \"path\": \"$path/$(get .params.restore)/files.tar\", \"compression\": \"none\"}"
        ;;
    finish_job | restore_cleanup) answer ;;
    '$/cancel' | '') ;;
    *) send "{\"jsonrpc\": \"2.0\", \"id\": $id, \"error\": {\"code\": -32601, \"message\": \"There is no such method.\"}}" ;;
    esac
}

while IFS= read -r line; do
    handle
    # What came meanwhile and had to wait.
    while [ -n "$held" ]; do
        line=${held%%
*} held=${held#*
}
        handle
    done
done
[ -z "$mine" ] || rm -rf "$mine"
