# shellcheck shell=bash
# common.sh: what the machine goals share. Sourced, with `set -euo pipefail` in force.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Nobody's own settings reach the servers and clients in here; the copies are readable whatever the caller's umask.
for name in "${!PG@}"; do [ "$name" = PG_CONFIG ] || unset "$name"; done
unset TMPDIR
export LC_ALL=C.UTF-8
umask 022

# PostgreSQL refuses to run as root: servers and tests run as this user.
if [ "$(id -u)" = 0 ]; then run_as=postgres; else run_as=$(id -un); fi

as_user()
{
	(exec_as_user "$@")
}

# Replaces this shell, so that in a background subshell $! is the program itself.
exec_as_user()
{
	if [ "$(id -un)" = "$run_as" ]; then exec "$@"; else exec setpriv --reuid="$run_as" --regid="$(id -g "$run_as")" --init-groups --reset-env "$@"; fi
}

say()
{
	printf '== %s\n' "$*"
}

# make_workspace NAME: a temporary directory of the user's, in $work and entered (the caller's own may be closed to the user);
# removed at exit with everything that runs in it.
make_workspace()
{
	work=$(mktemp -d "/tmp/softmobile-$1.XXXXXX")
	chmod 755 "$work"
	chown "$run_as" "$work"
	cd "$work" || exit
	trap remove_workspace EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM
}

# Servers end in order, so that they give their shared memory back; what else still lives in the workspace is killed.
remove_workspace()
{
	local pid pidfile link
	trap - EXIT
	set +e
	cd /
	exec 2>/dev/null
	for pid in $(jobs -rp); do kill -9 "$pid"; done
	for link in /proc/[0-9]*/cwd; do
		[[ $(readlink "$link") == "$work"/tree* ]] && kill -9 "$(basename "${link%/cwd}")"
	done
	while read -r pidfile; do
		as_user "$bin/pg_ctl" -D "${pidfile%/postmaster.pid}" -m immediate stop >/dev/null
	done < <(find "$work" -name postmaster.pid)
	for link in /proc/[0-9]*/cwd; do
		[[ $(readlink "$link")/ == "$work"/* ]] && kill -9 "$(basename "${link%/cwd}")"
	done
	if [ -n "${SM_KEEP_WORK:-}" ]; then printf 'kept: %s\n' "$work"; else rm -rf "$work"; fi
}

# private_postgres [PG_CONFIG]: a copy of an installed PostgreSQL below $work, so that nothing on the machine is changed.
# Its programs find their files relative to themselves. Sets $bin and $pg_config.
private_postgres()
{
	local config=${1:-${PG_CONFIG:-pg_config}} dir path
	for dir in --bindir --sharedir --pkglibdir; do
		path=$("$config" $dir)
		[ "$dir" = --bindir ] && path=$(dirname "$path")
		mkdir -p "$work/root$(dirname "$path")"
		[ -e "$work/root$path" ] || cp -a "$path" "$work/root$path"
	done
	bin=$work/root$("$config" --bindir)
	pg_config=$bin/pg_config
	for dir in --includedir --libdir; do
		path=$("$config" $dir)
		[ -e "$work/root$path" ] || { mkdir -p "$work/root$(dirname "$path")"; ln -s "$path" "$work/root$path"; }
	done
	[ "$("$pg_config" --sharedir)" = "$work/root$("$config" --sharedir)" ] ||
		{ echo "This PostgreSQL cannot be copied: $("$pg_config" --sharedir)" >&2; return 1; }
}

# older_postgres: the pg_config of each older PostgreSQL that this one can be upgraded from and that extensions can be built for:
# of those in SM_OLD_PG_CONFIG, else of those that lie beside it as Debian's do.
older_postgres()
{
	local config this version
	config=${PG_CONFIG:-pg_config}
	this=$("$config" --version | sed -n 's/^PostgreSQL \([0-9]*\).*/\1/p')
	# shellcheck disable=SC2086
	for config in ${SM_OLD_PG_CONFIG-$(dirname "$(dirname "$("$config" --bindir)")")/*/bin/pg_config}; do
		version=$("$config" --version 2>/dev/null | sed -n 's/^PostgreSQL \([0-9]*\).*/\1/p')
		if [ -n "$version" ] && [ "$version" -ge 15 ] && [ "$version" -lt "$this" ] &&
			[ -e "$("$config" --pgxs)" ] && [ -e "$("$config" --includedir-server)/postgres.h" ]; then
			printf '%s\n' "$config"
		fi
	done
}

# make_quietly ARGUMENT...: make, for the private PostgreSQL; speaks when it fails.
make_quietly()
{
	make -s PG_CONFIG="$pg_config" with_llvm=no "$@" >"$work/build.log" 2>&1 || { cat "$work/build.log"; return 1; }
}

# build_in DIRECTORY [VARIABLE=VALUE...]: a copy of the tree, built there and installed into the private PostgreSQL.
build_in()
{
	local copy=$1
	shift
	mkdir "$copy"
	(cd "$top" && tar -cf - --exclude=.git --exclude='*.o' --exclude='*.so' --exclude='*.bc' --exclude=./tmp_check --exclude=./results .) |
		tar -xf - -C "$copy" --no-same-owner
	make_quietly "$@" -C "$copy" -j"$(nproc)" all && make_quietly "$@" -C "$copy" install
}

# private_build [VARIABLE=VALUE...]: the extension and the modules of its tests; the copy of the tree is in $tree.
private_build()
{
	local module
	tree=$work/tree
	build_in "$tree" "$@" || return
	for module in "$tree"/test/modules/*/; do
		[ -e "$module/Makefile" ] || continue
		make_quietly "$@" -C "$module" all || return
	done
	chown -R "$run_as" "$tree"
}

# start_server NAME PORT [SETTING...]: a throw-away cluster in $work/NAME, its socket in $work.
start_server()
{
	local name=$1 port=$2 setting
	shift 2
	as_user "$bin/initdb" -D "$work/$name" -U postgres -A trust -E UTF8 --locale=C.UTF-8 >"$work/$name.initdb" 2>&1 ||
		{ cat "$work/$name.initdb"; return 1; }
	{
		printf "port = %s\nlisten_addresses = ''\nunix_socket_directories = '%s'\n" "$port" "$work"
		for setting in "$@"; do printf '%s\n' "$setting"; done
	} >>"$work/$name/postgresql.conf"
	as_user "$bin/pg_ctl" -D "$work/$name" -l "$work/$name.log" -w start >/dev/null || { cat "$work/$name.log"; return 1; }
}

stop_server()
{
	as_user "$bin/pg_ctl" -D "$work/$1" -m fast -w stop >/dev/null
}

# free_port: a TCP port nobody listens on now.
free_port()
{
	perl -MIO::Socket::INET -e 'print IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1")->sockport'
}
