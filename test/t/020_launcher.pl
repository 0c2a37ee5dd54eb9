# A worker for each database that has the extension, whatever happens to it.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $node = PostgreSQL::Test::Cluster->new('branch');
$node->init;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'");
$node->start;

# The pid of the one worker of a database, once it is there.
sub worker_pid
{
	my ($db) = @_;
	my $query = "FROM pg_stat_activity WHERE backend_type = 'softmobile worker' AND datname = '$db'";

	$node->poll_query_until('postgres', "SELECT count(*) = 1 $query")
	  or die "no worker in database $db";
	return $node->safe_psql('postgres', "SELECT pid $query");
}

sub worker_leaves
{
	my ($pid, $name) = @_;

	ok( $node->poll_query_until(
			'postgres', "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $pid)"),
		$name);
}

# Databases with a worker.
sub workers
{
	return $node->safe_psql('postgres',
		"SELECT string_agg(datname, ' ' ORDER BY datname COLLATE \"C\") FROM pg_stat_activity WHERE backend_type = 'softmobile worker'"
	);
}

my $launcher = "FROM pg_stat_activity WHERE backend_type = 'softmobile launcher'";
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 $launcher"), 'launcher is there');

# With and without the extension

$node->safe_psql('postgres', "CREATE DATABASE $_") for qw(shop1 shop2 other);
$node->safe_psql('other', "BEGIN; CREATE EXTENSION softmobile; ROLLBACK");
$node->safe_psql('shop1', 'CREATE EXTENSION softmobile');
$node->safe_psql('shop2', 'CREATE EXTENSION softmobile');
worker_pid('shop1');
worker_pid('shop2');
is(workers(), 'shop1 shop2', 'databases with the extension have a worker, others none');

ok($node->poll_query_until('shop1', 'SELECT running FROM softmobile.worker_status()'),
	'worker_status() says that it is running');
is( $node->safe_psql(
		'shop1',
		"SELECT s.pid = a.pid AND s.started_at <= now() AND s.detail IS NULL
		 FROM softmobile.worker_status() s, pg_stat_activity a
		 WHERE a.backend_type = 'softmobile worker' AND a.datname = 'shop1'"),
	't',
	'worker_status() tells pid and start');

# Templates stay free to be copied

$node->safe_psql('template1', 'CREATE EXTENSION softmobile');
$node->safe_psql('postgres', 'CREATE DATABASE shop3');
my $shop3 = worker_pid('shop3');
is(workers(), 'shop1 shop2 shop3',
	'a database made with the extension has a worker, its template none');
is( $node->safe_psql('template1', 'SELECT running, detail FROM softmobile.worker_status()'),
	'f|This database is a template.',
	'worker_status() of a template');
$node->safe_psql('template1', 'DROP EXTENSION softmobile');
$node->safe_psql('postgres', 'DROP DATABASE shop3');

# The worker ends

my $pid = worker_pid('shop1');
my $other_pid = worker_pid('shop2');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid, 10000)");
isnt(worker_pid('shop1'), $pid, 'a terminated worker is started again');
is(worker_pid('shop2'), $other_pid, '... and the other one did not notice');

# Settings change just after the worker has read them, before it can look for changes

my $busy = $node->background_psql('shop1');
$busy->query_safe('BEGIN; LOCK TABLE softmobile.sync_session');
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . worker_pid('shop1') . ', 10000)');
my $starting = "FROM pg_stat_activity WHERE backend_type = 'softmobile worker' AND datname = 'shop1' AND wait_event_type = 'Lock'";
ok($node->poll_query_until('postgres', "SELECT count(*) = 1 $starting"), 'a worker starts');
$pid = $node->safe_psql('postgres', "SELECT pid $starting");
$node->safe_psql('postgres', "ALTER DATABASE shop1 SET softmobile.branch_id = 'late'");
$busy->query_safe('COMMIT');
$busy->quit;
worker_leaves($pid, 'settings that it has not read: the worker starts anew');
$pid = worker_pid('shop1');
$node->safe_psql('postgres', "ALTER DATABASE shop1 RESET softmobile.branch_id");
worker_leaves($pid, '... and again when they are reset');

# The extension goes, in two ways, and comes again

$pid = worker_pid('shop1');
$node->safe_psql('shop1', 'DROP EXTENSION softmobile CASCADE');
worker_leaves($pid, 'worker leaves after DROP EXTENSION');
$node->safe_psql('shop1', 'CREATE EXTENSION softmobile');
$pid = worker_pid('shop1');
pass('worker comes after the extension was created again');
$node->safe_psql('shop1', 'DROP SCHEMA softmobile CASCADE');
worker_leaves($pid, 'worker leaves after DROP SCHEMA CASCADE');
$node->safe_psql('shop1', 'CREATE EXTENSION softmobile');
$pid = worker_pid('shop1');
$node->safe_psql('shop1', 'DROP EXTENSION softmobile CASCADE; CREATE EXTENSION softmobile');
worker_leaves($pid, 'worker of an extension that was replaced leaves');
$pid = worker_pid('shop1');
pass('... and another one comes');
$node->safe_psql('shop1', 'BEGIN; DROP EXTENSION softmobile CASCADE; ROLLBACK');
is(worker_pid('shop1'), $pid, 'worker stays when DROP EXTENSION is rolled back');

# The launcher ends

my $launcher_pid = $node->safe_psql('postgres', "SELECT pid $launcher");
$node->safe_psql('postgres', "SELECT pg_terminate_backend($launcher_pid, 10000)");
ok( $node->poll_query_until('postgres', "SELECT count(*) = 1 $launcher AND pid <> $launcher_pid"),
	'the launcher is started again');
is(worker_pid('shop1'), $pid, '... and takes over the workers');
$node->safe_psql('other', 'CREATE EXTENSION softmobile');
worker_pid('other');
is(workers(), 'other shop1 shop2', '... and starts others');
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid, 10000)");
isnt(worker_pid('shop1'), $pid, '... and starts again what it took over');

# The server ends

foreach my $mode (qw(fast immediate smart))
{
	my $start = time;

	$node->stop($mode);
	cmp_ok(time - $start, '<', 10, "workers do not delay $mode shutdown");
	$node->start;
	worker_pid('shop1');
	worker_pid('shop2');
	worker_pid('other');
	pass('workers are back after the restart');
}

# A crash

$node->append_conf('postgresql.conf', 'restart_after_crash = on');
$node->reload;
$pid = worker_pid('shop1');
my $log_position = -s $node->logfile;
kill 'KILL', $pid;
$node->wait_for_log(qr/database system is ready to accept connections/, $log_position);
$node->poll_query_until('postgres', 'SELECT true');
isnt(worker_pid('shop1'), $pid, 'worker is back after it crashed the server');
ok( $node->log_contains(qr/softmobile workers start in \d+ ms/, $log_position),
	'... with a delay, lest it does so again and again');

$node->stop;

# Without preload

my $bare = PostgreSQL::Test::Cluster->new('bare');
$bare->init;
$bare->start;
$bare->safe_psql('postgres', 'CREATE EXTENSION softmobile');
is( $bare->safe_psql('postgres', 'SELECT running, detail FROM softmobile.worker_status()'),
	'f|The library is not in shared_preload_libraries.',
	'without preload the extension can be created, and says what is missing');
my ($ret, $stdout, $stderr) =
  $bare->psql('postgres', '\set VERBOSITY verbose
SELECT * FROM softmobile.sync_run()');
like($stderr, qr/ERROR:  55000: .*HINT:  Add softmobile to shared_preload_libraries/s,
	'... as does sync_run()');
$bare->safe_psql('postgres', 'DROP EXTENSION softmobile CASCADE');
$bare->stop;

done_testing();
