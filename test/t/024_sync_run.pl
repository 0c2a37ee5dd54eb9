# sync_run(): what it answers, when it refuses, and that nobody is left hanging.

use strict;
use warnings;

use IO::Socket::INET;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

# A central server that takes connections and never answers.
my $central = IO::Socket::INET->new(Listen => 128, LocalAddr => '127.0.0.1', Proto => 'tcp')
  or die "could not listen: $!";
my $url = 'http://127.0.0.1:' . $central->sockport;

my $node = PostgreSQL::Test::Cluster->new('branch');
$node->init;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'");
$node->start;
$node->safe_psql(
	'postgres', qq{
CREATE EXTENSION softmobile;
SELECT softmobile.register_branch('quick', 'has no central server and fails at once');
SELECT softmobile.register_branch('hanging', 'waits for an answer', central_url => '$url');
SELECT softmobile.register_branch('closed', 'is not active', active => false);
CREATE TABLE ventas (id int PRIMARY KEY, sucursal text);
SELECT softmobile.attach('ventas', 'sale', branch_column => 'sucursal');
INSERT INTO ventas SELECT 1, 'hanging' FROM softmobile.set_reason('a sale to be sent');
INSERT INTO ventas SELECT 2, 'quick' FROM softmobile.set_reason('a sale to be sent');
});

# An SQL command fails with an SQLSTATE, and a message and hint.
sub fails
{
	my ($name, $sql, $sqlstate, $message) = @_;
	my ($ret, $stdout, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\n$sql");

	like($stderr, qr/ERROR:  $sqlstate: .*$message/s, $name);
}

sub sync_run
{
	my ($arguments) = @_;

	return $node->safe_psql('postgres',
		"SELECT branch_id, mode, status, finished_at IS NOT NULL, triggered_by FROM softmobile.sync_run($arguments)"
	);
}

my $user = $node->safe_psql('postgres', 'SELECT current_user');

# Runs that end

is(sync_run("'quick'"), "quick|manual|failed|t|$user",
	'a run, directly after CREATE EXTENSION');
like(
	$node->safe_psql('postgres', "SELECT error_message FROM softmobile.sync_run('quick')"),
	qr/central_url/,
	'... says why it failed');
is( $node->safe_psql(
		'postgres',
		"CREATE TEMP TABLE answer AS SELECT * FROM softmobile.sync_run('quick');
		 SELECT count(*) FROM (TABLE answer INTERSECT TABLE softmobile.sync_history) same"
	),
	'1',
	'... and its row is that of sync_history');
$node->safe_psql('postgres', "BEGIN; SELECT FROM softmobile.sync_run('quick'); COMMIT");
pass('a run in a transaction');

# Runs that do not

my $start = time;
is(sync_run("'hanging', '500 ms'"), "hanging|manual|running|f|$user", 'timeout of a run');
cmp_ok(time - $start, '<', 5, '... is kept');
is( $node->safe_psql(
		'postgres', "SELECT count(*) FROM softmobile.sync_history WHERE branch_id = 'hanging' AND status = 'running'"),
	'1',
	'... and the run goes on');
is( $node->safe_psql('postgres', "SELECT id IS NULL, branch_id, status FROM softmobile.sync_run('hanging', '500 ms')"),
	't|hanging|running',
	'a run that has not begun at its timeout');
is( $node->safe_psql('postgres', "SELECT branch_id FROM softmobile.sync_run(timeout => '500 ms')"),
	"hanging\nquick",
	'all active branches');
is(sync_run("'quick'"), "quick|manual|failed|t|$user", 'a branch does not wait for another');

# Callers who leave

foreach my $leave (qw(cancel terminate))
{
	my $caller = $node->background_psql('postgres', on_error_die => 0, on_error_stop => 0);

	$caller->query_until(qr/started/, "\\echo started\nSELECT * FROM softmobile.sync_run('hanging');\n");
	my $waiting = "FROM pg_stat_activity WHERE query LIKE '%sync_run(''hanging'')%' AND wait_event_type = 'Extension' AND pid <> pg_backend_pid()";
	$node->poll_query_until('postgres', "SELECT count(*) = 1 $waiting");
	$node->safe_psql('postgres', "SELECT pg_${leave}_backend(pid) $waiting");
	ok($node->poll_query_until('postgres', "SELECT count(*) = 0 $waiting"), "$leave ends the wait");
	$leave eq 'cancel' ? $caller->quit : $caller->{run}->finish;
}

# The worker leaves

$start = time;
my $caller = $node->background_psql('postgres', on_error_die => 0, on_error_stop => 0);
$caller->query_until(qr/started/,
	"\\echo started\n\\set VERBOSITY verbose\nSELECT * FROM softmobile.sync_run('hanging');\n");
$node->poll_query_until('postgres',
	"SELECT count(*) = 1 FROM pg_stat_activity WHERE query LIKE '%sync_run(''hanging'')%' AND wait_event_type = 'Extension' AND pid <> pg_backend_pid()"
);
$node->safe_psql('postgres',
	"SELECT pg_terminate_backend(pid) FROM softmobile.worker_status()");
$caller->query('SELECT');
like($caller->{stderr}, qr/ERROR:  55000: the softmobile worker ended before the run did/,
	'a caller learns that the worker has ended');
$caller->quit;
cmp_ok(time - $start, '<', 30, '... at once');
is(sync_run("'quick'"), "quick|manual|failed|t|$user", 'and may call again, while a worker is started');

# Many callers

$node->pgbench(
	'--client=4 --transactions=25 --no-vacuum',
	0,
	[qr/processed: 100\/100/],
	[qr/^$/],
	'callers at the same time',
	{ '024_sync_run' => "SELECT * FROM softmobile.sync_run('quick') WHERE status = 'failed' \\gset" });
$node->safe_psql('postgres',
	"SET softmobile.drop_undelivered = on; SELECT softmobile.register_branch('hanging', 'waits for an answer', '$url', active => false)");
$node->safe_psql('postgres',
	"SELECT softmobile.register_branch('many' || i, 'many') FROM generate_series(1, 100) i");
is( $node->safe_psql(
		'postgres', "SELECT count(*), count(DISTINCT id) FROM softmobile.sync_run() WHERE branch_id LIKE 'many%'"
	),
	'100|100',
	'more branches than can be requested at a time');

my $stopped = $node->safe_psql('postgres', 'SELECT pid FROM softmobile.worker_status()');
kill 'STOP', $stopped;
fails('no place for another request', "SELECT softmobile.sync_run('many' || i, '1 ms') FROM generate_series(1, 65) AS i",
	'53400', 'too many synchronisation runs are requested.*HINT');
kill 'CONT', $stopped;
is(sync_run("'quick'"), "quick|manual|failed|t|$user", '... and there is one again when the worker goes on');

# Refusals

fails('unknown branch', "SELECT * FROM softmobile.sync_run('quik')",
	'42704', 'HINT:  Perhaps you meant "quick"\.');
fails('unknown branch, nothing like it', "SELECT * FROM softmobile.sync_run('nowhere')",
	'42704', 'HINT:  SELECT branch_id FROM softmobile\.sync_overview');
fails('too long a branch', "SELECT * FROM softmobile.sync_run(repeat('x', 1000))", '42704', 'HINT');
fails('inactive branch', "SELECT * FROM softmobile.sync_run('closed')", '55000', 'HINT');
fails('timeout 0', "SELECT * FROM softmobile.sync_run('quick', '0')", '22023', 'positive');
fails('negative timeout', "SELECT * FROM softmobile.sync_run('quick', '-1 s')",
	'22023', 'positive');
fails('no timeout', "SELECT * FROM softmobile.sync_run('quick', NULL)", '22004', 'null');
fails("$_", "BEGIN ISOLATION LEVEL $_; SELECT * FROM softmobile.sync_run('quick')",
	'25001', 'HINT')
  foreach ('REPEATABLE READ', 'SERIALIZABLE');
fails(
	'events of the own transaction',
	"BEGIN; SELECT softmobile.set_reason('a sale'); INSERT INTO ventas VALUES (3, 'quick'); SELECT * FROM softmobile.sync_run('quick')",
	'25001', 'HINT:  Commit first');

$node->safe_psql('postgres', 'CREATE ROLE operator LOGIN; CREATE ROLE visitor LOGIN;
	GRANT EXECUTE ON FUNCTION softmobile.sync_run TO operator');
fails('no right', "SET ROLE visitor; SELECT * FROM softmobile.sync_run('quick')",
	'42501', 'permission denied');
is( $node->safe_psql(
		'postgres', "SET ROLE operator; SELECT triggered_by FROM softmobile.sync_run('quick')"),
	'operator',
	'the right to call it is enough, and the history names the caller');

# A worker that cannot run

$node->safe_psql('postgres', "ALTER SYSTEM SET softmobile.worker_role = 'nobody'");
$node->reload;
$node->poll_query_until('postgres', "SELECT detail LIKE 'The role%' FROM softmobile.worker_status()");
fails('no worker', "SELECT * FROM softmobile.sync_run('quick', '1 s')",
	'55000', 'DETAIL:  The role softmobile\.worker_role does not exist\..*HINT');

$node->stop('fast');
done_testing();
