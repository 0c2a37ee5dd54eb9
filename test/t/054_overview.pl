# What sync_overview says in the course of an outage, and that the worker counts
# the log without missing a late event.

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
	url      => $central->url,
	branches => [ 1, 2 ],
	conf     => join("\n", 'softmobile.probe_interval = 1s', 'softmobile.batch_max_events = 100', 'softmobile.sync_interval = 1s',
		'softmobile.connect_timeout = 1s', 'autovacuum = off', ''));
my $node = $shop->node;

$shop->sql(q{CREATE TABLE ticket (id integer PRIMARY KEY, branch text, total numeric);
	SELECT softmobile.attach('ticket', 'ticket', branch_column => 'branch', amount_column => 'total', priority => 'HIGH')});

# The worker with the rights that it needs, no more.
$shop->sql(q{CREATE ROLE courier LOGIN; SELECT softmobile.grant_role('courier', 'worker')});
$node->append_conf('postgresql.conf', "softmobile.worker_role = 'courier'");
$node->restart;
$shop->worker_pid;

sub overview
{
	my ($columns, $branch) = @_;
	return "SELECT $columns FROM softmobile.sync_overview WHERE branch_id = '" . ($branch // 1) . "'";
}

sub sell_tickets
{
	my ($from, $to) = @_;
	return $shop->change("INSERT INTO ticket SELECT i, '1', 10.50 FROM generate_series($from, $to) i");
}

# What the statistics count is what is in the log.
sub figures_are_exact
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return $shop->result_is(q{
		SELECT count(*) FROM (
			SELECT branch_id, entity_type, priority, count(*) AS total, count(*) FILTER (WHERE status = 'PENDING') AS pending, count(*) FILTER (WHERE status = 'FAILED') AS failed,
				min(created_at) FILTER (WHERE status = 'PENDING') AS oldest
			FROM softmobile.sync_outbox GROUP BY 1, 2, 3) AS o
		FULL JOIN softmobile.sync_outbox_stats s USING (branch_id, entity_type, priority)
		WHERE (o.total, o.pending, o.failed, o.oldest) IS DISTINCT FROM (s.total, s.pending, s.failed, s.oldest_pending)}, 0, $name);
}

# ---------------------------------------------------------------------------
# Before

$shop->comes_to(overview('link_state, since IS NOT NULL'), 'up|t', 'a link that nothing has been sent on yet is looked at');
$shop->result_is('SELECT branch_id, percent, pending, failed, conflicts, oldest_pending_age, pending_amount, success_rate, estimated_completion, total FROM softmobile.sync_overview ORDER BY 1',
	"1|100|0|0|0||0|||0\n2|100|0|0|0||0|||0", 'a row for each branch, with nothing to send');
sell_tickets(1, 4);
$shop->drains('sales arrive', 1);
$shop->result_is(overview('percent, pending, failed, oldest_pending_age, pending_amount, success_rate, estimated_completion, total, events_per_minute > 0, now() - last_sent_at < interval $$1 minute$$, error_message'),
	'100.00|0|0||0|100.0||4|t|t|', 'and that is what it says');

# ---------------------------------------------------------------------------
# An outage that nobody has noticed by selling

$central->refuse;
my $cut = $shop->sql('SELECT clock_timestamp()');
$shop->comes_to(overview('link_state', 2), 'down', 'an idle link that is lost is noticed');
$shop->comes_to(overview('link_state', 1), 'down', '... for all branches of that central server');
$shop->result_is(overview("since >= '$cut' AND since <= clock_timestamp()"), 't', '... and since when');
sell_tickets(11, 310);
is($shop->failure(1), 'offline', 'the first sale is tried nevertheless');
$shop->result_is(overview('link_state, percent, pending, failed, oldest_pending_age > interval $$0$$, pending_amount, estimated_completion, total, error_message'),
	'down|1.31|200|100|t|3150.00||304|offline', 'what waits: number, age and money; no forecast');
$shop->result_is(overview('success_rate BETWEEN 1 AND 99.9'), 't', 'not all requests succeeded');
$shop->result_is(overview('link_state, pending, failed, percent', 2), 'down|0|0|100', 'the other branch has nothing to send');
figures_are_exact('statistics in an outage');

my $since = $shop->sql(overview('since'));
is($shop->run(1), 'failed|offline', 'a run fails');
$shop->result_is(overview('since'), $since, 'the outage goes on: it does not begin anew');
$shop->sql('SELECT pg_terminate_backend(pid) FROM softmobile.worker_status()');
$shop->comes_to(overview('link_state, since = $$' . $since . '$$'), 'down|t', '... nor when the worker is replaced');
is($shop->run(1), 'failed|offline', '... which tries');
$shop->result_is(overview('since'), $since, '... and finds it so');
my $rows = $shop->sql('SELECT count(*) FROM softmobile.link_state WHERE state = $$down$$');
is($rows, 2, 'a row for each branch');

my %metric = map { $_ => 1 } split(/\n/, $shop->sql('SELECT softmobile.metrics()'));
ok($metric{$_}, "the metrics say the same: $_") foreach (
	'softmobile_link_state{branch="1",softmobile_link_state="down"} 1', 'softmobile_link_state{branch="1",softmobile_link_state="up"} 0',
	'softmobile_outbox_events{branch="1",entity_type="ticket",priority="high",status="failed"} 100',
	'softmobile_outbox_events{branch="1",entity_type="ticket",priority="high",status="pending"} 200',
	'softmobile_outbox_amount{branch="1"} 3150.00', 'softmobile_sent_events_total{branch="1"} 4', 'softmobile_worker_running 1');

# ---------------------------------------------------------------------------
# The link is back

$central->answer('receipt', delay => 0.3);
$central->listen;
$shop->comes_to(overview('link_state, estimated_completion BETWEEN now() AND now() + interval $$10 minutes$$'), 'up|t', 'on its way there is a forecast');
$central->answer('receipt');
$shop->drains('everything arrives', 1);
$shop->comes_to(overview('link_state, percent, pending, failed, oldest_pending_age, pending_amount, estimated_completion, error_message'), 'up|100.00|0|0||0||',
	'and the overview says so');
$shop->result_is(overview("since > '$since'"), 't', 'since when the link is up');
figures_are_exact('statistics after it');

$shop->sql(q{SELECT softmobile.register_branch('2', 'Branch 2', active => false)});
$shop->result_is(overview('link_state', 2), 'inactive', 'an inactive branch');
$shop->sql(q{SELECT softmobile.register_branch('2', 'Branch 2')});
$shop->comes_to(overview('link_state', 2), 'up', '... and active again');

# ---------------------------------------------------------------------------
# Tiles: what a long transaction may still write is waited for

$central->refuse;
my $late = $node->background_psql('postgres', on_error_stop => 1);
$late->query_safe(q{SET softmobile.reason = 'venta tardía'});
$late->query_safe('BEGIN');
$late->query_safe(q{INSERT INTO sale (id, branch) VALUES ('late', '1'); SELECT FROM softmobile.outbox_event LIMIT 0});
$shop->sell_many(1, 'T', 5000);
$shop->change(q{INSERT INTO customer SELECT i, '1' FROM generate_series(1, 5000) i});
my $tiles = q{SELECT coalesce(sum(t.events), 0) FROM softmobile.outbox_tile t JOIN softmobile.outbox_lane l ON l.lane_id = t.log_id WHERE l.branch_id = '1' AND l.priority = };
$shop->comes_to("$tiles 'NORMAL'", 4096, 'the worker counts blocks that are complete');
$shop->result_is("$tiles 'HIGH'", 0, '... but none that somebody may still write to');
figures_are_exact('statistics meanwhile');
$late->query_safe('COMMIT');
$late->quit;
$shop->comes_to("SELECT ($tiles 'HIGH') >= 4096", 't', 'when he has committed, they are counted');
$shop->result_is(q{SELECT count(*) FROM softmobile.outbox_tile t JOIN softmobile.outbox_event e ON e.lane_id = t.log_id AND (e.seq - 1) / softmobile.tile_size() = t.block WHERE e.entity_id = 'late'}, 2,
	'... his sale too, in a block with tickets');
figures_are_exact('statistics with tiles of an outage');
$central->listen;
$shop->drains('all of it arrives', 1);
figures_are_exact('statistics with tiles of what was delivered');

# ---------------------------------------------------------------------------
# Where nothing can be known

$shop->sql(q{ALTER DATABASE postgres SET softmobile.central_url = ''});
$shop->comes_to(overview('link_state'), 'not configured', 'without central_url');
$shop->sql(q{ALTER SYSTEM SET softmobile.worker_role = 'nobody'; SELECT pg_reload_conf()});
$shop->sql('SELECT pg_terminate_backend(pid) FROM softmobile.worker_status() WHERE running');
$shop->comes_to(overview('link_state, since'), 'unknown|', 'without a worker');

$shop->stop;
done_testing();
