# Commands that need a database without connections are not in the worker's way,
# nor it in theirs.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('branch');
$node->init;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'");
$node->start;

sub worker_pid
{
	my ($db) = @_;
	my $query = "FROM pg_stat_activity WHERE backend_type = 'softmobile worker' AND datname = '$db'";

	$node->poll_query_until('postgres', "SELECT count(*) = 1 $query")
	  or die "no worker in database $db";
	return $node->safe_psql('postgres', "SELECT pid $query");
}

sub create_shop
{
	my ($db) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION softmobile');
	return worker_pid($db);
}

# A command fails for a reason of its own.
sub refused
{
	my ($command, $error, $name) = @_;
	my ($ret, $stdout, $stderr) = $node->psql('postgres', $command);

	isnt($ret, 0, $name);
	like($stderr, $error, '... as it should');
}

# DROP DATABASE

create_shop('shop');
$node->safe_psql('postgres', 'DROP DATABASE shop');
pass('DROP DATABASE');
create_shop('shop');
$node->safe_psql('postgres', 'DROP DATABASE shop WITH (FORCE)');
pass('DROP DATABASE FORCE');

# RENAME, in and out of a transaction

my $pid = create_shop('shop');
$node->safe_psql('postgres', 'ALTER DATABASE shop RENAME TO store');
isnt(worker_pid('store'), $pid, 'RENAME, and the worker comes back');
ok( $node->poll_query_until(
		'postgres',
		"SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'softmobile worker'"),
	'... once');
$pid = worker_pid('store');
$node->safe_psql('postgres', 'BEGIN; ALTER DATABASE store RENAME TO shop; ROLLBACK');
isnt(worker_pid('store'), $pid, 'RENAME rolled back, and the worker comes back');

# An open transaction keeps the worker out, as it keeps everybody out, to its end

my $holder = $node->background_psql('postgres');
my $worker_of_store =
  "FROM pg_stat_activity WHERE backend_type = 'softmobile worker' AND datid = (SELECT oid FROM pg_database WHERE datname = 'store')";
worker_pid('store');
$holder->query_safe('BEGIN; ALTER DATABASE store RENAME TO shop');
is($node->safe_psql('postgres', "SELECT count(*) $worker_of_store"), '0',
	'RENAME in an open transaction');
$node->safe_psql('postgres',
	"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'");
$holder->{run}->finish;
worker_pid('store');
pass('... whose session is terminated, and the worker comes back');

# SET TABLESPACE

my $directory = PostgreSQL::Test::Utils::tempdir();
$node->safe_psql('postgres', 'ALTER DATABASE store RENAME TO shop');
$node->safe_psql('postgres', "CREATE TABLESPACE elsewhere LOCATION '$directory'");
$pid = worker_pid('shop');
$node->safe_psql('postgres', 'ALTER DATABASE shop SET TABLESPACE elsewhere');
isnt(worker_pid('shop'), $pid, 'SET TABLESPACE, and the worker comes back');
$node->safe_psql('postgres', 'ALTER DATABASE shop SET TABLESPACE pg_default');

# CREATE DATABASE ... TEMPLATE

$pid = worker_pid('shop');
$node->safe_psql('postgres', 'CREATE DATABASE copy TEMPLATE shop');
isnt(worker_pid('shop'), $pid, 'CREATE DATABASE TEMPLATE, and the worker comes back');
worker_pid('copy');
pass('... and the copy has one too');
$node->safe_psql('shop', 'CREATE DATABASE copy2 TEMPLATE shop');
worker_pid('copy2');
pass('CREATE DATABASE from within the template');
$node->safe_psql('postgres', 'DROP DATABASE copy');
$node->safe_psql('postgres', 'DROP DATABASE copy2');

# Commands that fail

worker_pid('shop');
my $session = $node->background_psql('shop');
foreach my $command ('DROP DATABASE shop', 'ALTER DATABASE shop RENAME TO store',
	'ALTER DATABASE shop SET TABLESPACE elsewhere')
{
	refused($command, qr/is being accessed by other users/, "$command while in use");
	worker_pid('shop');
	pass('... and the worker comes back');
}
$session->quit;

# Who may not run a command may not stop the worker either

$node->safe_psql('postgres', 'CREATE ROLE visitor LOGIN; CREATE ROLE maker LOGIN CREATEDB');
$pid = worker_pid('shop');
foreach my $role (qw(visitor maker))
{
	refused("SET ROLE $role; $_", qr/must be owner|permission denied/, "$role: $_")
	  foreach ('DROP DATABASE shop', 'ALTER DATABASE shop RENAME TO store',
		'ALTER DATABASE shop SET TABLESPACE elsewhere',
		'CREATE DATABASE copy TEMPLATE shop');
}
is(worker_pid('shop'), $pid, 'a user without the right leaves the worker alone');

# An owner who is no superuser

$node->safe_psql('postgres', 'ALTER DATABASE shop OWNER TO maker');
$node->safe_psql('postgres', 'SET ROLE maker; DROP DATABASE shop WITH (FORCE)');
pass('DROP DATABASE FORCE by an owner who may not signal the worker');

# More commands than there are slots leave none behind

for my $i (1 .. 12)
{
	$node->safe_psql('postgres', "CREATE DATABASE passing$i");
	$node->safe_psql('postgres', "DROP DATABASE passing$i");
}
create_shop('last');
pass('slots are given back');

$node->stop;
done_testing();
