# The worker's role, and what happens when no worker can be had.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('branch');
$node->init;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'");
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION softmobile');

# Set the worker's role; the launcher notices.
sub set_role
{
	my ($role) = @_;

	$node->safe_psql('postgres', "ALTER SYSTEM SET softmobile.worker_role = '$role'");
	$node->reload;
}

sub worker_user
{
	return $node->safe_psql('postgres',
		"SELECT usename FROM pg_stat_activity WHERE backend_type = 'softmobile worker'");
}

sub status_becomes
{
	my ($detail, $name) = @_;

	ok( $node->poll_query_until(
			'postgres', "SELECT detail = \$\$$detail\$\$ FROM softmobile.worker_status()"),
		$name);
}

my $running = 'SELECT running FROM softmobile.worker_status()';

# Roles

ok($node->poll_query_until('postgres', $running), 'worker is running');
is( worker_user(),
	$node->safe_psql('postgres', 'SELECT current_user'),
	"by default the worker is the extension's owner");

$node->safe_psql('postgres',
	"CREATE ROLE courier; SELECT softmobile.grant_role('courier', 'worker');
	 CREATE ROLE boss SUPERUSER LOGIN; REVOKE CONNECT ON DATABASE postgres FROM PUBLIC");
my $log_position = -s $node->logfile;
set_role('nobody');
status_becomes('The role softmobile.worker_role does not exist.', 'a role that does not exist');
set_role('boss');
status_becomes('The role softmobile.worker_role is a superuser.', 'a superuser');
set_role('courier');
status_becomes('The role of the worker is not permitted to log in.', 'a role without LOGIN');
$node->safe_psql('postgres', 'ALTER ROLE courier LOGIN');
status_becomes('The role of the worker may not connect to this database.',
	'a role without CONNECT');
foreach (
	'Role "nobody" does not exist.',
	'Role "boss" is a superuser.',
	'Role "courier" is not permitted to log in.',
	'Role "courier" may not connect to the database.')
{
	ok($node->log_contains(qr/LOG:  no softmobile worker can run.*DETAIL:  \Q$_\E/s,
			$log_position),
		"the log says: $_");
}

$node->safe_psql('postgres', 'GRANT CONNECT ON DATABASE postgres TO courier');
$node->reload;
ok($node->poll_query_until('postgres', $running), 'worker runs as soon as it may');
is(worker_user(), 'courier', '... as the role that was set');

# Processes

set_role('');
$node->append_conf('postgresql.conf', 'max_worker_processes = 3');
$node->restart;
$node->safe_psql('postgres', "CREATE DATABASE shop$_") for 1 .. 3;
$node->safe_psql("shop$_", 'CREATE EXTENSION softmobile') for 1 .. 3;

my $workers =
  "FROM pg_stat_activity WHERE backend_type = 'softmobile worker'";
$node->wait_for_log(qr/out of background worker slots for database/);
ok( $node->log_contains(qr/HINT:  You might need to increase max_worker_processes/),
	'exhausted processes are logged, with a hint');
cmp_ok($node->safe_psql('postgres', "SELECT count(*) $workers"),
	'<', 3, 'not all databases have a worker');

# One database's worker goes, another one's takes its place.
my @without = grep {
	$node->safe_psql('postgres', "SELECT count(*) $workers AND datname = '$_'") eq '0'
} qw(postgres shop1 shop2 shop3);
my $with = $node->safe_psql('postgres', "SELECT min(datname) $workers");
$node->safe_psql($with, 'DROP EXTENSION softmobile CASCADE');
ok( $node->poll_query_until(
		'postgres', "SELECT count(*) = 1 $workers AND datname IN ('" . join("','", @without) . "')"),
	'a worker gets the process that another one gives back');

$node->stop;
done_testing();
