# A worker whose POST hangs is in nobody's way.

use strict;
use warnings;

use IO::Socket::INET;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

# Central takes connections and never answers.
my $central = IO::Socket::INET->new(Listen => 16, LocalAddr => '127.0.0.1', Proto => 'tcp')
  or die "could not listen: $!";
$central->timeout($PostgreSQL::Test::Utils::timeout_default);
my $url = 'http://127.0.0.1:' . $central->sockport;

my $node = PostgreSQL::Test::Cluster->new('branch');
$node->init;
$node->append_conf(
	'postgresql.conf', qq{
shared_preload_libraries = 'softmobile'
softmobile.central_url = '$url'
softmobile.branch_id = '7'
softmobile.request_timeout = '1h'
});
$node->start;

my @connections;

# A POST of a database's worker is on its way.
sub post_hangs
{
	my $connection = $central->accept or die "no POST: $!";
	my $line = <$connection>;

	like($line, qr/^POST /, 'POST hangs');
	push @connections, $connection;
}

sub sell
{
	my ($db) = @_;

	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql(
		$db, q{
CREATE EXTENSION softmobile;
SELECT softmobile.register_branch('7', 'Centro');
CREATE TABLE ventas (id int PRIMARY KEY);
SELECT softmobile.attach('ventas', 'sale');
INSERT INTO ventas SELECT 1 FROM softmobile.set_reason('a sale');
});
	post_hangs();
}

# A command returns without waiting for the POST.
sub is_prompt
{
	my ($name, $command) = @_;
	my $start = time;

	$command->();
	cmp_ok(time - $start, '<', 5, $name);
}

sub sql
{
	my ($command) = @_;

	is_prompt($command, sub { $node->safe_psql('postgres', $command) });
}

sell('shop');
sql('CREATE DATABASE copy TEMPLATE shop');
post_hangs() for qw(shop copy);
sql('ALTER DATABASE copy RENAME TO store');
post_hangs();
sql('DROP DATABASE store');
is_prompt('DROP EXTENSION',
	sub { $node->safe_psql('shop', 'SET softmobile.drop_undelivered = on; DROP EXTENSION softmobile CASCADE') });
ok( $node->poll_query_until(
		'postgres',
		"SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'softmobile worker')"),
	'... and the worker leaves');
sql('DROP DATABASE shop');

sell('shop');
sql('DROP DATABASE shop WITH (FORCE)');

sell('shop');
foreach my $mode (qw(fast immediate smart))
{
	is_prompt("$mode shutdown", sub { $node->stop($mode) });
	$node->start;
	post_hangs();
}

$node->stop('fast');
done_testing();
