# common.sh: what the machine goals share. Sourced, with `set -euo pipefail` in force.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

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

# make_workspace NAME: a temporary directory of the user's, in $work; removed at exit with the servers in it.
make_workspace()
{
	work=$(mktemp -d "/tmp/softmobile-$1.XXXXXX")
	chown "$run_as" "$work"
	trap remove_workspace EXIT
}

remove_workspace()
{
	local pidfile
	for pidfile in "$work"/*/postmaster.pid; do
		[ -e "$pidfile" ] && as_user "$bin/pg_ctl" -D "${pidfile%/postmaster.pid}" -m immediate stop >/dev/null 2>&1 || true
	done
	[ -n "${SM_KEEP_WORK:-}" ] || rm -rf "$work"
}

# private_postgres: a copy of the installed PostgreSQL below $work, so that nothing on the machine is changed.
# Its programs find their files relative to themselves. Sets $bin and $pg_config.
private_postgres()
{
	local config=${PG_CONFIG:-pg_config} prefix dir
	for dir in --bindir --sharedir --pkglibdir; do
		prefix=$("$config" $dir)
		[ "$dir" = --bindir ] && prefix=$(dirname "$prefix")
		mkdir -p "$work/root$(dirname "$prefix")"
		[ -e "$work/root$prefix" ] || cp -a "$prefix" "$work/root$prefix"
	done
	bin=$work/root$("$config" --bindir)
	pg_config=$bin/pg_config
	for dir in --includedir --libdir; do
		prefix=$("$config" $dir)
		[ -e "$work/root$prefix" ] || { mkdir -p "$work/root$(dirname "$prefix")"; ln -s "$prefix" "$work/root$prefix"; }
	done
}

# private_build: the tree, built and installed into the private PostgreSQL; the copy is in $tree.
private_build()
{
	tree=$work/tree
	mkdir "$tree"
	(cd "$top" && tar -cf - --exclude=.git --exclude='*.o' --exclude='*.so' --exclude='*.bc' .) | tar -xf - -C "$tree"
	make -s -C "$tree" PG_CONFIG="$pg_config" with_llvm=no "$@" all >"$work/build.log" 2>&1 ||
		{ cat "$work/build.log"; return 1; }
	make -s -C "$tree" PG_CONFIG="$pg_config" with_llvm=no install >"$work/install.log" 2>&1 ||
		{ cat "$work/install.log"; return 1; }
	chown -R "$run_as" "$tree"
}

# start_server NAME PORT [SETTING...]: a throw-away cluster in $work/NAME, its socket in $work.
start_server()
{
	local name=$1 port=$2 setting
	shift 2
	as_user "$bin/initdb" -D "$work/$name" -U postgres -A trust -E UTF8 --locale=C.UTF-8 >"$work/$name.initdb.log" 2>&1
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
