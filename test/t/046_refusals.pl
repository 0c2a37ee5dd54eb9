# What becomes of single events that central refuses: by its status (413, 415,
# 400, 422), or one by one in its receipt.  Invariants 2 and 5: all others go on,
# per entity in order, and nothing is settled that is neither taken nor written
# down as an exception.

use strict;
use warnings;

use FindBin;
use JSON::XS qw(decode_json);
use lib "$FindBin::Bin/../perl";

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use SmReceiver;
use SmShop;
use Test::More;

my $shop = SmShop->new(
	branches => [],
	conf     => join("\n", 'softmobile.retry_interval = 3s', 'softmobile.probe_interval = 1s',
		'softmobile.connect_timeout = 1s', 'softmobile.request_timeout = 2s', ''));
my $node = $shop->node;

my %central;

# A branch with a new central server, for what follows.
sub branch
{
	my ($name, $mode, %options) = @_;
	my $central = $central{$name} = SmReceiver->new;

	$central->answer($mode, %options) if $mode;
	$shop->sql("SELECT softmobile.register_branch('$name', '$name', '" . $central->url . "')");
	return $central;
}

sub subjects { return join(' ', map { $_->{subject} } $_[0]->events); }

# ---------------------------------------------------------------------------
# 413

my $small = branch('small', 'too_large', events => 10);
$shop->sell_many('small', 'L', 100);
$shop->drains('413: halved until it fits', 'small');
is(scalar($small->events), 100, '... all of it arrives');
is($small->duplicates, 0, '... nothing twice');
is(subjects($small), join(' ', map { "L-$_" } 1 .. 100), '... in order');

my $medium = branch('medium', 'too_large', events => 250);
$shop->sell_many('medium', 'N', 10000);
$shop->drains('413: what was too much is not tried again and again', 'medium');
cmp_ok(scalar(grep { @{ decode_json($_->{body}) } > 250 } $medium->batches), '<=', 6, '... only the first batch and the one prepared behind it were halved');

my $tiny = branch('tiny', 'too_large', events => 0);
$shop->sell('tiny', 'X-1', 'X-2');
$shop->comes_to(
	q{SELECT entity_id, kind, state, attempt_count > 0, error_message FROM softmobile.outbox_exception WHERE branch_id = 'tiny' ORDER BY seq},
	"X-1|rejected|failed|t|http 413: too many events\nX-2|rejected|failed|t|http 413: too many events",
	'413 for a single event: an exception');
$tiny->answer('receipt');
$shop->drains('... that is tried again by itself', 'tiny');
is(join(' ', sort map { $_->{subject} } $tiny->events), 'X-1 X-2', '... and arrives');

my $early = branch('early', 'early', status => 413);
$shop->sell_many('early', 'E', 4);
$shop->comes_to(q{SELECT count(*) FROM softmobile.outbox_exception WHERE branch_id = 'early' AND error_message LIKE 'http 413: %'},
	'4', '413 before the body was read');
$early->answer('receipt');
$shop->drains('... arrives later', 'early');

# ---------------------------------------------------------------------------
# 415

my $plain = branch('plain', 'uncompressed');
$shop->sell('plain', 'P-1');
$shop->drains('415: once more without compression', 'plain');
is_deeply([ map { $_->{headers}{'content-encoding'} // 'none' } $plain->batches ], [qw(gzip none)], '... at once');
$shop->sell('plain', 'P-2');
$shop->drains('the next one', 'plain');
is(scalar($plain->batches), 3, '... is not compressed from the start');

# ---------------------------------------------------------------------------
# 400 and 422: which event is it?

sub exceptions
{
	my ($branch) = @_;
	return $shop->sql(qq{SELECT string_agg(entity_id || ' ' || kind, ' ' ORDER BY lane_id, seq)
		FROM softmobile.outbox_exception WHERE branch_id = '$branch' AND state IN ('failed', 'queued')});
}

my $one = branch('one', 'poison', subjects => ['Q-37']);
$shop->sell_many('one', 'Q', 64);
$one->wait_for_events(63);
$shop->comes_to(q{SELECT entity_id, kind, state, error_message FROM softmobile.outbox_exception WHERE branch_id = 'one'},
	'Q-37|rejected|failed|http 422: Q-37 is not acceptable', 'one poisonous event among many');
is(subjects($one), join(' ', map { "Q-$_" } grep { $_ != 37 } 1 .. 64), '... all others arrive, in order');
is($one->duplicates, 0, '... once');
$shop->comes_to(
	q{SELECT status, attempt_count > 0, error_message FROM softmobile.sync_outbox WHERE entity_id = 'Q-37'},
	'FAILED|t|http 422: Q-37 is not acceptable', '... and sync_outbox names the one');

my $several = branch('several', 'poison', subjects => [ map { "R-$_" } 1, 2, 3, 30, 31, 64 ]);
$shop->sell_many('several', 'R', 64);
$several->wait_for_events(58);
$node->poll_query_until('postgres', q{SELECT count(*) = 6 FROM softmobile.outbox_exception WHERE branch_id = 'several'});
is(exceptions('several'), join(' ', map { "R-$_ rejected" } 1, 2, 3, 30, 31, 64), 'several poisonous events');
is(scalar($several->events), 58, '... all others arrive');

my $all = branch('all', 'poison', subjects => [ map { "Y-$_" } 1 .. 20 ]);
$shop->sell_many('all', 'Y', 20);
$shop->fails_with(qr/^http 422: /, 'all are poisonous: the batch fails', 'all');
$shop->result_is(q{SELECT count(*), count(*) FILTER (WHERE status = 'FAILED') FROM softmobile.sync_outbox WHERE branch_id = 'all'},
	'20|20', '... as a whole');
is(exceptions('all'), '', '... and no event is at fault');
$all->answer('receipt');
$shop->drains('... they arrive when central has changed its mind', 'all');
is(subjects($all), join(' ', map { "Y-$_" } 1 .. 20), '... in order');

# Several changes of one row: the later ones share the fate of the refused one.
my $row = branch('row', 'status', status => 422);
$shop->change(q{INSERT INTO sale VALUES ('Z-1', 'row'), ('Z-2', 'row')}, map { "UPDATE sale SET note = '$_' WHERE id = 'Z-1'" } 1 .. 3);
$shop->fails_with(qr/^http 422: /, 'all of one row\'s changes are refused', 'row');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_outbox WHERE branch_id = 'row' AND status = 'FAILED' AND error_message LIKE 'http 422: %'},
	'5', '... the batch fails as a whole');
is(exceptions('row'), '', '... nothing waits behind an event that is no exception');
$row->answer('receipt');
$shop->drains('... all of them arrive later', 'row');
is(join(' ', map { $_->{data}{new}{note} // 'new' } grep { $_->{subject} eq 'Z-1' } $row->events), 'new 1 2 3', '... in order');

my $alone = branch('alone', 'poison', subjects => ['W-1']);
$shop->sell('alone', 'W-1');
$shop->fails_with(qr/^http 422: W-1 is not acceptable$/, 'a poisonous event alone', 'alone');
is(exceptions('alone'), '', '... nothing shows that it is at fault');
$shop->change(q{INSERT INTO sale VALUES ('W-2', 'alone')}, q{UPDATE sale SET note = 'later' WHERE id = 'W-1'});
$alone->wait_for_events(1);
is(subjects($alone), 'W-2', '... until another one is accepted');
$shop->comes_to(
	q{SELECT string_agg(entity_id || ' ' || kind, ', ' ORDER BY seq) FROM softmobile.outbox_exception WHERE branch_id = 'alone'},
	'W-1 rejected, W-1 waiting', '... then it is an exception, and its later change waits behind it');

# ---------------------------------------------------------------------------
# Receipts that refuse single events

my $judge = branch('judge', 'reject', subjects => { 'J-1' => 'price is negative' });
$shop->sell('judge', 'J-1', 'J-2');
$judge->wait_for_events(1);
$shop->change(q{UPDATE sale SET note = 'two' WHERE id = 'J-1'}, q{INSERT INTO sale VALUES ('J-3', 'judge')});
$shop->change(q{UPDATE sale SET note = 'three' WHERE id = 'J-1'}, q{UPDATE sale SET note = 'x' WHERE id = 'J-2'});
$judge->wait_for_events(3);
is(subjects($judge), 'J-2 J-3 J-2', 'everything else goes on');
my $id = $shop->sql(q{SELECT id FROM softmobile.sync_outbox WHERE entity_id = 'J-1' AND operation = 'insert'});
$shop->comes_to(
	q{SELECT operation, status, conflict_flag, error_message FROM softmobile.sync_outbox WHERE entity_id = 'J-1' ORDER BY created_at, id},
	"insert|FAILED|f|rejected: price is negative\nupdate|FAILED|f|waits for $id\nupdate|FAILED|f|waits for $id",
	'later events of the same entity wait');
$shop->result_is(q{SELECT differences_detected > 0, status FROM softmobile.sync_history WHERE branch_id = 'judge' ORDER BY id DESC LIMIT 1},
	't|success', 'the session ends well, and counts the difference');
$judge->answer('receipt');
$shop->result_is(qq{SELECT status, attempt_count, error_message FROM softmobile.sync_outbox_retry(ARRAY['$id'::uuid], 'price corrected')},
	'PENDING|0|', 'sync_outbox_retry() says what will be');
$shop->drains('the retried event and those that waited', 'judge');
is(join(' ', map { $_->{data}{new}{note} // 'one' } grep { $_->{subject} eq 'J-1' } $judge->events), 'one two three',
	'... in order');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_audit WHERE action = 'retry' AND reason = 'price corrected'}, '1',
	'... and the retry is audited');
$shop->change(q{UPDATE sale SET note = 'four' WHERE id = 'J-1'});
$shop->drains('... later changes are no longer held up', 'judge');

# The first of those that waited is rejected itself; then somebody retries the last.
my $again = branch('again', 'reject', subjects => { 'T-1' => 'no' });
$shop->sell('again', 'T-1');
$shop->change(map { "UPDATE sale SET note = '$_' WHERE id = 'T-1'" } 2, 3);
$shop->comes_to(q{SELECT count(*) FROM softmobile.outbox_exception WHERE branch_id = 'again' AND state = 'failed'}, '3', 'one rejected, two wait');
my @ids = split(/\n/, $shop->sql(q{SELECT id FROM softmobile.sync_outbox WHERE entity_id = 'T-1' ORDER BY id}));
$again->answer('reject', subjects => { $ids[1] => 'no' });
$shop->sql("SELECT softmobile.sync_outbox_retry(ARRAY['$ids[2]'::uuid], 'the last of them')");
$shop->comes_to(
	q{SELECT status, error_message FROM softmobile.sync_outbox WHERE entity_id = 'T-1' ORDER BY id},
	"SENT|\nFAILED|rejected: no\nFAILED|waits for $ids[1]", 'a retry of one that waits is a retry of what it waits for');
$again->answer('receipt');
$shop->drains('... and all arrive in the end', 'again');
is(join(' ', map { $_->{data}{new}{note} // 1 } $again->events), '1 2 3', '... in order');
# So they do when all of them were sent, and refused, in one batch.
my $once = branch('once', 'reject', subjects => { 'T-2' => 'no' });
$shop->sql("SELECT softmobile.register_branch('once', 'once', '" . $once->url . "', active => false)");
$shop->sell('once', 'T-2');
$shop->change(map { "UPDATE sale SET note = '$_' WHERE id = 'T-2'" } 2, 3);
$shop->sql("SELECT softmobile.register_branch('once', 'once', '" . $once->url . "', active => true)");
$shop->comes_to(q{SELECT kind, state FROM softmobile.outbox_exception WHERE branch_id = 'once' ORDER BY seq},
	"rejected|failed\nwaiting|failed\nwaiting|failed", 'refused together, the later ones wait for the first');
$once->answer('receipt');
$shop->sql("SELECT softmobile.sync_outbox_retry(ARRAY[max(id::text)::uuid], 'the last of them') FROM softmobile.sync_outbox WHERE entity_id = 'T-2'");
$shop->drains('... and follow it', 'once');
is(join(' ', map { $_->{data}{new}{note} // 1 } $once->events), '1 2 3', '... in order');


my $differ = branch('differ', 'conflict', subjects => { 'K-1' => { id => 'K-1', note => 'central' } });
$shop->sell('differ', 'K-1', 'K-2');
$shop->comes_to(
	q{SELECT kind, state, attempt_count, error_message, central_row->>'note', next_attempt_at FROM softmobile.outbox_exception WHERE branch_id = 'differ'},
	'conflict|failed|1|conflict: differs at central|central|', 'a conflict keeps what central holds');
$shop->result_is(q{SELECT status, conflict_flag FROM softmobile.sync_outbox WHERE entity_id = 'K-1'}, 'FAILED|t', '... and is flagged');
$shop->result_is(q{SELECT conflicts, failed, last_conflict_at IS NOT NULL FROM softmobile.sync_outbox_stats WHERE branch_id = 'differ'},
	'1|1|t', '... and counted');

# Exceptions that are refused together, but not all for their own fault.
my $mixed = branch('mixed', 'reject', subjects => { map { ("V-$_" => 'no') } 1 .. 8 });
$shop->sell_many('mixed', 'V', 8);
$shop->comes_to(q{SELECT count(*) FROM softmobile.outbox_exception WHERE branch_id = 'mixed' AND state = 'failed'}, '8', 'eight exceptions');
$mixed->answer('poison', subjects => ['V-5']);
$mixed->wait_for_events(7);
is(join(' ', sort map { $_->{subject} } $mixed->events), 'V-1 V-2 V-3 V-4 V-6 V-7 V-8',
	'retried together, only the one at fault is refused');
$shop->result_is(q{SELECT max(attempt_count) FILTER (WHERE entity_id <> 'V-5') < max(attempt_count) FILTER (WHERE entity_id = 'V-5')
	FROM softmobile.outbox_exception WHERE branch_id = 'mixed'}, 't',
	'... and only that one uses an attempt up');

# An exception is delivered while later changes of the same entity are on their way.
my $rush = branch('rush', 'reject', subjects => { 'B-1' => 'not yet' });
$node->append_conf('postgresql.conf', "softmobile.batch_max_events = 5\n");
$node->reload;
$shop->sell('rush', 'B-1');
$shop->comes_to(q{SELECT count(*) FROM softmobile.outbox_exception WHERE branch_id = 'rush'}, '1', 'an exception');
$id = $shop->sql(q{SELECT id FROM softmobile.sync_outbox WHERE entity_id = 'B-1'});
$rush->answer('receipt', delay => 0.05);
$shop->change(map { ("UPDATE sale SET note = '$_' WHERE id = 'B-1'", "INSERT INTO sale SELECT 'B-$_-' || i, 'rush' FROM generate_series(1, 6) i") } 1 .. 20);
$shop->sql("SELECT count(*) FROM softmobile.sync_outbox_retry(ARRAY['$id'::uuid], 'now it can be')");
$shop->drains('an exception delivered while its followers are being put aside', 'rush');
is(join(' ', map { $_->{data}{new}{note} // 0 } grep { $_->{subject} eq 'B-1' } $rush->events), join(' ', 0 .. 20),
	'invariant 2: per entity in order');
is(scalar($rush->events), 141, 'invariant 2: all of them');

$shop->settled_is_contiguous('invariant 5: settled is contiguous, exceptions included');

# Receipts are read in a database of another encoding too, while a batch that could follow is ready.
my $latin = SmReceiver->new;
$latin->answer('reject', delay => 0.02, subjects => { 'X-98' => "a\x{f1}o" });
$node->safe_psql('postgres', q{CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'});
$shop->set_up('latin');
$node->safe_psql('latin', "SET softmobile.reason = 'venta normal';
	INSERT INTO sale SELECT 'X-' || i, 'latin' FROM generate_series(1, 100) i;
	SELECT softmobile.register_branch('latin', 'latin', '" . $latin->url . "')");
ok($node->poll_query_until('latin', q{SELECT count(*) FILTER (WHERE status = 'SENT') = 99
		AND count(*) FILTER (WHERE status = 'FAILED' AND error_message = 'rejected: a' || chr(241) || 'o') = 1
	FROM softmobile.sync_outbox}), 'LATIN1: a receipt with more than ASCII');
is($node->safe_psql('latin', q{SELECT count(*) FROM softmobile.sync_history WHERE status = 'failed'}), 0, '... and the worker does not stumble over it');
$shop->stop;
done_testing();
