# A segment of the log is emptied, and its files go piece by piece: what a transaction that rolls back has emptied is
# still there, and after a crash or on a standby nothing is left over.

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
my $shop = SmShop->new(url => $central->url, init => { allows_streaming => 1 });
my $node = $shop->node;

$node->backup('base');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'base', has_streaming => 1);
$standby->start;

# Of the segment and its TOAST table, which is to be as long as some notes are.
my $size = "SELECT pg_relation_size(c.oid), pg_relation_size(c.reltoastrelid) FROM pg_class c WHERE c.oid = 'softmobile.%s'::regclass";
my $log = q{SELECT count(*), md5(string_agg(e::text, '' ORDER BY id)) FROM softmobile.outbox_event e};
my $unknown_files = q{SELECT string_agg(f, ' ') FROM pg_ls_dir('base/' || (SELECT oid FROM pg_database WHERE datname = current_database())) AS f
	WHERE f ~ '^[0-9]+' AND pg_filenode_relation(0, substring(f FROM '^[0-9]+')::oid) IS NULL};

sub size { return $node->safe_psql('postgres', sprintf($size, $_[0])); }

sub fill
{
	my ($prefix) = @_;
	$shop->change(
		"INSERT INTO sale SELECT '$prefix-' || i, '1', repeat('x', 700) FROM generate_series(1, 3000) AS i",
		"INSERT INTO sale SELECT '$prefix-long-' || i, '1', (SELECT string_agg(md5(i::text || n), '') FROM generate_series(1, 1000) AS n) FROM generate_series(1, 20) AS i");
	$shop->drains('all of it is delivered');
}

fill('A');
$shop->comes_to("SELECT softmobile.recycle_segments('0 s')", 'segment 2 opened', 'the log goes on in another segment');
my $before = $shop->sql($log);
my ($heap, $toast) = split(/\|/, size('outbox_event_1'));
cmp_ok($heap, '>', 100 * 8192, 'the first is large');
cmp_ok($toast, '>', 20 * 8192, '... and has a TOAST table');

# The same transaction may yet roll back.
my $within = $shop->sql(join(";\n", 'BEGIN', "SELECT softmobile.recycle_segments('0 s')", 'SELECT softmobile.shrink_trash(10)',
		sprintf($size, 'outbox_trash'), sprintf($size, 'outbox_event_1'), 'ROLLBACK'));
is($within, "segment 1 emptied\nt\n$heap|$toast\n0|0", 'emptied: its files are elsewhere, whole');
is($shop->sql($log), $before, 'rolled back: every event is where it was');
is($shop->sql('BEGIN; SAVEPOINT s; ' . "SELECT softmobile.recycle_segments('0 s'); ROLLBACK TO s; COMMIT"), 'segment 1 emptied', 'emptied in a subtransaction');
is($shop->sql($log), $before, '... rolled back');
is(size('outbox_trash'), '0|0', '... nothing is left over');

# Who reads it is not waited for: not by the worker, and nothing goes while somebody does.
my $reader = $node->background_psql('postgres');
$reader->query_safe('BEGIN; LOCK TABLE softmobile.outbox_trash IN ACCESS SHARE MODE');
is($shop->sql("SELECT softmobile.recycle_segments('0 s')"), 'segment 1 is being read', 'while somebody has it locked nothing is emptied');
$reader->query_safe('COMMIT');
is($shop->sql("SELECT softmobile.recycle_segments('0 s')"), 'segment 1 emptied', 'emptied for good');
$reader->query_safe('BEGIN; LOCK TABLE softmobile.outbox_trash IN ACCESS SHARE MODE');

SKIP:
{
	skip 'the worker was there already', 7 if size('outbox_trash') eq '0|0';
	is(size('outbox_trash'), "$heap|$toast", 'its files are there');
	is($shop->sql('SELECT softmobile.shrink_trash(10)'), 't', 'who has them locked keeps them');
	is(size('outbox_trash'), "$heap|$toast", '... whole');
	$reader->query_safe('COMMIT');
	# A vacuum against wraparound, or pg_amcheck, has the TOAST table alone.
	my $toast_table = $shop->sql("SELECT reltoastrelid::regclass FROM pg_class WHERE oid = 'softmobile.outbox_trash'::regclass");
	$reader->query_safe("BEGIN; SELECT count(*) FROM $toast_table");
	is($shop->sql("SET lock_timeout = '2s'; SELECT softmobile.shrink_trash(10)"), 't', '... of their TOAST table as well');
	is(size('outbox_trash'), "$heap|$toast", '... whole');
	$reader->query_safe('COMMIT');
	is($shop->sql('SELECT softmobile.shrink_trash(10)'), 't', 'a piece goes');
	is(size('outbox_trash'), ($heap - 10 * 8192) . "|$toast", '... of that size, from the end');
}
$reader->quit;
$shop->sell(1, 'B-1');
$shop->drains('the shop goes on');

# After a crash the rest goes, too.
$node->stop('immediate');
$node->start;
$node->poll_query_until('postgres', sprintf("SELECT ROW(pg_relation_size(c.oid), pg_relation_size(c.reltoastrelid)) = ROW(0, 0) FROM pg_class c WHERE c.oid = 'softmobile.%s'::regclass", 'outbox_trash'));
is(size('outbox_trash'), '0|0', 'the worker removes the rest');
is(size('outbox_event_1'), '0|0', 'the segment is empty');
is($shop->sql("SELECT count(*) FROM softmobile.outbox_event"), 1, 'what was written since is there');
$shop->sql('CHECKPOINT');
is($shop->sql($unknown_files), '', 'no file is left that belongs to nobody');

# Again, until the first segment is in use again.
for my $segment (3, 4, 1)
{
	fill("S$segment");
	$shop->comes_to("SELECT softmobile.recycle_segments('0 s')", "segment $segment opened", "segment $segment is opened");
}
$shop->sell(1, 'C-1');
$shop->drains('events are written to the first again');
is($shop->sql("SELECT entity_id FROM softmobile.outbox_event_1"), 'C-1', '... and found there');

$node->wait_for_catchup($standby, 'replay', $node->lsn('insert'));
is($standby->safe_psql('postgres', $log), $shop->sql($log), 'a standby has the same events');
is($standby->safe_psql('postgres', sprintf($size, 'outbox_trash')), size('outbox_trash'), '... and the same files');
is($standby->safe_psql('postgres', $unknown_files), '', '... and none that belongs to nobody');
is(scalar($central->events), 4 * 3020 + 2, 'central got all of it');
is($central->duplicates, 0, '... once');

$standby->stop;
$shop->stop;
done_testing();
