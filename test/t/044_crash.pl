# Invariants 2, 5 and 6 under kill -9: whatever dies while events are on their
# way, none is lost, none takes effect twice, and none was sent whose commit did
# not survive.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;
use Time::HiRes qw(time);

my $central = SmReceiver->new;

# The WAL is written as late as possible, so that a crash loses what is not flushed on purpose.
my $shop = SmShop->new(
	url      => $central->url,
	branches => [ 1, 2 ],
	conf     => join("\n", 'restart_after_crash = on', 'synchronous_commit = off', 'wal_writer_delay = 10s',
		'wal_writer_flush_after = 1GB', 'softmobile.batch_max_events = 50', 'softmobile.probe_interval = 1s',
		'softmobile.request_timeout = 1h', ''));
my $node = $shop->node;

# What has been sent is in the log that the crash left behind.
sub all_sent_survived
{
	my ($name) = @_;
	my %log = map { $_ => 1 } split(/\n/, $shop->sql('SELECT id FROM softmobile.outbox_event'));
	my @lost = grep { !$log{ $_->{id} } } $central->events;

	is(scalar(@lost), 0, "invariant 6: $name: every event that was sent had its commit on disk ("
		  . scalar($central->events) . ' sent)');
	return;
}

sub await_server
{
	$node->poll_query_until('postgres', 'SELECT true');
	$shop->worker_pid;
	return;
}

my %end = (
	'kill -9 of the worker' => sub {
		my $pid = $shop->worker_pid;
		kill('KILL', $pid);
		$node->poll_query_until('postgres', "SELECT pid <> $pid FROM softmobile.worker_status() WHERE running");
	},
	'immediate stop' => sub { $node->stop('immediate'); $node->start; },
	'pg_terminate_backend' => sub { $shop->sql('SELECT pg_terminate_backend(pid) FROM softmobile.worker_status()'); },
	'fast restart' => sub { $node->restart; });

# ---------------------------------------------------------------------------
# Sales are captured, sent and acknowledged, and in the midst of it something dies

$node->append_conf('postgresql.conf', "softmobile.reason = 'venta normal'\n");
$node->reload;
my $round = 0;
foreach my $name ('kill -9 of the worker', 'immediate stop', 'kill -9 of the worker', 'immediate stop',
	'pg_terminate_backend', 'fast restart', 'immediate stop')
{
	my $seen = scalar($central->events);

	$round++;
	$central->answer('receipt', delay => 0.01 * ($round % 3));
	my $script = $node->basedir . "/round_$round.sql";
	append_to_file($script, qq{
\\set x random(1, 1000000000)
\\set b random(1, 2)
\\set k random(1, 20)
BEGIN;
INSERT INTO sale VALUES ('$round-' || :x || '-' || :client_id, :b) ON CONFLICT DO NOTHING;
INSERT INTO customer VALUES ('K-$round-' || :k, '1', '0') ON CONFLICT (id) DO UPDATE SET note = (customer.note::int + 1)::text;
COMMIT;
});
	append_to_file("$script.back", qq{
\\set x random(1, 1000000000)
BEGIN;
INSERT INTO sale VALUES ('$round-r-' || :x, '1') ON CONFLICT DO NOTHING;
SELECT FROM softmobile.outbox_event LIMIT 0;
ROLLBACK;
});
	my $load = IPC::Run::start([ 'pgbench', '-n', '-c', 4, '-T', 30, '-f', "$script\@4", '-f', "$script.back\@1",
			'-d', $node->connstr('postgres') ], '>', "$script.out", '2>&1');
	$central->wait_for_events($seen + 300);
	$end{$name}->();
	$load->kill_kill;
	await_server();
	all_sent_survived("$name ($round)");
}
$central->answer('receipt');
$shop->drains('what survived arrives');
$shop->all_arrived($central, 'invariant 2');
$shop->settled_is_contiguous('invariant 5: settled is contiguous');
my %last;
my $jumps = 0;
foreach my $event (grep { $_->{subject} =~ /^K-/ } $central->events)
{
	my $was = $last{ $event->{subject} } // -1;

	$jumps++ if $event->{data}{new}{note} != $was + 1;
	$last{ $event->{subject} } = $event->{data}{new}{note};
}
is($jumps, 0, 'invariant 2: each row\'s changes arrived without a gap');
note($central->duplicates . ' duplicates of ' . scalar($central->events));

# ---------------------------------------------------------------------------
# Central has stored the events, and the worker dies before the receipt is there

foreach my $name ('kill -9 of the worker', 'immediate stop', 'pg_terminate_backend')
{
	my $stored = scalar($central->events);
	my $duplicates = $central->duplicates;

	$central->answer('lost_hang');
	$shop->sell(1, map { "stored-$name-$_" } 1 .. 5);
	$central->wait_for_events($stored + 5);
	$shop->result_is(q{SELECT count(*) FROM softmobile.sync_outbox WHERE status = 'PENDING'}, '5',
		"$name: invariant 5: stored, but not acknowledged, is not settled");
	$central->answer('receipt');
	$end{$name}->();
	await_server();
	$shop->drains("$name: sent again");
	is($central->duplicates - $duplicates, 5, "$name: ... with the same ids");
}

# A failed batch is known after a crash.
$central->answer('status', status => 503, headers => { 'Retry-After' => 600 });
$shop->sell(1, 'failed-1', 'failed-2');
$shop->fails_with(qr/^http 503: /, 'a failed batch');
$shop->sql('CHECKPOINT');
$end{'immediate stop'}->();
await_server();
$shop->result_is(q{SELECT status, count(*) FROM softmobile.sync_outbox WHERE entity_id LIKE 'failed-%' GROUP BY 1}, 'FAILED|2', '... is still one after a crash');
$central->answer('receipt');
is($shop->run(1), 'success|', '... and is sent by a run');
$shop->drains('all has arrived');

# ---------------------------------------------------------------------------
# A POST hangs, and is in nobody's way

sub is_prompt
{
	my ($name, $limit, $command) = @_;
	my $start = time;

	$command->();
	cmp_ok(time - $start, '<', $limit, "$name: prompt");
	return;
}

sub hangs
{
	$central->forget_requests;
	$central->answer('hang');
	return;
}

hangs();
$shop->sell(1, 'hang-1');
$central->wait_for_requests(1);
is_prompt('fast shutdown with a POST hanging', 2, sub { $node->stop('fast') });
$central->answer('receipt');
$node->start;
$shop->drains('... and the event arrives later');

$shop->sql('CREATE DATABASE store');
$shop->set_up('store', 7);
hangs();
$node->safe_psql('store', q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale VALUES ('hang-2', '7'); COMMIT});
$central->wait_for_requests(1);
is_prompt('DROP EXTENSION with a POST hanging', 5, sub { $node->safe_psql('store', 'SET softmobile.drop_undelivered = on; DROP EXTENSION softmobile CASCADE') });
$node->safe_psql('store', 'DROP TABLE sale, customer, draft');
$shop->set_up('store', 7);
hangs();
$node->safe_psql('store', q{BEGIN; SET LOCAL softmobile.reason = 'venta normal'; INSERT INTO sale VALUES ('hang-3', '7'); COMMIT});
$central->wait_for_requests(1);
is_prompt('DROP DATABASE with a POST hanging', 5, sub { $shop->sql('DROP DATABASE store') });
$central->answer('receipt');
$shop->sell(1, 'last');
$shop->drains('the other database goes on');

$shop->stop;
done_testing();
