# Invariants 1, 2 and 5 where transactions commit late, roll back, or are
# prepared: the numbers that they took are gaps for a while, and none is
# skipped, none is sent that did not commit.

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
	conf     => "max_prepared_transactions = 10\nsoftmobile.batch_max_events = 200\n");
my $node = $shop->node;
$shop->sql("ALTER SYSTEM SET softmobile.reason = 'venta normal'; SELECT pg_reload_conf()");
$node->poll_query_until('postgres', "SELECT softmobile.current_reason() IS NOT NULL");

# Numbers are drawn at commit, unless the transaction looks at the log before, or has written much.
my $draw = 'SELECT FROM softmobile.outbox_event LIMIT 0';

my $first = 0;

# Subjects that central got since the last call.
sub arrived
{
	my @events = $central->events;
	my $text = join(' ', map { $_->{subject} } @events[ $first .. $#events ]);

	$first = @events;
	return $text;
}

sub wait_for { my ($n) = @_; return $central->wait_for_events($first + $n); }

# ---------------------------------------------------------------------------
# Late commits

my $late = $node->background_psql('postgres');
$late->query_safe("BEGIN; INSERT INTO sale VALUES ('late', '1'); $draw");
$shop->sell(1, 'early');
wait_for(1);
is(arrived(), 'early', 'what commits first goes first');
$shop->sell(1, "more-$_") foreach 1 .. 5;
wait_for(5);
is(arrived(), 'more-1 more-2 more-3 more-4 more-5', 'an open transaction delays only its own events');
$shop->sell(2, 'other');
$shop->drains('another branch', 2);
is(arrived(), 'other', '... neither');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id = 'late'}, '0', 'nobody sees what is not committed');
$late->query_safe('COMMIT');
wait_for(1);
is(arrived(), 'late', 'invariant 2: a late commit is not skipped');
$shop->settled_is_contiguous('invariant 5: the gap is closed');

# Several at once, ending in another order than they began; some roll back
my @open = map { $node->background_psql('postgres') } 1 .. 6;
$open[ $_ - 1 ]->query_safe("BEGIN; INSERT INTO sale VALUES ('open-$_', '1'); INSERT INTO customer VALUES ('open-c$_', '1'); $draw")
  foreach 1 .. 6;
$shop->sell(1, 'between');
wait_for(1);
is(arrived(), 'between', 'six open transactions');
foreach my $i (4, 2, 6)
{
	$open[ $i - 1 ]->query_safe('COMMIT');
	wait_for(2);
	is(arrived(), "open-$i open-c$i", "transaction $i arrives when it commits");
}
$open[ $_ - 1 ]->query_safe('ROLLBACK') foreach 5, 1, 3;
$_->quit foreach @open, $late;
$shop->settled_is_contiguous('invariant 5: rolled-back numbers are void, and settled is one range');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_outbox WHERE entity_id IN ('open-1', 'open-3', 'open-5')}, '0',
	'invariant 1: rolled back, no event');
is(arrived(), '', '... and nothing arrives');

# The same row, changed by one transaction after the other, with a late one in between
my $holder = $node->background_psql('postgres');
$holder->query_safe("BEGIN; UPDATE sale SET note = 'held' WHERE id = 'early'; $draw");
my $waiter = $node->background_psql('postgres');
$waiter->query_until(qr/asked/, "\\echo asked\nUPDATE sale SET note = 'after' WHERE id = 'early';\n");
$node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE%'});
$shop->sell(1, 'meanwhile');
$holder->query_safe('COMMIT');
wait_for(3);
arrived();
is(join(' ', map { $_->{data}{new}{note} // 'new' } grep { $_->{subject} eq 'early' } $central->events), 'new held after',
	'invariant 2: per entity in order');
$_->quit foreach $holder, $waiter;

# ---------------------------------------------------------------------------
# Rolled back

$shop->sql(q{BEGIN; INSERT INTO sale SELECT 'gone-' || i, '1' FROM generate_series(1, 5000) i; ROLLBACK});
$shop->sell(1, 'after many');
wait_for(1);
is(arrived(), 'after many', 'a rollback of many rows');
$shop->settled_is_contiguous('invariant 5: void, as one range');
$shop->result_is(q{SELECT count(*) FROM softmobile.outbox_batch WHERE kind = 'void' AND members @> 5000::bigint AND
	(SELECT count(*) FROM unnest(members)) = 1}, '1', '... in one row of the ledger');

$shop->sql(q{BEGIN; INSERT INTO sale VALUES ('kept-1', '1');
	SAVEPOINT a; INSERT INTO sale VALUES ('lost-1', '1'); SAVEPOINT b; INSERT INTO sale VALUES ('lost-2', '1');
	RELEASE SAVEPOINT b; SELECT FROM softmobile.outbox_event LIMIT 0; ROLLBACK TO SAVEPOINT a; INSERT INTO sale VALUES ('kept-2', '1');
	SAVEPOINT c; INSERT INTO sale VALUES ('kept-3', '1'); RELEASE SAVEPOINT c; COMMIT});
wait_for(3);
is(arrived(), 'kept-1 kept-2 kept-3', 'invariant 1: savepoints');
$node->psql('postgres', q{INSERT INTO sale VALUES ('dup', '1'), ('kept-1', '1')});
$shop->sql(q{INSERT INTO sale VALUES ('kept-1', '1'), ('kept-4', '1') ON CONFLICT DO NOTHING});
wait_for(1);
is(arrived(), 'kept-4', 'invariant 1: a failed statement, and ON CONFLICT DO NOTHING');
$shop->settled_is_contiguous('invariant 5: settled is contiguous');

# A backend that dies with rows written
my $dies = $node->background_psql('postgres', on_error_stop => 0, on_error_die => 0);
my $its_pid = $dies->query_safe('SELECT pg_backend_pid()');
$dies->query_safe("BEGIN; INSERT INTO sale VALUES ('never', '1'); $draw");
$shop->sell(1, 'behind');
wait_for(1);
$shop->sql("SELECT pg_terminate_backend($its_pid)");
$dies->{run}->finish;
is(arrived(), 'behind', 'a backend is terminated');
$shop->settled_is_contiguous('invariant 5: its numbers are void');

# ---------------------------------------------------------------------------
# Prepared transactions

$shop->sql(q{BEGIN; INSERT INTO sale VALUES ('2pc-1', '1'); PREPARE TRANSACTION 'one'});
$shop->sql(q{BEGIN; INSERT INTO sale VALUES ('2pc-2', '1'); PREPARE TRANSACTION 'two'});
$shop->sql(q{BEGIN; INSERT INTO sale VALUES ('2pc-3', '1'); PREPARE TRANSACTION 'three'});
$shop->sell(1, 'while prepared');
wait_for(1);
is(arrived(), 'while prepared', 'prepared transactions delay nobody');
$shop->sql(q{COMMIT PREPARED 'two'});
wait_for(1);
is(arrived(), '2pc-2', 'COMMIT PREPARED');
$node->restart;
$shop->sell(1, 'restarted');
wait_for(1);
is(arrived(), 'restarted', 'prepared transactions across a restart');
$shop->sql(q{COMMIT PREPARED 'three'});
wait_for(1);
is(arrived(), '2pc-3', '... are not skipped when they commit');
$node->stop('immediate');
$node->start;
$shop->sell(1, 'crashed');
wait_for(1);
is(arrived(), 'crashed', 'prepared transactions across a crash');
$shop->sql(q{ROLLBACK PREPARED 'one'});
$shop->settled_is_contiguous('invariant 5: ROLLBACK PREPARED makes numbers void');
is(arrived(), '', 'invariant 1: ... and nothing arrives');

# ---------------------------------------------------------------------------
# All of it at once

$shop->sql(q{INSERT INTO customer SELECT 'k' || i, '1', '0' FROM generate_series(1, 50) i});
$shop->sql(q{CREATE FUNCTION fail_now() RETURNS void LANGUAGE plpgsql AS $$BEGIN PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN NULL; END$$});
my $duplicates = $central->duplicates;    # of the crash
$central->answer('receipt', delay => 0.02);
$node->pgbench(
	'--no-vacuum --client=30 --jobs=2 --time=5',
	0,
	[qr/number of failed transactions: 0/],
	[qr/^$/],
	'thirty clients commit, roll back, and commit late',
	{
		'043_mix@5' => q{
\set a random(1, 50)
\set b random(1, 2)
\set x random(1, 1000000000)
BEGIN;
UPDATE customer SET note = (note::int + 1)::text WHERE id = 'k' || :a;
INSERT INTO sale VALUES ('m' || :x || '-' || :client_id, :b) ON CONFLICT (id) DO UPDATE SET note = 'again';
COMMIT;
},
		'043_back@3' => q{
\set a random(1, 50)
\set x random(1, 1000000000)
BEGIN;
INSERT INTO sale VALUES ('r' || :x || '-' || :client_id, '1') ON CONFLICT DO NOTHING;
INSERT INTO draft VALUES ('r' || :x || '-' || :client_id, '2') ON CONFLICT DO NOTHING;
UPDATE customer SET note = (note::int + 1)::text WHERE id = 'k' || :a;
SELECT FROM softmobile.outbox_event LIMIT 0;
ROLLBACK;
},
		'043_late@2' => q{
\set a random(1, 50)
\set x random(1, 1000000000)
BEGIN;
INSERT INTO sale VALUES ('l' || :x || '-' || :client_id, '1') ON CONFLICT DO NOTHING;
SELECT FROM softmobile.outbox_event LIMIT 0;
SELECT pg_sleep(0.05);
SAVEPOINT s;
UPDATE customer SET note = (note::int + 1)::text WHERE id = 'k' || :a;
SELECT FROM softmobile.outbox_event LIMIT 0;
ROLLBACK TO SAVEPOINT s;
UPDATE customer SET note = (note::int + 1)::text WHERE id = 'k' || :a;
COMMIT;
}
	});
$central->answer('receipt');
$shop->drains('all of it arrives');
$shop->all_arrived($central, 'invariants 1 and 2');
$shop->settled_is_contiguous('invariant 5: settled is contiguous');

# The counters say the same as the table: no change was lost, none came twice.
my %count;
foreach my $event ($central->events)
{
	$count{ $event->{subject} }++ if $event->{subject} =~ /^k\d+$/ && $event->{type} eq 'softmobile.customer.update';
	fail("a jump in $event->{subject}")
	  if $event->{subject} =~ /^k\d+$/ && $event->{data}{new}{note} != ($count{ $event->{subject} } // 0);
}
is($shop->sql(q{SELECT sum(note::int) FROM customer WHERE id LIKE 'k%'}), eval { my $sum = 0; $sum += $_ foreach values %count; $sum },
	'invariant 2: each change of each row once, in order');
is($shop->sql(q{SELECT count(*) FROM sale}),
	scalar(grep { $_->{type} eq 'softmobile.sale.insert' } $central->events), 'invariant 1: one insert for each row');
is($central->duplicates, $duplicates, 'nothing was sent twice');

$shop->stop;
done_testing();
