# Reconciliation over the wire: a shop, a gateway, a central database. Every kind
# of difference made on purpose; a link that is cut; sales that go on meanwhile.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmGateway;
use SmReceiver;
use SmShop;
use Test::More;

my $central = start_central();
my $gateway = start_gateway();
my $port = $gateway->{port};
my $token_file = PostgreSQL::Test::Utils::tempdir . '/token';
append_to_file($token_file, $central->safe_psql('postgres', q{SELECT softmobile.central_create_token('{b1,b2,b3,b4}', 'shop')}));
chmod 0600, $token_file;

my $shop = SmShop->new(
	url      => "http://127.0.0.1:$port",
	branches => [ 'b1', 'b9' ],
	conf     => "softmobile.auth_token_file = '$token_file'\nsoftmobile.probe_interval = 1\n");
$shop->sql(q{
	CREATE TABLE ventas (id bigint PRIMARY KEY, store_id text, folio text, total numeric(12, 2), sold_at timestamptz);
	CREATE TABLE devices (sku text PRIMARY KEY, store_id text, quantity integer);
	SELECT softmobile.attach('ventas', 'ticket', branch_column => 'store_id', folio_column => 'folio', amount_column => 'total', date_column => 'sold_at', require_reason => false),
		softmobile.attach('devices', 'inventory', branch_column => 'store_id', sku_column => 'sku', quantity_column => 'quantity', require_reason => false);
});

sub sell_tickets
{
	my ($first, $last) = @_;
	return $shop->sql("INSERT INTO ventas SELECT i, 'b1', 'A-' || lpad(i::text, 6, '0'), i * 1.25, timestamptz '2026-01-01 12:00:00+00' + i * interval '1 minute' FROM generate_series($first, $last) AS i");
}

# At the branch, behind the trigger's back.
sub secretly
{
	return $shop->sql(join(";\n", 'SET session_replication_role = replica', @_));
}

# Differences, sorted: kind and subject.
sub differences
{
	my ($columns, $first, $last) = @_;
	return $shop->sql("SELECT $columns FROM softmobile.reconcile('b1', '" . ($first // '2026-01-01') . "', '" . ($last // '2026-12-31')
		  . "') ORDER BY kind COLLATE \"C\", entity_type, coalesce(entity_id, folio) COLLATE \"C\"");
}

# What a reconciliation of a branch fails with: SQLSTATE and message.
sub refusal
{
	my ($branch) = @_;
	my ($status, $out, $err) = $shop->node->psql('postgres', "\\set VERBOSITY verbose\nSELECT count(*) FROM softmobile.reconcile('$branch', '2026-01-01', '2026-12-31')");

	return $err =~ /^.*?ERROR:\s+(.*?)^LOCATION/ms ? $1 : "no error: $out $err";
}

# ---------------------------------------------------------------------------
# Equal data

sell_tickets(1, 2000);
$shop->sql(q{INSERT INTO devices SELECT 'SKU-' || i, 'b1', i FROM generate_series(1, 300) AS i});
$shop->drains('everything is at central');
is(differences('*'), '', 'equal data: no difference');
is($shop->sql('SELECT mode, status, differences_detected FROM softmobile.sync_history ORDER BY id DESC LIMIT 1'), 'manual|success|0', 'and a session that says so');

# ---------------------------------------------------------------------------
# Every kind of difference

secretly(
	'UPDATE ventas SET total = 1 WHERE id = 10',
	'DELETE FROM ventas WHERE id = 20',
	q{INSERT INTO ventas VALUES (5000, 'b1', 'A-000030', 7, '2026-01-02')},
	q{UPDATE devices SET quantity = 7 WHERE sku = 'SKU-8'});
$central->safe_psql(
	'postgres', q{
	SELECT softmobile.central_change('b1', 'ticket', '40', (SELECT row || '{"total": 99.99}' FROM softmobile.central_projection WHERE branch_id = 'b1' AND entity_type = 'ticket' AND entity_id = '40'), 'corrected at headquarters'),
		softmobile.central_change('b1', 'inventory', 'SKU-9', NULL, 'written off at headquarters');
});
my $found = <<'END';
different|inventory|SKU-8||SKU-8|{"sku": "SKU-8", "quantity": "7"}|{"sku": "SKU-8", "quantity": "8"}
different|ticket|10|A-000010||{"folio": "A-000010", "total": "1.00"}|{"folio": "A-000010", "total": "12.50"}
different|ticket|40|A-000040||{"folio": "A-000040", "total": "50.00"}|{"folio": "A-000040", "total": "99.99"}
folio doubled|ticket||A-000030||[{"folio": "A-000030", "total": "37.50", "entity_id": "30"}, {"folio": "A-000030", "total": "7.00", "entity_id": "5000"}]|
folio gap|ticket||A-000020||{"last": "A-000020", "first": "A-000020", "missing": 1}|
missing at branch|ticket|20|A-000020|||{"folio": "A-000020", "total": "25.00"}
missing at central|inventory|SKU-9||SKU-9|{"sku": "SKU-9", "quantity": "9"}|
missing at central|ticket|5000|A-000030||{"folio": "A-000030", "total": "7.00"}|
END
chomp $found;
my $columns = 'kind, entity_type, entity_id, folio, sku, local, central';
is(differences($columns), $found, 'every kind of difference is found, both sides side by side');
is(differences($columns), $found, 'and again');
is($shop->sql("SELECT count(*) FROM softmobile.sync_discrepancy WHERE status = 'open'"), 8, 'none is doubled');
is($shop->sql('SELECT differences_detected FROM softmobile.sync_history ORDER BY id DESC LIMIT 1'), 8, 'the session counts them');

# ---------------------------------------------------------------------------
# A cut link

stop_gateway($gateway);
my $before = $shop->sql('SELECT count(*), max(id) FROM softmobile.sync_session');
my $rows = $shop->sql('SELECT sum(hashtext(d::text)) FROM softmobile.discrepancy d');
like(refusal('b1'), qr/^08006: .*HINT:  Nothing was changed/s, 'a cut link: an error that says that nothing was changed');
is($shop->sql('SELECT sum(hashtext(d::text)) FROM softmobile.discrepancy d'), $rows, 'and nothing is');
is($shop->sql('SELECT count(*), max(id) FROM softmobile.sync_session'), $before, 'no session either');

# Sold while the link is down. The link returns, but the branch is held back.
$shop->sql(q{
	INSERT INTO ventas VALUES (2001, 'b1', 'A-002000', 10, '2026-02-01');
	UPDATE devices SET quantity = 1000 WHERE sku = 'SKU-100';
	DELETE FROM ventas WHERE id = 2000;
});
$shop->fails_with(qr/^offline$/, 'the batch fails', 'b1');
$shop->sql(q{SET softmobile.drop_undelivered = on; SELECT softmobile.register_branch('b1', 'Centro', active => false)});
$gateway = start_gateway('--listen', "127.0.0.1:$port");
my $waiting = $shop->sql(q{SELECT kind, entity_id, regexp_replace(detail, '.*; its', 'its') ~ '^its event waits since [-0-9]{10} [:0-9]{8} UTC(: offline)?$'
	FROM softmobile.reconcile('b1', '2026-01-01', '2026-12-31') WHERE entity_id IN ('2000', '2001', 'SKU-100') ORDER BY entity_id COLLATE "C"});
is($waiting, "missing at branch|2000|t\nmissing at central|2001|t\ndifferent|SKU-100|t", 'differences whose events wait say so');
$shop->sql(q{SELECT softmobile.register_branch('b1', 'Centro')});
$shop->drains('the events arrive');
is(differences($columns), $found, 'then they no longer differ');
is($shop->sql(q{SELECT string_agg(entity_id, ' ' ORDER BY entity_id COLLATE "C") FROM softmobile.sync_discrepancy WHERE status = 'gone'}), '2000 2001 SKU-100', 'and are gone');
is($shop->sql(q{SELECT jsonb_array_length(details -> 'discrepancies') FROM softmobile.sync_audit WHERE action = 'discrepancies_gone'}), 3, 'which the audit tells');

# ---------------------------------------------------------------------------
# Resolved

is($shop->sql(q{SELECT r.status, r.reason FROM softmobile.sync_discrepancy d CROSS JOIN LATERAL softmobile.resolve_discrepancy(d.id, 'folio voided by the printer') AS r WHERE d.kind = 'folio gap'}),
	'resolved|folio voided by the printer', 'resolved with a reason');
is($shop->sql(q{SELECT reason, details ->> 'folio' FROM softmobile.sync_audit WHERE action = 'resolve_discrepancy'}), 'folio voided by the printer|A-000020', 'audited');
unlike(differences($columns), qr/folio gap/, 'and not reported again');

# ---------------------------------------------------------------------------
# Two at once

my $session = $shop->node->background_psql('postgres');
secretly('UPDATE ventas SET total = 2 WHERE id IN (11, 12, 13)');
$session->query_safe(q{BEGIN; SELECT count(*) FROM softmobile.reconcile('b1', '2026-01-01', '2026-12-31')});
my $other = IPC::Run::start([ 'psql', '-XAtq', '-d', $shop->node->connstr('postgres'), '-c', q{SELECT count(*) FROM softmobile.reconcile('b1', '2026-01-01', '2026-12-31')} ], '>', \my $count);
ok($shop->node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'advisory'}), 'a second reconciliation waits for the first');
$session->query_safe('COMMIT');
$session->quit;
$other->finish;
chomp $count;
is($count, 10, 'and finds the same');
is($shop->sql("SELECT count(*) FROM softmobile.sync_discrepancy WHERE status = 'open'"), 10, 'none is doubled');

# ---------------------------------------------------------------------------
# Sales go on meanwhile

my $script = $shop->node->basedir . '/sales.sql';
append_to_file($script, q{
\set x random(1, 1000000000)
\set y random(100, 1900)
INSERT INTO ventas VALUES (10000 + :x, 'b1', 'X' || :x || 'X', 5, '2026-03-01') ON CONFLICT DO NOTHING;
UPDATE ventas SET total = total + 1 WHERE id = :y;
UPDATE devices SET quantity = quantity - 1 WHERE sku = 'SKU-' || :y;
});
my $load = IPC::Run::start([ 'pgbench', '-n', '-c', 3, '-R', 300, '-T', 60, '-f', $script, $shop->node->connstr('postgres') ], '>', "$script.out", '2>&1');
ok($shop->node->poll_query_until('postgres', 'SELECT count(*) > 2100 FROM ventas'), 'sales go on');
my $unexplained = 0;
for (1 .. 20)
{
	my $wrong = differences($columns . ', detail, id');
	$unexplained += grep { !/wait since|waits since/ && !/^(?:different\|ticket\|1[0123]\||different\|ticket\|40\||different\|inventory\|SKU-8\||folio doubled|missing at branch\|ticket\|20\||missing at central\|inventory\|SKU-9\||missing at central\|ticket\|5000\|)/ } split(/\n/, $wrong);
}
$load->kill_kill;
is($unexplained, 0, 'and what differs for it has events that wait');
$shop->drains('all arrive');
is($shop->sql("SELECT count(*) FROM softmobile.reconcile('b1', '2026-01-01', '2026-12-31')"), 10, 'in the end the same is left as before');
is($shop->sql("SELECT count(*) FROM softmobile.sync_discrepancy WHERE status = 'open'"), 10, 'and nothing else is open');

# ---------------------------------------------------------------------------
# Refusals

like(refusal('b9'), qr/^28000: .*403.*"b9".*HINT:  Ask headquarters/s, 'a branch that central does not know');
like(refusal('none'), qr/^42704: .*HINT:  Registered are/s, 'a branch that nobody knows');
my $receiver = SmReceiver->new;
$shop->sql("SELECT softmobile.register_branch('b3', 'Norte', '" . $receiver->url . "')");
like(refusal('b3'), qr/^0A000: /, 'a server that does not reconcile');
my @spoilt = (
	[ '<html>Welcome to the hotel</html>', qr/^08P01: /, 'a portal' ],
	[ '{"status": "ok"}', qr/^08P01: .*not as documented/s, 'another answer' ],
	[ '{"buckets": [{"bucket": 0, "rows": [{"entity_id": "\u0000", "values": {}}]}]}', qr/^08P01: /, 'a character that no text holds' ],
	[ '{"buckets": [{"bucket": 1, "rows": []}]}', qr/^08P01: .*not as documented/s, 'a bucket that was not asked for' ]);
foreach my $case (@spoilt)
{
	$receiver->route('POST /reconcile', status => 200, body => $case->[0]);
	like(refusal('b3'), $case->[1], $case->[2]);
}
$receiver->route('POST /reconcile', status => 302, body => '', headers => { Location => 'http://login.example/' });
like(refusal('b3'), qr/^08004: .*302.*HINT:  Check that softmobile\.central_url is the central server/s, 'a portal that leads elsewhere');
$receiver->route('POST /reconcile', status => 503, body => '{"detail": "come back later"}');
like(refusal('b3'), qr/^08004: .*503: come back later/s, 'a server in trouble');
is($shop->sql("SELECT count(*) FROM softmobile.sync_history WHERE branch_id IN ('b3', 'b9') AND mode = 'manual'"), 0, 'none of them leaves anything');

$shop->sql(q{SELECT softmobile.register_branch('b4', 'Sur')});
$central->safe_psql(
	'postgres', q{
	INSERT INTO softmobile.central_projection (branch_id, entity_type, entity_id, seq, changed_at, epoch_no, deleted, changed_here, row)
	SELECT 'b4', 'inventory', i::text, i, now(), 1, false, false, jsonb_build_object('sku', i, 'quantity', 1) FROM generate_series(1, 50001) AS i;
});
like(refusal('b4'), qr/^54000: too much of "inventory" differs.*HINT:  Compare fewer days/s, 'more than central lists');

stop_gateway($gateway);
$shop->stop;
done_testing();
