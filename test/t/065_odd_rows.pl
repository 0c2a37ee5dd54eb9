# Invariant 3, seen from the rows: whatever somebody who sells puts into a row, others' events go on
# being delivered, figures can be read, and the worker does not end.

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
	url      => "http://127.0.0.1:$gateway->{port}",
	branches => ['b1'],
	conf     => "softmobile.probe_interval = 1s\nsoftmobile.retry_interval = 1s\nsoftmobile.max_attempts = 2\nsoftmobile.auth_token_file = '$token_file'\n");

# Tables as applications have them: a key that has no index, an amount without limits.
$shop->sql(q{
	ALTER DATABASE postgres SET softmobile.branch_id = 'b1';
	CREATE TABLE note (id text, branch text, total numeric);
	CREATE TABLE scale (id integer PRIMARY KEY, branch text, total float8);
	SELECT softmobile.attach('note', 'note', key => '{id}', branch_column => 'branch', folio_column => 'id', amount_column => 'total', priority => 'NORMAL'),
		softmobile.attach('scale', 'scale', branch_column => 'branch', amount_column => 'total', priority => 'LOW');
	CREATE ROLE till LOGIN;
	GRANT ALL ON note, scale, sale TO till});

my $pid = $shop->worker_pid;
my $sales = 0;

sub odd
{
	my ($what, @commands) = @_;

	$sales++;
	$shop->change('SET LOCAL ROLE till', @commands);
	$shop->sell('b1', "sale-$sales");
	$shop->comes_to("SELECT status FROM softmobile.sync_outbox WHERE entity_id = 'sale-$sales'", 'SENT', "$what: others' sales are delivered");
	return;
}

# Text that no compression makes smaller.
sub noise
{
	my ($length) = @_;
	return "(SELECT left(string_agg(md5(i::text), ''), $length) FROM generate_series(1, $length / 32 + 1) AS i)";
}

# ---------------------------------------------------------------------------
# Keys

odd('a key of 2,680 bytes, as a primary key may have', 'INSERT INTO sale VALUES (' . noise(2680) . ", 'b1')");
odd('a key of 100,000 bytes', 'INSERT INTO note VALUES (' . noise(100_000) . ", 'b1', 1)", 'UPDATE note SET total = 2');
odd('a key that is NULL or empty', q{INSERT INTO note VALUES (NULL, 'b1', 1), ('', 'b1', 1)});
$shop->comes_to(q{SELECT string_agg(kind || ' ' || length(entity_id), ', ' ORDER BY kind, length(entity_id)) FROM softmobile.outbox_exception WHERE state = 'failed'},
	'rejected 0, rejected 2680, rejected 100000, waiting 0, waiting 100000', 'what headquarters does not take is put aside, each before what came of its row later');
$shop->comes_to(q{SELECT count(*) FROM softmobile.outbox_exception WHERE kind = 'rejected' AND attempt_count = 2}, 3, '... and tried again');

# ---------------------------------------------------------------------------
# Branches

odd('branches that are none', qq{INSERT INTO note VALUES ('B-1', repeat('x', 5000), 1), ('B-2', E'b1\\nX: 1', 1), ('B-3', '', 1)});
$shop->comes_to(q{SELECT string_agg(branch_id || ' ' || status, ', ') FROM softmobile.sync_outbox WHERE entity_id LIKE 'B-%'}, 'b1 SENT, b1 SENT, b1 SENT', '... are the one of this server');
odd('a branch that headquarters does not know', q{INSERT INTO note VALUES ('B-4', 'b1/../b2', 1)});
$shop->comes_to(q{SELECT status, error_message FROM softmobile.sync_outbox WHERE entity_id = 'B-4'}, 'FAILED|http 403: this token may not write for branch "b1/../b2"', '... waits alone');
is($central->safe_psql('postgres', q{SELECT count(*) FROM softmobile.central_inbox WHERE branch_id <> 'b1'}), '0', 'nothing arrives for another branch');

# ---------------------------------------------------------------------------
# Amounts, of which sums are made

odd('amounts whose sum is no number', q{INSERT INTO note VALUES ('A-1', 'b1', 9e131071), ('A-2', 'b1', 9e131071), ('A-3', 'b1', 'NaN'), ('A-4', 'b1', '-Infinity'), ('A-5', 'b1', -9e131071), ('A-6', 'b1', -9e131071)},
	q{INSERT INTO scale VALUES (-1, 'b1', 'NaN'), (-2, 'b1', 'Infinity'), (-3, 'b1', 1e308), (-4, 'b1', '-Infinity')},
	q{INSERT INTO scale SELECT i, 'b1', 1 FROM generate_series(1, 1100) AS i}, q{INSERT INTO note SELECT 'C-' || i, 'b1', 1 FROM generate_series(1, 1100) AS i});
$shop->comes_to(q{SELECT count(DISTINCT t.log_id) FROM softmobile.outbox_tile t JOIN softmobile.outbox_lane l ON l.lane_id = t.log_id WHERE l.priority IN ('NORMAL', 'LOW')}, 2, 'the worker counts them');
$shop->comes_to(q{SELECT pending + failed FROM softmobile.sync_overview WHERE branch_id = 'b1'}, 5, 'all are delivered but what was put aside');
$shop->result_is(q{SELECT pending_amount FROM softmobile.sync_overview WHERE branch_id = 'b1'}, '5', 'what is waiting has an amount');
stop_gateway($gateway);
$shop->change(q{INSERT INTO note VALUES ('D-1', 'b1', 9e131071), ('D-2', 'b1', 9e131071), ('D-3', 'b1', 'NaN'), ('D-4', 'b1', 1e99), ('D-5', 'b1', -1e99), ('D-6', 'b1', 0.25)});
$shop->result_is(q{SELECT pending_amount FROM softmobile.sync_overview WHERE branch_id = 'b1'}, '5.25', 'amounts of money are counted, others are not');
$shop->result_is(q{SELECT payload #>> '{new,total}' FROM softmobile.sync_outbox WHERE entity_id = 'D-3'}, 'NaN', '... and are sent as they are');
$shop->result_is(q{SELECT count(*) FROM softmobile.offline_checklist('b1') WHERE detail LIKE 'It could not be made%'}, '0', 'the checklist can be made');
$shop->result_is(q{SELECT softmobile.metrics() LIKE '%# EOF%'}, 't', 'and the metrics');
like(($shop->node->psql('postgres', 'DROP EXTENSION softmobile CASCADE'))[2], qr/undelivered/, 'and what is undelivered can be told');

is($shop->worker_pid, $pid, 'one worker did it all');
$shop->stop;
done_testing();
