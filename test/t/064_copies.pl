# Invariant 7 with our own central: a database set back, promoted, cloned or
# upgraded never makes central take a new event for an old one, and never hides a
# lost one.  (Lagging standbys, copies by template and dumps: 045_epoch.pl; a
# snapshot of the storage: 059_verify.pl.)

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmShop;
use Test::More;

my $central = start_central();
my $gateway = start_gateway();
my $token_file = "$PostgreSQL::Test::Utils::tmp_check/token";

append_to_file($token_file, token('b1'));
chmod 0600, $token_file or die "chmod: $!";

my $shop = SmShop->new(
	name     => 'primary',
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => ['b1'],
	init     => { allows_streaming => 1, has_archiving => 1 },
	conf     => "softmobile.probe_interval = 1s\nsoftmobile.retry_interval = 2s\nsoftmobile.auth_token_file = '$token_file'\n");
my $primary = $shop->node;

sub sell
{
	my ($node, @ids) = @_;
	$node->safe_psql('postgres', "BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale (id, branch) VALUES "
		  . join(', ', map { "('$_', 'b1')" } @ids) . '; COMMIT');
	return;
}

sub drained
{
	my ($node, $name) = @_;
	return ok($node->poll_query_until('postgres', "SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT'", '0'), $name);
}

# How many sales headquarters has whose ids match.
sub at_central
{
	my ($pattern, $expected, $name) = @_;
	return is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_projection WHERE entity_type = 'sale' AND entity_id ~ '$pattern'"), $expected, $name);
}

sub forks
{
	return $central->safe_psql('postgres', 'SELECT count(*) FROM softmobile.central_fork');
}

# ---------------------------------------------------------------------------
# Set back by a recovery to a point in time, before events that central has

sell($primary, map { "A-$_" } 1 .. 10);
drained($primary, 'the shop sells');
$primary->backup('base');
sell($primary, map { "B-$_" } 1 .. 10);

# What waits at that moment, what is sent later, and what is sold later.
my $point = $primary->safe_psql('postgres', 'SELECT pg_current_wal_insert_lsn()');
$primary->safe_psql('postgres', "SELECT pg_create_restore_point('noon')");
drained($primary, 'what was sold before the point is sent');
sell($primary, map { "C-$_" } 1 .. 10);
drained($primary, 'and what was sold after it');
$primary->safe_psql('postgres', 'SELECT pg_switch_wal()');
$primary->stop;

my $recovered = PostgreSQL::Test::Cluster->new('recovered');
$recovered->init_from_backup($primary, 'base', has_restoring => 1);
$recovered->append_conf('postgresql.conf', "recovery_target_name = 'noon'\nrecovery_target_action = promote\n");
$recovered->start;
ok($recovered->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()'), 'PITR: recovered');
is($recovered->safe_psql('postgres', "SELECT count(*) FROM sale WHERE id LIKE 'C-%'"), '0', 'PITR: to before what central has');
ok($recovered->poll_query_until('postgres', "SELECT count(*) FROM softmobile.outbox_epoch WHERE registered AND why LIKE 'another timeline%'", '1'), 'PITR: a new epoch');
sell($recovered, map { "D-$_" } 1 .. 10);
drained($recovered, 'PITR: the shop sells on');
at_central('^D-', 10, 'invariant 7: PITR: no new event is taken for an old one');
at_central('^C-', 10, 'invariant 7: PITR: what only central has stays there');
is(forks(), 0, 'invariant 7: PITR: no number stands for two events');
is($recovered->safe_psql('postgres', "SELECT softmobile.count_numbers(range_agg(unknown_here)) FROM softmobile.verify_delivery('b1')"), 10, 'PITR: verify_delivery() names what is lost here');
is($recovered->safe_psql('postgres', "SELECT softmobile.count_numbers(range_agg(missing_at_central)) FROM softmobile.verify_delivery('b1')"), 0, 'PITR: nothing is lost there');

# ---------------------------------------------------------------------------
# A synchronous standby promoted: nothing is lost, nothing is sent twice in effect

$recovered->append_conf('postgresql.conf', "recovery_target_name = ''\n");
$recovered->restart;
$recovered->backup('sync');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($recovered, 'sync', has_streaming => 1);
$standby->start;
$recovered->append_conf('postgresql.conf', "synchronous_standby_names = 'standby'\n");
$recovered->reload;
ok($recovered->poll_query_until('postgres', "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'", '1'), 'a synchronous standby');
stop_gateway($gateway);
sell($recovered, map { "E-$_" } 1 .. 20);
$recovered->stop('immediate');
$gateway = start_gateway();
$standby->append_conf('postgresql.conf', "softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'\n");
$standby->reload;
$standby->promote;
sell($standby, map { "F-$_" } 1 .. 5);
drained($standby, 'synchronous standby: promoted, it sends what the primary had');
at_central('^E-', 20, 'synchronous standby: every sale that was confirmed');
at_central('^F-', 5, 'invariant 7: synchronous standby: and every new one');
is(forks(), 0, 'synchronous standby: no fork');
is($standby->safe_psql('postgres', "SELECT string_agg(DISTINCT missing_at_central::text, ' ') FROM softmobile.verify_delivery('b1')"), '{}', 'synchronous standby: nothing is lost');

# ---------------------------------------------------------------------------
# pg_upgrade, with events waiting

stop_gateway($gateway);
sell($standby, map { "G-$_" } 1 .. 7);
$standby->stop;

my $upgraded = PostgreSQL::Test::Cluster->new('upgraded');
my $bin = $standby->config_data('--bindir');
$upgraded->init;
$upgraded->append_conf('postgresql.conf', "shared_preload_libraries = 'softmobile'\n");
chdir $upgraded->basedir or die "chdir: $!";
$upgraded->command_ok([ 'pg_upgrade', '--no-sync', '-b', $bin, '-B', $bin, '-d', $standby->data_dir, '-D', $upgraded->data_dir, '-p', $standby->port, '-P', $upgraded->port,
	'-s', $upgraded->host ], 'pg_upgrade');
chdir $FindBin::Bin;
$gateway = start_gateway();
$upgraded->append_conf('postgresql.conf', "softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'\nsoftmobile.auth_token_file = '$token_file'\nsoftmobile.probe_interval = 1s\n");
$upgraded->start;
is($upgraded->safe_psql('postgres', "SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id ~ '^G-'"), '7', 'pg_upgrade: the queue is there');
sell($upgraded, map { "H-$_" } 1 .. 7);
drained($upgraded, 'pg_upgrade: drains, and sells on');
at_central('^[GH]-', 14, 'invariant 7: pg_upgrade: all arrive');
is(forks(), 0, 'pg_upgrade: no fork');
is($upgraded->safe_psql('postgres', "SELECT bool_and(missing_at_central = '{}') FROM softmobile.verify_delivery('b1')"), 't', 'pg_upgrade: nothing is lost');

# ---------------------------------------------------------------------------
# Cloned: two servers that sell as the same branch, and know nothing of each other

stop_gateway($gateway);
$upgraded->stop;
$upgraded->backup_fs_cold('clone');
my $clone = PostgreSQL::Test::Cluster->new('clone');
$clone->init_from_backup($upgraded, 'clone');
$upgraded->start;
$clone->start;
sell($upgraded, map { "I-$_" } 1 .. 6);
sell($clone, map { "J-$_" } 1 .. 6);
$gateway = start_gateway();
foreach my $node ($upgraded, $clone)
{
	$node->safe_psql('postgres', "ALTER DATABASE postgres SET softmobile.central_url = 'http://127.0.0.1:$gateway->{port}'");
	drained($node, $node->name . ': all is sent');
}
at_central('^[IJ]-', 12, 'invariant 7: clone: no sale is dropped as a duplicate');

# Whichever asks central before it sends finds that it is behind, and opens an epoch; else both have used the same numbers.
my $forks = forks();

if ($forks > 0)
{
	is($_->safe_psql('postgres', "SELECT sum(forks) FROM softmobile.verify_delivery('b1')"), $forks, 'clone: ' . $_->name . ' is told of each fork') foreach $upgraded, $clone;
}
else
{
	is($clone->safe_psql('postgres', "SELECT count(*) FROM softmobile.outbox_epoch WHERE why LIKE 'central has number%'")
		  + $upgraded->safe_psql('postgres', "SELECT count(*) FROM softmobile.outbox_epoch WHERE why LIKE 'central has number%'"), 1, 'clone: a new epoch');
	pass('clone: no number stands for two events');
}
is($central->safe_psql('postgres', "SELECT count(*) FROM softmobile.central_inbox WHERE entity_id ~ '^[IJ]-'"), 12, 'invariant 7: clone: noticed, nothing dropped');

$_->stop foreach $upgraded, $clone;
stop_gateway($gateway);
$central->stop;
done_testing();
