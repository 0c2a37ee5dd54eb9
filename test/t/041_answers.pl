# What becomes of events whatever central answers: the answer table of the wire,
# row by row.  The whole of it rests on invariant 2 (every event reaches central
# and takes effect there once) and invariant 5 (settled holds nothing else).

use strict;
use warnings;

use FindBin;
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

# ---------------------------------------------------------------------------
# Faults that fail the batch.  Each has a branch and a central server of its
# own, so that all of them happen at the same time.

my @faults = (
	# name, message, whether central may have taken the events, answer
	[ 'refused',   qr/^offline$/, 0 ],
	[ 'no name',   qr/^offline$/, 0 ],
	[ 'black hole', qr/^offline$/, 0, 'hang', health => 'same' ],
	[ 'trickle',   qr/^offline$/, 0, 'trickle', health => 'same' ],
	[ 'closed',    qr/^offline$/, 0, 'close', health => 'same' ],
	[ 'reset',     qr/^offline$/, 0, 'reset', health => 'same' ],
	[ 'reset after the events were stored', qr/^offline$/, 1, 'lost', health => 'same' ],
	[ 'stored, then silence', qr/^offline$/, 1, 'lost_hang', health => 'same' ],
	(map { [ "http $_", qr/^http $_: no detail given$/, 0, 'status', status => $_ ] }
		400, 401, 403, 404, 405, 408, 409, 418, 422, 425, 429, 451, 500, 502, 503, 599),
	[ 'a problem report', qr/^http 503: closed on Sundays$/, 0, 'problem', status => 503, detail => 'closed on Sundays' ],
	[ 'http 415', qr/^http 415: no detail given$/, 0, 'status', status => 415 ],
	[ 'redirect',  qr/^protocol: http 302 .* redirects are not followed$/, 0, 'redirect', location => 'http://127.0.0.1:1/' ],
	[ 'captive portal', qr/^protocol: /, 0, 'portal' ],
	[ 'empty 200', qr/^protocol: /, 1, 'empty', status => 200 ],
	[ 'empty 204', qr/^protocol: /, 1, 'empty' ],
	[ 'garbage',   qr/^protocol: answer is not HTTP$/, 0, 'raw', bytes => "\x00\x01SSH-2.0-OpenSSH\r\n" ],
	[ 'endless body', qr/^protocol: answer too long$/, 0, 'endless' ],
	[ 'endless headers', qr/^protocol: /, 0, 'endless_head' ],
	[ 'cut',       qr/^protocol: answer cut off$/, 1, 'cut' ],
	[ 'cut by reset', qr/^protocol: answer cut off$/, 1, 'cut_reset' ],
	[ 'cut chunk', qr/^protocol: answer cut off$/, 1, 'cut_chunked' ],
	[ 'cut headers', qr/^protocol: answer cut off$/, 1, 'cut_headers' ],
	(map { [ "lying receipt: $_", qr/^protocol: /, 1, 'lie', how => $_ ] }
		qw(counts negative fraction foreign twice status missing text array)));

my %central;
foreach my $fault (@faults)
{
	my ($name, undef, undef, $mode, %options) = @$fault;
	my $central = $central{$name} = SmReceiver->new;

	$central->answer($mode, %options) if $mode;
	$central->refuse if $name eq 'refused';
	my $url = $name eq 'no name' ? 'http://central.invalid' : $central->url;
	$shop->sql("SELECT softmobile.register_branch('$name', '$name', '$url')");
}

# Two sales and a change of the first, for each of them.
my @branches = map { $_->[0] } @faults;
$shop->change(
	(map { "INSERT INTO sale VALUES ('$_/1', '$_'), ('$_/2', '$_')" } @branches),
	q{UPDATE sale SET note = 'changed' WHERE id LIKE '%/1'});

foreach my $fault (@faults)
{
	my ($name, $message) = @$fault;

	$shop->fails_with($message, "$name: the message", $name);
}
foreach my $name (grep { $_ ne 'no name' } @branches)
{
	$shop->comes_to(
		"SELECT count(DISTINCT attempt_count) = 1 AND min(attempt_count) >= 1 AND bool_and(last_attempt_at > created_at)
			AND count(*) = 3 AND NOT bool_or(conflict_flag)
			FROM softmobile.sync_outbox WHERE status = 'FAILED' AND branch_id = '$name'",
		't', "$name: attempts are counted");
}
$shop->result_is('SELECT count(*) FROM softmobile.outbox_exception', '0', 'invariant 5: no event is at fault');
$shop->result_is(q{SELECT count(*) FROM softmobile.outbox_lane_state WHERE settled_all <> '{}' AND branch_id IS NOT NULL}, '0',
	'invariant 5: nothing is settled');
$shop->result_is(q{SELECT count(DISTINCT branch_id) FROM softmobile.sync_history WHERE status = 'failed'}, scalar(@faults),
	'every branch has a failed session');
$shop->result_is(q{SELECT count(*) FROM softmobile.sync_history WHERE status = 'success'}, '0', '... and no other');

# The faults end, and everything arrives by itself.
foreach my $fault (@faults)
{
	my ($name, undef, $took) = @$fault;
	my $central = $central{$name};

	$central->answer('receipt');
	$central->listen;
	$shop->sql("SELECT softmobile.register_branch('$name', '$name', '" . $central->url . "')") if $name eq 'no name';
	$central->drop_connections;
}
foreach my $fault (@faults)
{
	my ($name, undef, $took) = @$fault;
	my $central = $central{$name};

	$shop->drains("$name: arrives when that is over", $name);
	is(join(' ', map { "$_->{subject} $_->{type}" =~ s{^.*/(.) softmobile.sale.}{$1 }r } $central->events),
		'1 insert 2 insert 1 update', "$name: once in effect, in order");
	if ($took)
	{
		cmp_ok($central->duplicates, '>=', 3, "$name: what central had already is known as duplicate");
	}
	else
	{
		is($central->duplicates, 0, "$name: none was sent twice that had arrived");
	}
	my %keys = map { $_->{headers}{'idempotency-key'} => 1 } $central->batches;
	is(scalar(keys %keys), 1, "$name: one Idempotency-Key") unless $name =~ /^http (400|422)$/;
}

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
# When it is tried again

my $busy = branch('busy', 'status', status => 503, headers => { 'Retry-After' => 5 }, times => 1);
my $held = branch('held', 'status', status => 403, times => 1);
my $conflict = branch('running', 'status', status => 409, times => 2);
$shop->sell($_, "$_-1") foreach qw(busy held running);
$shop->drains("$_: arrives", $_) foreach qw(busy held running);
my @times = map { $_->{time} } $busy->batches;
cmp_ok($times[1] - $times[0], '>=', 4.9, 'Retry-After is honoured, beyond the retry interval');
@times = map { $_->{time} } $held->batches;
cmp_ok($times[1] - $times[0], '>=', 2.5, 'what is held is tried again at the retry interval');
my %keys = map { $_->{headers}{'idempotency-key'} => 1 } $conflict->batches;
is_deeply([ scalar($conflict->batches), scalar(keys %keys) ], [ 3, 1 ], '409: again, with the same Idempotency-Key');

# ---------------------------------------------------------------------------
# 413

my $small = branch('small', 'too_large', events => 10);
$shop->sell_many('small', 'L', 100);
$shop->drains('413: halved until it fits', 'small');
is(scalar($small->events), 100, '... all of it arrives');
is($small->duplicates, 0, '... nothing twice');
is(subjects($small), join(' ', map { "L-$_" } 1 .. 100), '... in order');

my $tiny = branch('tiny', 'too_large', events => 0);
$shop->sell('tiny', 'X-1', 'X-2');
$shop->comes_to(
	q{SELECT entity_id, kind, state, attempt_count, error_message FROM softmobile.outbox_exception WHERE branch_id = 'tiny' ORDER BY seq},
	"X-1|rejected|failed|1|http 413: too many events\nX-2|rejected|failed|1|http 413: too many events",
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
$shop->result_is(
	q{SELECT status, attempt_count, error_message FROM softmobile.sync_outbox WHERE entity_id = 'Q-37'},
	'FAILED|1|http 422: Q-37 is not acceptable', '... and sync_outbox names the one');

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
$shop->result_is(q{SELECT max(attempt_count) FROM softmobile.outbox_exception WHERE branch_id = 'mixed' AND entity_id <> 'V-5'}, '1',
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
$shop->stop;
done_testing();
