# The link is down: what the queue says, what that costs, and how all of it goes
# on by itself when the link is back.

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
my $shop = SmShop->new(
	url      => $central->url,
	branches => [ 1, 2 ],
	conf     => join("\n", 'softmobile.probe_interval = 1s', 'softmobile.batch_max_events = 100',
		'softmobile.connect_timeout = 1s', 'softmobile.request_timeout = 2s', 'softmobile.max_attempts = 3',
		'autovacuum = off', ''));
my $node = $shop->node;

sub states
{
	my ($branch) = @_;
	return $shop->sql(qq{SELECT status, count(*), min(attempt_count) > 0, string_agg(DISTINCT error_message, ' '), count(last_attempt_at) > 0
		FROM softmobile.sync_outbox WHERE branch_id = '$branch' AND status <> 'SENT' GROUP BY 1, attempt_count > 0 ORDER BY 1});
}

# ---------------------------------------------------------------------------
# An outage

$central->refuse;
my $lanes_before = $shop->sql('SELECT string_agg(lane_id || xmin::text, $$ $$ ORDER BY lane_id) FROM softmobile.outbox_lane');
my $start = time;
$shop->sell_many(1, 'A', 250);
is($shop->failure(1), 'offline', 'the error is exactly: offline');
is(states(1), "FAILED|100|t|offline|t\nPENDING|150|f||f", 'one batch is FAILED, the backlog PENDING, with attempt_count 0');
$shop->sell_many(1, 'B', 100);
is(states(1), "FAILED|100|t|offline|t\nPENDING|250|f||f", 'selling goes on');
$shop->change(q{INSERT INTO customer VALUES ('C-1', '1')});
my @changed = split(/\n/, $shop->sql("SELECT lane_id FROM softmobile.outbox_lane WHERE position(lane_id || xmin::text in '$lanes_before') = 0"));
is(scalar(@changed), 1, 'invariant 3: all that an outage changes is one row of one lane');
$shop->result_is(q{SELECT status, error_message FROM softmobile.sync_history WHERE branch_id = '1' ORDER BY id DESC LIMIT 1},
	'failed|offline', 'the session failed for the link');
is($shop->run(1), 'failed|offline', 'a run tries at once, and says so');
is($shop->run(2), 'failed|offline', 'a run with nothing to send looks whether the link is there');
my $attempts = $shop->sql(q{SELECT max(attempt_count) FROM softmobile.sync_outbox WHERE branch_id = '1'});
cmp_ok($attempts, '>=', 2, 'each attempt is counted');
ok($node->log_contains(qr/softmobile: link to \S+ is down/), 'the log says since when');

$central->listen;
my $back = time;
$shop->drains('all of it arrives by itself');
cmp_ok(time - $back, '<', 10, '... within seconds');
is(scalar($central->events), 351, 'every event');
is($central->duplicates, 0, '... once');
is(join(' ', map { $_->{subject} } grep { $_->{lane} eq 'high' } $central->events),
	join(' ', map { "A-$_" } 1 .. 250) . ' ' . join(' ', map { "B-$_" } 1 .. 100), '... in order');
$shop->result_is(
	q{SELECT events, reason, details->>'why' FROM softmobile.sync_audit WHERE action = 'requeue' ORDER BY id DESC LIMIT 1},
	'100|Reintento automático programado|the link is back', 'the requeue is audited');
$shop->result_is(q{SELECT status FROM softmobile.sync_history WHERE branch_id = '1' ORDER BY id DESC LIMIT 1}, 'success',
	'the next session ended well');

# The worker is replaced while the link is down.

$central->refuse;
$shop->sell(1, 'D-1');
$shop->fails_with(qr/^offline$/, 'again an outage');
$node->restart;
$shop->worker_pid;
is(states(1), 'FAILED|1|t|offline|t', 'a restarted server still knows what failed');
$central->listen;
$shop->drains('it arrives', 1);

# ---------------------------------------------------------------------------
# Requeueing by hand, while central fails on for long

$central->answer('status', status => 503, headers => { 'Retry-After' => 3600 });
$shop->sell(1, 'E-1');
$shop->sell(2, 'E-2');
$shop->fails_with(qr/^http 503: /, "branch $_ fails", $_) foreach 1, 2;
$shop->result_is(q{SELECT softmobile.requeue_failed_outbox_entries('1')}, '0', 'nothing has failed for the retry interval');
$central->answer('receipt');
$shop->result_is(q{SELECT softmobile.requeue_failed_outbox_entries('1', '0')}, '1', 'a requeue says how many events it takes');
$shop->drains('... and is carried out at once', 1);
is(states(2), 'FAILED|1|t|http 503: no detail given|t', '... for that branch');
$shop->result_is(q{SELECT softmobile.requeue_failed_outbox_entries(min_age => '0')}, '1', 'a requeue of all branches');
$shop->drains('... is carried out');
$shop->result_is(
	q{SELECT branch_id, reason, events FROM softmobile.sync_audit WHERE action = 'requeue' AND details ? 'min_age' ORDER BY id DESC LIMIT 1},
	'|Reintento automático programado|1', '... and audited');

$central->answer('status', status => 503, headers => { 'Retry-After' => 3600 });
$shop->sell(1, 'F-1', 'F-2');
$shop->fails_with(qr/^http 503: /, 'a failed batch', 1);
$central->answer('receipt');
$shop->result_is(
	q{SELECT entity_id, status, attempt_count FROM softmobile.sync_outbox_retry(
		(SELECT array_agg(id) FROM softmobile.sync_outbox WHERE entity_id = 'F-2'), 'the manager wants it now')},
	'F-2|PENDING|0', 'a retry by hand');
$shop->drains('... takes the batch at once', 1);

# What central has lost after it had acknowledged it

my $epoch = ($central->events)[0]{epoch};
$shop->result_is(q{SELECT softmobile.resend('1', 'high', '{[10,20),[30,31)}', 'headquarters were restored')}, '11', 'a resend');
$central->wait_for(sub { $_[0]->duplicates >= 11 });
is($central->duplicates, 11, '... sends exactly those again');
$shop->drains('... and they are SENT again');
$shop->settled_is_contiguous('... and settled');

# ---------------------------------------------------------------------------
# Events that central rejects are tried max_attempts times

$node->append_conf('postgresql.conf', "softmobile.retry_interval = 1s\n");
$node->reload;
$central->answer('reject', subjects => { 'G-1' => 'no such product' });
$shop->sell(1, 'G-1');
$shop->comes_to(q{SELECT attempt_count, status, error_message FROM softmobile.sync_outbox WHERE entity_id = 'G-1'},
	'3|FAILED|rejected: no such product', 'a rejected event is tried max_attempts times');
$shop->result_is(q{SELECT next_attempt_at FROM softmobile.outbox_exception}, '', '... and not any more');
$shop->result_is(q{SELECT softmobile.requeue_failed_outbox_entries('1', '0')}, '0', '... not by a requeue either');
$central->answer('receipt');
my $id = $shop->sql(q{SELECT id FROM softmobile.outbox_exception});
$shop->sql("SELECT softmobile.sync_outbox_retry(ARRAY['$id'::uuid], 'the product is there now')");
$shop->drains('... but by somebody who wants it');

# ---------------------------------------------------------------------------
# The retry interval

$central->answer('status', status => 404);
$shop->sell(1, 'H-1');
$shop->fails_with(qr/^http 404: /, 'central is not where it was');
my $requeues = $shop->sql(q{SELECT count(*) FROM softmobile.sync_audit WHERE details->>'why' = 'the retry interval has passed'});
$shop->comes_to(qq{SELECT count(*) >= $requeues + 2 FROM softmobile.sync_audit
	WHERE reason = 'Reintento automático programado' AND details->>'why' = 'the retry interval has passed' AND events = 1}, 't',
	'it is requeued at each retry interval, and audited');
$central->answer('receipt');
$shop->drains('and arrives');

# ---------------------------------------------------------------------------
# A long outage: requeue after requeue, and no bloat

$central->refuse;
$shop->sell_many(1, 'W', 10_000);
$shop->fails_with(qr/^offline$/, 'a long outage begins');
$shop->sql('VACUUM softmobile.outbox_lane, softmobile.outbox_event_1');
my $size = $shop->sql(q{SELECT pg_relation_size('softmobile.outbox_lane')});
my $wal = $shop->sql('SELECT pg_current_wal_lsn()');
my $before = $shop->sql(q{SELECT count(*) FROM softmobile.sync_history WHERE branch_id = '1'});

# A week has 1008 intervals of 600 s; each makes a requeue and a failed attempt.
foreach (1 .. 40)
{
	$shop->run(1);
}
my $runs = $shop->sql(q{SELECT count(*) FROM softmobile.sync_history WHERE branch_id = '1'}) - $before;
cmp_ok($runs, '>=', 40, 'many failed attempts');
$shop->sql('SELECT pg_stat_force_next_flush()');
$shop->result_is(q{SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'outbox_event_1'}, '0',
	'invariant 4: no outbox row was touched');
cmp_ok($shop->sql(q{SELECT pg_relation_size('softmobile.outbox_lane')}), '<=', $size + 8192, 'the lanes do not grow');
cmp_ok($shop->sql("SELECT pg_current_wal_lsn() - '$wal'") / $runs, '<', 20_000, 'an attempt writes little, whatever the backlog');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_outbox WHERE branch_id = '1' AND status <> 'SENT'}, '10000', 'all are waiting');
$central->listen;
$shop->drains('all of them arrive');
$shop->all_arrived($central, 'invariant 2');
$shop->settled_is_contiguous('invariant 5: settled is contiguous');

$shop->stop;
done_testing();
