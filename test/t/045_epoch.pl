# Invariant 7, the branch's side: a database that may use numbers twice opens a
# new epoch, its old lanes drain first, and nothing is lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;

my $central = SmReceiver->new;
my $shop = SmShop->new(
	name     => 'primary',
	url      => $central->url,
	branches => [1],
	init     => { allows_streaming => 1 },
	conf     => "softmobile.probe_interval = 1s\nsoftmobile.retry_interval = 2s\nsoftmobile.batch_max_events = 20\n");
my $primary = $shop->node;
my $epochs = 'SELECT count(*) FROM softmobile.outbox_epoch WHERE registered';

# Rows of sale in any database of any server.
sub sell
{
	my ($node, $db, @ids) = @_;
	$node->safe_psql($db, "BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale (id, branch) VALUES "
		  . join(', ', map { "('$_', '1')" } @ids) . '; COMMIT');
	return;
}

sub drained
{
	my ($node, $db, $name) = @_;
	return ok($node->poll_query_until($db, "SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT'", '0'), $name);
}

# One number of a lane of an epoch never stands for two events.
sub no_fork
{
	my ($name) = @_;
	my %id;
	my %forks;

	foreach my $event ($central->events)
	{
		my $number = join(' ', @$event{qw(source epoch lane sequence)});

		$forks{$number} = 1 if exists $id{$number} && $id{$number} ne $event->{id};
		$id{$number} = $event->{id};
	}
	is_deeply([ sort keys %forks ], [], "invariant 7: $name: no number stands for two events");
	return;
}

# What came of an entity is in the order of (epoch, number).
sub in_order
{
	my ($name, $subject, @notes) = @_;
	is_deeply([ map { $_->{data}{new}{note} // 'new' } grep { $_->{subject} eq $subject } $central->events ],
		\@notes, "invariant 2: $name: per entity in order");
	return;
}

# ---------------------------------------------------------------------------
# Promotion of a standby that lags behind

$shop->sell_many(1, 'A', 50);
$shop->sell(1, 'entity');
$shop->drains('the primary sells');
$primary->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'base', has_streaming => 1);
$standby->start;

# Some events wait in the queue, replicated.
$central->answer('status', status => 503);
$shop->sell_many(1, 'B', 100);
$shop->change(q{UPDATE sale SET note = 'waiting' WHERE id = 'entity'});
$shop->fails_with(qr/^http 503: /, 'central is not available for a while');
$primary->wait_for_catchup($standby);

# Others are sold and sent, and the standby does not hear of them.
$standby->stop;
$central->answer('receipt');
$shop->drains('the queue is sent');
$shop->sell_many(1, 'C', 60);
$shop->drains('and more');
my $lost = scalar($central->events);
$primary->stop('immediate');
$standby->append_conf('postgresql.conf', "primary_conninfo = ''\n");
$standby->start;
$standby->promote;
ok($standby->poll_query_until('postgres', "$epochs AND why LIKE 'another timeline%'", '1'), 'a promoted standby opens a new epoch');
ok($standby->log_contains(qr/softmobile: opened a new epoch: this is another timeline/), '... and says so in the log');
sell($standby, 'postgres', map { "D-$_" } 1 .. 200);
$standby->safe_psql('postgres', q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; UPDATE sale SET note = 'promoted' WHERE id = 'entity'; COMMIT});
drained($standby, 'postgres', '... and sells on');
no_fork('promotion');
in_order('promotion', 'entity', 'new', 'waiting', 'promoted');
is(scalar(grep { $_->{subject} =~ /^D-/ } $central->events), 200, 'invariant 7: no new event is taken for an old one');
is(scalar($central->events), $lost + 201, '... and no other is there');
is($standby->safe_psql('postgres', $epochs), '2', 'one new epoch, not more');
$standby->restart;
sell($standby, 'postgres', 'restarted');
drained($standby, 'postgres', 'a restart');
is($standby->safe_psql('postgres', $epochs), '2', '... opens none');

# ---------------------------------------------------------------------------
# A copy made by CREATE DATABASE ... TEMPLATE, with a full queue

my $node = $standby;
$central->refuse;
sell($node, 'postgres', map { "E-$_" } 1 .. 50);
$node->safe_psql('postgres', q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; UPDATE sale SET note = 'before the copy' WHERE id = 'entity'; COMMIT});
$node->safe_psql('template1', 'CREATE DATABASE copy TEMPLATE postgres');
ok($node->poll_query_until('copy', "$epochs AND why = 'a copied database'", '1'), 'a copied database opens a new epoch');
sell($node, 'copy', map { "copy-$_" } 1 .. 30);
sell($node, 'postgres', map { "orig-$_" } 1 .. 30);
my $pending = $node->safe_psql('copy', "SELECT count(*) FROM softmobile.sync_outbox WHERE status <> 'SENT'");
is($pending, '81', 'the copy has the queue, too');
$central->listen;
drained($node, $_, "$_: drains") foreach qw(postgres copy);
no_fork('copy');
is(scalar(grep { $_->{subject} =~ /^(copy|orig)-/ } $central->events), 60, 'both sell on, and nothing of either is lost');
is(scalar(grep { $_->{subject} =~ /^E-/ } $central->events), 50, 'what both had in the queue takes effect once');
is($node->safe_psql('postgres', $epochs), '2', 'the original goes on in its epoch');

# ---------------------------------------------------------------------------
# Dumped and restored, with a full queue

$central->refuse;
sell($node, 'copy', map { "F-$_" } 1 .. 50);
$node->safe_psql('copy', q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; UPDATE sale SET note = 'before the dump' WHERE id = 'entity'; COMMIT});
$node->poll_query_until('copy', "SELECT count(*) > 0 FROM softmobile.sync_outbox WHERE status = 'FAILED'");
my $dump = $node->basedir . '/dump';
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, '-d', $node->connstr('copy') ], 'pg_dump');
my $before = $node->safe_psql('copy', q{SELECT count(*), md5(string_agg(e::text, '' ORDER BY id)) FROM softmobile.outbox_event e});
my $unsent = $node->safe_psql('copy', q{SELECT count(*), md5(string_agg(id::text, '' ORDER BY id)) FROM softmobile.sync_outbox WHERE status <> 'SENT'});
$node->safe_psql('postgres', 'DROP DATABASE copy');
$node->safe_psql('template1', 'CREATE DATABASE restored TEMPLATE template0');
$node->command_ok([ 'pg_restore', '--exit-on-error', '-d', $node->connstr('restored'), $dump ], 'pg_restore');
is($node->safe_psql('restored', q{SELECT count(*), md5(string_agg(e::text, '' ORDER BY id)) FROM softmobile.outbox_event e}), $before, 'invariant 4: the log is as it was');
is($node->safe_psql('restored', q{SELECT count(*), md5(string_agg(id::text, '' ORDER BY id)) FROM softmobile.sync_outbox WHERE status <> 'SENT'}), $unsent,
	'the queue is as it was');
$central->listen;
drained($node, 'restored', 'a restored database drains by itself');
is(scalar(grep { $_->{subject} =~ /^F-/ } $central->events), 50, 'what waited when it was dumped arrives');
$node->safe_psql('restored', q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; UPDATE sale SET note = 'restored' WHERE id = 'entity'; COMMIT});
sell($node, 'restored', map { "restored-$_" } 1 .. 20);
drained($node, 'restored', 'it sells on');
ok(!$node->log_contains(qr/ ERROR: /), '... and no worker has failed');
is(scalar(grep { $_->{subject} =~ /^restored-/ } $central->events), 20, '... and what it sells');
no_fork('restore of a dump');
is((map { $_->{data}{new}{note} } grep { $_->{subject} eq 'entity' } $central->events)[-1], 'restored',
	'invariant 2: the newest change came last');
my ($old) = grep { $_->{subject} eq 'F-1' } $central->events;
my ($new) = grep { $_->{subject} eq 'restored-1' } $central->events;
cmp_ok($new->{epochno}, '>', $old->{epochno}, '... in an epoch with a higher ordinal');

# ---------------------------------------------------------------------------
# Set back by a copy of its files: nobody can notice that from inside

$node->safe_psql('postgres', 'CHECKPOINT');
$node->stop;
$node->backup_fs_cold('cold');
$node->start;
sell($node, 'restored', map { "G-$_" } 1 .. 10);
drained($node, 'restored', 'it sells on');
$node->stop('immediate');
my $old_node = PostgreSQL::Test::Cluster->new('set_back');
$old_node->init_from_backup($node, 'cold');
$old_node->start;
sell($old_node, 'restored', map { "H-$_" } 1 .. 10);
drained($old_node, 'restored', 'a server that was set back sells');
is(scalar(grep { $_->{subject} =~ /^[GH]-/ } $central->events), 20,
	'invariant 7: its new events are not taken for the old ones that had their numbers');
$old_node->stop;

done_testing();
