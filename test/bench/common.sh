# shellcheck shell=bash
# What the parts of the bench share. Sourced, with `set -euo pipefail` in force.
# A part measures some lines of doc/performance.md in servers of its own and prints them as rows of a table:
# the median of its rounds and, in brackets, the lowest and the highest.

bench=$(dirname "${BASH_SOURCE[0]}")
. "$bench/../tools/common.sh"
bench=$top/test/bench

# begin_part NAME [VARIABLE...]: builds, and prints the table's head with the command that gives its rows again.
begin_part()
{
	local name=$1 variable command="make bench PART=$1"
	shift
	for variable in "$@"; do command+=" $variable=${!variable}"; done
	make_workspace "bench-$name"
	say "building"
	private_postgres
	private_build
	for variable in sink line; do
		gcc -O2 -D_GNU_SOURCE -o "$work/$variable" "$bench/$variable.c" -lmicrohttpd -lz
	done
	cp "$tree/test/modules/capture_floor/capture_floor.so" "$("$pg_config" --pkglibdir)/"
	rows=$work/rows
	printf '| %-92s | %-28s |\n' "$command" "median [lowest .. highest]" >"$rows"
}
# row WHAT VALUE; printf would pad by bytes.
row() { printf '| %s%*s | %s%*s |\n' "$1" $((92 - ${#1})) '' "$2" $((28 - ${#2})) '' >>"$rows"; }
end_part()
{
	printf '\n'
	cat "$rows"
}

# The servers' settings; full_page_writes = off, because which pages a checkpoint came before says nothing about the work.
settings=("shared_buffers = 512MB" "min_wal_size = 4GB" "max_wal_size = 16GB" "checkpoint_timeout = 1h" "full_page_writes = off")

sql() { as_user "$bin/psql" -qAtX -v ON_ERROR_STOP=1 -h "$work" -p "$1" -U postgres -d "${database:-postgres}" "${@:2}"; }
branch() { sql 5432 "$@"; }
central() { sql 5433 "$@"; }

# start_branch [SETTING...]
start_branch() { start_server branch 5432 "shared_preload_libraries = 'softmobile'" "${settings[@]}" "$@"; }

# make_shop RECEIPTS URL [BRANCHES]: the tables of a shop, attached, in $database; its branches are s1, s2, ...
make_shop()
{
	branch -v receipts="$1" -v url="$2" -v branches="${3:-1}" -f "$bench/shop.sql" >/dev/null
}
# load COUNT: so many events wait, of rows that no sale touches.
load() { branch -c "CALL load($1)"; }
# link URL [BRANCH]: from now on the branch's central is there.
link() { branch -c "SELECT softmobile.register_branch('${2:-s1}', '${2:-s1}', central_url => '$1', receipts => (SELECT receipts FROM softmobile.branch WHERE branch_id = '${2:-s1}'))" >/dev/null; }
# Nobody listens there.
nowhere=http://127.0.0.1:9

# start_helper PROGRAM [ARGUMENT...]: a sink or a line; sets $port and $pid. helper_runs_as: a command that runs it.
start_helper()
{
	local out
	out=$work/$1.$((++helpers)).out
	${helper_runs_as:-} "$work/$1" "${@:2}" >"$out" 2>&1 </dev/null &
	pid=$!
	for _ in $(seq 100); do
		port=$(sed -n 's/^listening //p' "$out")
		[ -z "$port" ] || return 0
		sleep 0.05
	done
	cat "$out"
	return 1
}
helpers=0
stop_helper() { kill "$1"; wait "$1" || true; }
# counts PORT: requests, bytes of bodies, bytes decompressed, events that a sink got.
counts() { perl -MHTTP::Tiny -e 'print HTTP::Tiny->new->get("http://127.0.0.1:$ARGV[0]/counts")->{content}' "$1"; }

# drained: waits until nothing of any branch is undelivered; looks at it more cheaply than the views do.
drained()
{
	local open=1
	for _ in $(seq 36000); do
		open=$(branch -c "SELECT count(*) FROM softmobile.outbox_lane_state l
			WHERE l.branch_id IS NOT NULL AND EXISTS (SELECT FROM softmobile.outbox_event e WHERE e.lane_id = l.log_id AND e.seq >= l.first_open AND NOT l.settled_all @> e.seq)")
		[ "$open" = 0 ] && return
		sleep 0.1
	done
	echo 'the queue does not drain' >&2
	return 1
}
# tiled: waits until the worker has counted all blocks that are whole.
tiled()
{
	for _ in $(seq 6000); do
		[ "$(branch -c "SELECT count(*) FROM softmobile.outbox_lane l WHERE (SELECT coalesce(max(e.seq), 0) FROM softmobile.outbox_event e WHERE e.lane_id = l.lane_id) / softmobile.tile_size()
			> coalesce((SELECT max(t.block) + 1 FROM softmobile.outbox_tile t WHERE t.log_id = l.lane_id), 0)")" = 0 ] && return
		sleep 0.1
	done
	echo 'the worker does not count' >&2
	return 1
}
# worker_pid: of the worker of $database, waited for if need be.
worker_pid()
{
	local found
	for _ in $(seq 300); do
		found=$(branch -c 'SELECT pid FROM softmobile.worker_status() WHERE running')
		[ -z "$found" ] || { echo "$found"; return; }
		sleep 0.1
	done
	echo 'no worker runs' >&2
	return 1
}
# CPU time of a process in ms.
cpu_ms() { awk -v hz="$(getconf CLK_TCK)" '{ printf "%d", ($14 + $15) * 1000 / hz }' "/proc/$1/stat"; }
wal() { branch -c 'SELECT pg_current_wal_insert_lsn()'; }
wal_since() { branch -c "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '$1')::bigint"; }
seconds_now() { date +%s.%N; }
calc() { awk "BEGIN { printf \"${2:-%.2f}\", $1 }"; }

# told [DIGITS] <NUMBERS: median [lowest .. highest]
told()
{
	sort -g | awk -v d="${1:-2}" '{ x[NR] = $1 } END { if (NR == 0) exit 1
		printf "%.*f [%.*f .. %.*f]", d, NR % 2 ? x[(NR + 1) / 2] : (x[NR / 2] + x[NR / 2 + 1]) / 2, d, x[1], d, x[NR] }'
}
# interval [DIGITS] <RATIOS: their geometric mean and, in brackets, its 95 % confidence interval (Student's t)
interval()
{
	awk -v d="${1:-2}" 'BEGIN { split("12.71 4.30 3.18 2.78 2.57 2.45 2.36 2.31 2.26 2.23 2.20 2.18 2.16 2.14 2.13 2.12 2.11 2.10 2.09", t) }
		{ s += log($1); q += log($1) ^ 2; n++ }
		END { m = s / n; if (n < 2) { printf "%.*f", d, exp(m); exit }
			v = (q - n * m * m) / (n - 1); e = (n > 20 ? 2.05 : t[n - 1]) * sqrt(v > 0 ? v / n : 0)
			printf "%.*f, 95 %% in [%.*f .. %.*f]", d, exp(m), d, exp(m - e), d, exp(m + e) }'
}
# percentile P <NUMBERS
percentile() { sort -g | awk -v p="$1" '{ x[NR] = $1 } END { if (NR == 0) exit 1; i = int(p * NR + 0.999999); printf "%.2f\n", x[i < 1 ? 1 : i] }'; }
# time_of ROUNDS SQL: how long it takes, run so many times in one session after one run that does not count.
time_of()
{
	local -a commands=(-c "$2" -c '\timing on')
	for _ in $(seq "$1"); do commands+=(-c "$2"); done
	branch "${commands[@]}" | sed -n 's/^Time: \([0-9.]*\) ms.*/\1/p' | told 1
}
